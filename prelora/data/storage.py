"""Where encoded images lie: one interface over folders, tars and TFRecords, and the one place that tells them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

SPLITS = {"train": ("train",), "val": ("val", "validation")}
"""What the two splits may be called on disk."""
LAYOUTS = "train/<class>/*, train-*.tar, train/*.tar or train-*-of-* (TFRecords), and val alike"


class UnusableError(Exception):
    """One sample cannot be used; the message is the reason, without the sample's name."""


class Storage(Protocol):
    """The encoded images of one split, in an order that is the same on every machine."""

    classes: tuple[str, ...]
    labels: np.ndarray
    """[N] int64, indices into ``classes``."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The file, relative to the data's path; of an archive ``archive:member``."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            OSError: it cannot be read.
            UnusableError: what was read is not what was written.
        """
        ...


def read_sample(storage: Storage, index: int) -> bytes:
    """The encoded image.

    Raises:
        UnusableError: it cannot be read, or what was read is not what was written.
    """
    try:
        return storage.read(index)
    except OSError as error:
        raise UnusableError(error.strerror or str(error)) from error


def open_storage(path: Path, split: str, listed: frozenset[str] = frozenset()) -> Storage:
    """The split of the images at ``path``, in whichever layout it is.

    Args:
        split: "train" or "val".
        listed: names that a manifest knows of. Files of a folder that are among them keep their place in the order
            when they are missing.

    Raises:
        ValueError: the split is there in no layout, in more than one, or empty.
        DataError: an archive is damaged.
    """
    from prelora.data import image_folder, tar, tfrecord
    from prelora.data.shards import Shards

    found: list[Storage] = []
    for folder in (path / name for name in SPLITS[split]):
        if folder.is_dir() and image_folder.class_names(folder):
            found.append(image_folder.ImageFolder(path, folder.name, listed))
        if tars := sorted([*path.glob(f"{folder.name}-*.tar"), *folder.glob("*.tar")]):
            found.append(Shards(path, folder.name, tars, tar.walk, tar.payload))
        if records := sorted(path.glob(f"{folder.name}-*-of-*")):
            found.append(Shards(path, folder.name, records, tfrecord.walk, tfrecord.payload))
    if len(found) != 1:
        what = "more than one layout of" if found else "no"
        raise ValueError(f"{path} has {what} split {split!r}: accepted are {LAYOUTS}")
    if not len(found[0]):
        raise ValueError(f"{path} has no images in split {split!r}: accepted are {LAYOUTS}")
    return found[0]


def open_splits(path: Path, listed: frozenset[str] = frozenset()) -> dict[str, Storage]:
    """Both splits, of the same classes.

    Raises:
        ValueError, DataError: as ``open_storage``; also for splits of different classes.
    """
    splits = {split: open_storage(path, split, listed) for split in SPLITS}
    train, val = splits["train"].classes, splits["val"].classes
    if train != val:
        odd = sorted(set(train) ^ set(val))
        raise ValueError(f"train and val of {path} hold different classes: {', '.join(odd[:4])}")
    return splits
