"""Checkpoints as folders: safetensors and JSON under a SHA-256 manifest, written whole or not at all.

A checkpoint is a nested dict of tensors and plain values. Each top-level entry that holds tensors becomes
``<entry>.safetensors``, everything else goes into ``state.json``; ``manifest.json`` is written last and verified
before any tensor is read. Of tensors that are spread over ranks each rank writes its part, as
``<entry>.shard-<index>.safetensors`` (``prelora.sharded_checkpoint``). No pickle is ever read or written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prelora.errors import CheckpointError
from prelora.files import take_place
from prelora.tensor_trees import join, split

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"step-(\d{9})(-evaluating)?")
SHARD = ".shard-"

Entries = dict[str, dict[str, Tensor]]
"""Tensors by name, by top-level entry."""


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself."""

    path: Path
    about: dict[str, Any]
    """What the writer noted: step, epoch, metric, …"""
    files: dict[str, dict[str, Any]]
    """Size in bytes and SHA-256 of each file."""


def save_checkpoint(path: Path, tree: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> Manifest:
    """Write ``tree`` as the folder ``path``, which appears complete or not at all; a checkpoint there is replaced then.

    Args:
        tree: nested dicts and lists of tensors and JSON values; keys are strings.
        about: plain values noted in the manifest, readable without reading the checkpoint.

    Returns:
        The manifest, verified against what is on disk.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
        TypeError: tensors are spread over ranks, which then must all save (``sharded_checkpoint.save_together``).
    """
    plain, whole, parts = split_entries(tree)
    if parts:
        raise TypeError(f"tensors of {', '.join(parts)} are spread over ranks: call save_together on every rank")
    part = partial_path(path)
    try:
        begin(part)
        files = write_tensors(part, {f"{entry}.safetensors": tensors for entry, tensors in whole.items()})
        finish(path, part, plain, files, about or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error}; earlier checkpoints are untouched") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return verify_checkpoint(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint after verifying every byte; tensors come on the CPU, whole also where ranks saved parts.

    Of one that was being replaced when its writer was killed, the earlier is read, which stands beside it until then.

    Raises:
        CheckpointError: incomplete, damaged, or of another format; names the file.
    """
    path = path if path.exists() or not _replaced(path).exists() else _replaced(path)
    manifest = verify_checkpoint(path)
    whole: dict[str, dict[str, Tensor]] = {}
    parts: dict[str, list[dict[str, Tensor]]] = {}
    for name in sorted(name for name in manifest.files if name.endswith(".safetensors")):
        entry, shard, _ = Path(name).stem.partition(SHARD)
        if shard:
            parts.setdefault(entry, []).append(load_file(path / name))
        else:
            whole[entry] = load_file(path / name)
    tree: dict[str, Any] = json.loads((path / STATE).read_text())
    return {entry: join(value, whole.get(entry, {}), parts.get(entry, [])) for entry, value in tree.items()}


def verify_checkpoint(path: Path) -> Manifest:
    """Hold every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: as ``load_checkpoint``.
    """
    manifest = read_manifest(path)
    verify_files(path, manifest.files)
    return manifest


def verify_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold some of a checkpoint's files against their sizes and SHA-256.

    Raises:
        CheckpointError: as ``load_checkpoint``.
    """
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is incomplete: {name} is missing")
        try:
            size, digest = file.stat().st_size, _sha256(file)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {name}: {error}") from error
        if size != expected["bytes"]:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} has {size} bytes of {expected['bytes']}")
        if digest != expected["sha256"]:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} does not match its SHA-256")


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, held against its own SHA-256 but not against the other files.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format.
    """
    try:
        text = (path / MANIFEST).read_text()
        raw = json.loads(text)
        manifest = Manifest(path, raw["about"], raw["files"])
        found = raw["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no complete checkpoint: {MANIFEST} is missing") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {MANIFEST}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} does not parse ({error})") from error
    if found != FORMAT:
        raise CheckpointError(f"checkpoint {path} is of format {found}; this prelora reads format {FORMAT}")
    if text != _manifest_text(manifest.about, manifest.files):
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} does not match its SHA-256")
    return manifest


def checkpoint_path(root: Path, step: int, evaluating: bool = False) -> Path:
    """Where the checkpoint after ``step`` steps stands under ``root``; ``evaluating``: an evaluation is still due."""
    return root / f"step-{step:09d}{'-evaluating' if evaluating else ''}"


def checkpoints(root: Path) -> list[Path]:
    """Folders under ``root`` that carry a checkpoint's name, newest first; unverified."""
    matches = [(NAME.fullmatch(path.name), path) for path in root.glob("step-*") if path.is_dir()]
    found = [((int(match[1]), match[2] is None), path) for match, path in matches if match]
    return [path for _, path in sorted(found, reverse=True)]


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what was wrong with those passed over."""
    faults = []
    for path in checkpoints(root):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            faults.append(str(error))
        else:
            return path, faults
    return None, faults


def prune(root: Path, keep_last: int, verified: Manifest | None = None) -> list[Path]:
    """Remove all but the newest ``keep_last`` checkpoints and the one with the best ``about["metric"]``.

    Nothing goes before the newest verifies: call it with ``keep_last`` at least 1.

    Args:
        verified: what ``save_checkpoint`` just returned; it is not read once more.

    Returns:
        What was removed.

    Raises:
        CheckpointError: the newest is damaged (nothing was removed then), or one could not be removed.
    """
    found = checkpoints(root)
    if not found or keep_last < 1:
        return []
    if verified is None or verified.path != found[0]:
        verify_checkpoint(found[0])
    kept = {*found[:keep_last], best(root)}
    removed = [path for path in found if path not in kept]
    for path in removed:
        # Out of sight first: a kill in the middle must not leave half a checkpoint under a checkpoint's name.
        try:
            shutil.rmtree(path.rename(path.with_name(f"{path.name}.part-{os.getpid()}")))
        except OSError as error:
            raise CheckpointError(f"cannot remove checkpoint {path}: {error}") from error
    return removed


def set_aside_newer(root: Path, chosen: Path) -> list[Path]:
    """Rename the checkpoints newer than ``chosen``, all damaged, so that none stands for the newest any more.

    Returns:
        Their new paths, ending in ``.damaged``.
    """
    aside = []
    for path in itertools.takewhile(lambda path: path != chosen, checkpoints(root)):
        target = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(target, ignore_errors=True)
        aside.append(path.rename(target))
    return aside


def best(root: Path) -> Path | None:
    """The checkpoint with the largest ``about["metric"]``, the newest of equals; None if none has one."""
    scored = []
    for path in checkpoints(root):
        try:
            metric = read_manifest(path).about.get("metric")
        except CheckpointError:
            continue
        if metric is not None:
            scored.append((metric, path))
    return max(scored)[1] if scored else None


def sweep(root: Path) -> list[Path]:
    """Remove what killed writers left behind; for the one process that owns ``root``."""
    left = sorted(root.glob("step-*.part-*"))
    for path in left:
        shutil.rmtree(path)
    return left


def partial_path(path: Path) -> Path:
    """Where the checkpoint ``path`` is written by this process before it gets its name."""
    return path.with_name(f"{path.name}.part-{os.getpid()}")


def split_entries(tree: Mapping[str, Any], main: bool = True) -> tuple[dict[str, Any], Entries, Entries]:
    """``tree`` as JSON, and by entry its plain tensors (``main`` alone needs them) and this rank's parts of others."""
    plain: dict[str, Any] = {}
    whole: Entries = {}
    parts: Entries = {}
    for entry, value in tree.items():
        whole[entry], parts[entry] = {}, {}
        plain[entry] = split(value, whole[entry] if main else None, parts[entry])
    return (
        plain,
        {entry: tensors for entry, tensors in whole.items() if tensors},
        {entry: tensors for entry, tensors in parts.items() if tensors},
    )


def begin(part: Path) -> None:
    """Make the folder ``part``."""
    part.parent.mkdir(parents=True, exist_ok=True)
    part.mkdir()


def write_tensors(part: Path, tensors: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Write each file's tensors; returns the files' sizes and SHA-256, for the manifest."""
    for name, named in tensors.items():
        save_file(named, part / name)
    return {name: _facts(part / name) for name in tensors}


def finish(
    path: Path, part: Path, plain: Mapping[str, Any], files: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write what is left, the manifest last, and give the folder its name, in place of what has it."""
    # JSON's NaN and Infinity are Python's own extension; both ends are Python.
    (part / STATE).write_text(json.dumps(plain))
    (part / MANIFEST).write_text(_manifest_text(about, {STATE: _facts(part / STATE), **files}))
    _sync(part / MANIFEST)
    _sync(part)
    take_place(part, path, _replaced(path))
    _sync(path.parent)
    shutil.rmtree(_replaced(path), ignore_errors=True)


def _replaced(path: Path) -> Path:
    """Where a checkpoint waits while another takes its place."""
    return path.with_name(f"{path.name}.replaced")


def _facts(file: Path) -> dict[str, Any]:
    _sync(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _manifest_text(about: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """The one text of a manifest: a single bit that differs from it is damage."""
    body = {"format": FORMAT, "about": about, "files": files}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(file):
        digest.update(block)
    return digest.hexdigest()


def _blocks(file: Path, size: int = 1 << 22) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(size):
            yield block


def _sync(path: Path) -> None:
    """Hand ``path`` to the disk, so that a rename never becomes durable before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
