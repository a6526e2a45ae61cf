"""WebDataset's tars: members ``key.jpg`` (or jpeg, png) and ``key.cls``, the label as decimal text."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from prelora.data.shards import Entry
from prelora.errors import DataError

IMAGES = ("jpg", "jpeg", "png")


def walk(path: Path) -> Iterator[Entry]:
    """The images of an archive with their labels, in the order of the images.

    Raises:
        DataError: the tar is damaged or cut, or an image has no label, or a label that is no number.
    """
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                key, kind = split_name(member.name)
                if kind in IMAGES:
                    images[key] = member
                elif kind == "cls":
                    labels[key] = int(archive.extractfile(member).read())  # type: ignore[union-attr]  # it is a file
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be indexed: {error}") from error
    size = path.stat().st_size
    for key, member in images.items():
        if member.offset_data + member.size > size:
            raise DataError(f"{path} is cut: {member.name} would end at byte {member.offset_data + member.size}")
        if key not in labels:
            raise DataError(f"{path} has no {key}.cls beside {member.name}")
        yield Entry(member.offset_data, member.size, labels[key], member.name)


def split_name(name: str) -> tuple[str, str]:
    """A member's key, up to the first dot of its last part, and its kind, what follows."""
    folder, slash, file = name.rpartition("/")
    key, _, kind = file.partition(".")
    return f"{folder}{slash}{key}", kind.lower()


def payload(data: bytes) -> bytes:
    """A member's bytes are the image."""
    return data
