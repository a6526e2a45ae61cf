"""Many images in few archives: an index made once by walking their headers, each image read by its offset."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prelora.files import replacing

NUMBERS = ("archive", "offset", "size", "label")


class Entry(NamedTuple):
    """Where one image lies in its archive."""

    offset: int
    size: int
    label: int
    """As it is written there."""
    key: str


Walk = Callable[[Path], Iterator[Entry]]


@dataclass(frozen=True)
class Index:
    """All entries of a split: integers [N], and N names."""

    archive: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    key: list[str]


class Shards:
    """See ``Storage``: classes are the labels that occur, in numerical order."""

    def __init__(
        self, root: Path, split: str, archives: list[Path], walk: Walk, payload: Callable[[bytes], bytes]
    ) -> None:
        """Args:
        root: the data's path, where the index is kept if it can be written.
        split: the split's name on disk.
        archives: in the order of the samples.
        walk: the entries of an archive; DataError if it is damaged.
        payload: the encoded image in an entry's bytes; UnusableError if they are damaged.
        """
        self.root = root
        self.archives = [path.relative_to(root).as_posix() for path in archives]
        self._payload = payload
        self._index = _kept_index(root / f"prelora-index-{split}.safetensors", archives, walk)
        values, labels = np.unique(self._index.label, return_inverse=True)
        self.classes = tuple(map(str, values.tolist()))
        self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """See ``Storage.name``."""
        return f"{self.archives[self._index.archive[index]]}:{self._index.key[index]}"

    def read(self, index: int) -> bytes:
        """See ``Storage.read``."""
        with open(self.root / self.archives[self._index.archive[index]], "rb") as file:
            file.seek(self._index.offset[index])
            return self._payload(file.read(self._index.size[index]))


def _kept_index(kept: Path, archives: list[Path], walk: Walk) -> Index:
    """The index kept from earlier if it is of these archives as they are now; else a new one, kept if it can be."""
    facts = [(path.name, path.stat()) for path in archives]
    state = json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts])
    # An index that cannot be read is as good as none.
    with contextlib.suppress(OSError, SafetensorError, ValueError), safe_open(kept, framework="numpy") as file:
        if (file.metadata() or {}).get("archives") == state:
            return Index(
                **{name: file.get_tensor(name) for name in NUMBERS}, key=json.loads(bytes(file.get_tensor("key")))
            )
    index = _walked(archives, walk)
    # Where the data cannot be written to, the index is made anew by each process.
    with contextlib.suppress(OSError, SafetensorError):
        _write(kept, index, state)
    return index


def _walked(archives: list[Path], walk: Walk) -> Index:
    entries = [list(walk(path)) for path in archives]
    every = [entry for group in entries for entry in group]
    return Index(
        archive=np.repeat(np.arange(len(archives), dtype=np.int32), [len(group) for group in entries]),
        offset=np.array([entry.offset for entry in every], dtype=np.int64),
        size=np.array([entry.size for entry in every], dtype=np.int64),
        label=np.array([entry.label for entry in every], dtype=np.int64),
        key=[entry.key for entry in every],
    )


def _write(kept: Path, index: Index, state: str) -> None:
    """Args: state: of the archives, by which the index is known to be theirs."""
    key = np.frombuffer(json.dumps(index.key).encode(), dtype=np.uint8)
    with replacing(kept) as part:
        save_file({name: getattr(index, name) for name in NUMBERS} | {"key": key}, part, {"archives": state})
