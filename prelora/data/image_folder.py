"""Images as files: ``<split>/<class>/**/*``, the layout of torchvision's ImageFolder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFolder:
    """See ``Storage``: classes are the folders' names, both they and the files in sorted order."""

    def __init__(self, root: Path, split: str, listed: frozenset[str] = frozenset()) -> None:
        """Args: root: the data's path; split: the folder's name; listed: names to keep a place for."""
        names = _files(root, split) | {name for name in listed if name.startswith(f"{split}/")}
        self.root = root
        self.names = sorted(names, key=lambda name: name.split("/"))
        folders = [name.split("/")[1] for name in self.names]
        # A class whose files are all gone is still there.
        self.classes = tuple(sorted(set(folders) | set(class_names(root / split))))
        number = {name: index for index, name in enumerate(self.classes)}
        self.labels = np.array([number[folder] for folder in folders], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """See ``Storage.name``."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """See ``Storage.read``."""
        return (self.root / self.names[index]).read_bytes()


def class_names(folder: Path) -> list[str]:
    """The folders in ``folder``, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _files(root: Path, split: str) -> set[str]:
    found: set[str] = set()
    for name in class_names(root / split):
        for folder, _, files in os.walk(root / split / name, followlinks=True):
            inside = Path(folder).relative_to(root).as_posix()
            found.update(f"{inside}/{file}" for file in files if file.lower().endswith(SUFFIXES))
    return found
