"""Checkpoints as folders: safetensors and JSON under a SHA-256 manifest, written whole or not at all.

A checkpoint is a nested dict of tensors and plain values. Each top-level entry that holds tensors becomes
``<entry>.safetensors``, everything else goes into ``state.json``; ``manifest.json`` is written last and verified
before any tensor is read. No pickle is ever read or written.
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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prelora.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"step-(\d{9})(-evaluating)?")
TENSOR = "$tensor"


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself."""

    path: Path
    about: dict[str, Any]
    """What the writer noted: step, epoch, metric, …"""
    files: dict[str, dict[str, Any]]
    """Size in bytes and SHA-256 of each file."""


def save_checkpoint(path: Path, tree: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> Manifest:
    """Write ``tree`` as the folder ``path``, which appears complete or not at all.

    Args:
        tree: nested dicts and lists of tensors and JSON values; keys are strings.
        about: plain values noted in the manifest, readable without reading the checkpoint.

    Returns:
        The manifest, verified against what is on disk.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    damaged = False
    if path.is_dir():
        try:
            return verify_checkpoint(path)  # a resumed run comes by the same step again, with the same bits
        except CheckpointError:
            damaged = True
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        if damaged:
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        _write(part, tree, dict(about or {}))
        part.rename(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error}; earlier checkpoints are untouched") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return verify_checkpoint(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint after verifying every byte; tensors come on the CPU.

    Raises:
        CheckpointError: incomplete, damaged, or of another format; names the file.
    """
    manifest = verify_checkpoint(path)
    tensors = {Path(name).stem: load_file(path / name) for name in manifest.files if name.endswith(".safetensors")}
    tree: dict[str, Any] = json.loads((path / STATE).read_text())
    return {entry: _join(value, tensors.get(entry, {})) for entry, value in tree.items()}


def verify_checkpoint(path: Path) -> Manifest:
    """Hold every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: as ``load_checkpoint``.
    """
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
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
    return manifest


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


def _write(folder: Path, tree: Mapping[str, Any], about: dict[str, Any]) -> None:
    plain = {}
    names = [STATE]
    for entry, value in tree.items():
        tensors: dict[str, Tensor] = {}
        plain[entry] = _split(value, (), tensors)
        if tensors:
            names.append(f"{entry}.safetensors")
            save_file(tensors, folder / names[-1])
    # JSON's NaN and Infinity are Python's own extension; both ends are Python.
    (folder / STATE).write_text(json.dumps(plain))
    for name in names:
        _sync(folder / name)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}
    (folder / MANIFEST).write_text(_manifest_text(about, files))
    _sync(folder / MANIFEST)
    _sync(folder)


def _manifest_text(about: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """The one text of a manifest: a single bit that differs from it is damage."""
    body = {"format": FORMAT, "about": about, "files": files}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1)


def _split(value: Any, keys: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """``value`` with every tensor moved to ``tensors`` and its key left in its place."""
    if isinstance(value, Tensor):
        name = "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)
        # A copy owns its storage: safetensors refuses tensors that share one.
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _split(item, (*keys, key), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(item, (*keys, str(i)), tensors) for i, item in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _join(item, tensors) for key, item in value.items()}
    return [_join(item, tensors) for item in value] if isinstance(value, list) else value


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
