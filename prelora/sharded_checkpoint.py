"""Checkpoints written by all ranks together: one call whether tensors are plain, replicated or spread over ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from prelora import distributed
from prelora.checkpoint import (
    SHARD,
    STATE,
    Manifest,
    begin,
    finish,
    partial_path,
    read_manifest,
    split_entries,
    verify_files,
    write_tensors,
)
from prelora.errors import CheckpointError
from prelora.shards import is_shard, shard_index

Result = TypeVar("Result")


def save_together(path: Path, tree: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> Manifest:
    """Write ``tree`` as the folder ``path``, as ``save_checkpoint`` does; a collective.

    Rank 0 writes what is plain or the same everywhere. Of tensors that are spread over ranks (DTensors) each rank
    writes and hashes its own part, on a file system that all share. ``load_checkpoint`` reads both.

    Args:
        path: as in ``save_checkpoint``.
        tree: as there; the same on every rank, but for the parts.
        about: as there; the same on every rank.

    Returns:
        The manifest, verified against what is on disk: by each rank for its own files.

    Raises:
        CheckpointError: a rank could not write; raised on all of them alike, and earlier checkpoints are untouched.
    """
    main = distributed.rank() == 0
    plain, whole, parts = split_entries(tree, main)
    own = {f"{entry}{SHARD}{_index(tree):05d}.safetensors": tensors for entry, tensors in parts.items()}
    own |= {f"{entry}.safetensors": tensors for entry, tensors in whole.items()}
    part = path.with_name(_on_every_rank(path, lambda: _begin(path) if main else "")[0])
    try:
        found = _on_every_rank(path, lambda: write_tensors(part, own))
        files = {name: facts for mine in found for name, facts in mine.items()}
        _on_every_rank(path, lambda: finish(path, part, plain, files, about or {}) if main else None)
    finally:
        if main:
            shutil.rmtree(part, ignore_errors=True)
    _on_every_rank(path, lambda: _verify_own(path, own, main))
    return read_manifest(path)


def _begin(path: Path) -> str:
    part = partial_path(path)
    begin(part)
    return part.name


def _verify_own(path: Path, own: Mapping[str, Any], main: bool) -> None:
    files = read_manifest(path).files
    verify_files(path, {name: files[name] for name in files if name in own or (main and name == STATE)})


def _on_every_rank(path: Path, work: Callable[[], Result]) -> list[Result]:
    """What ``work`` gave on each rank, through JSON; or, if one failed, the same error on all."""
    result, failure = None, None
    try:
        result = work()
    except (OSError, SafetensorError, CheckpointError) as error:
        failure = f"rank {distributed.rank()}: {error}"
    answers = distributed.gather_json([result, failure])
    failures = [failure for _, failure in answers if failure is not None]
    if failures:
        raise CheckpointError(f"cannot write checkpoint {path}: {failures[0]}; earlier checkpoints are untouched")
    return [result for result, _ in answers]


def _index(tree: Any) -> int:
    """Which shard of the tensors in ``tree`` this rank holds."""
    if is_shard(tree):
        return shard_index(tree)[0]
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return max((_index(item) for item in items), default=0)
