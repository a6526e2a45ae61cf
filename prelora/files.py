"""Write a file, or a folder of files, whole or not at all."""

import contextlib
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes ``path``'s place in one step when the block ends; after an error it stays as it was.

    Several processes may do so at a time: each writes a file of its own, and the last to finish stays.
    """
    part = path.with_name(f"{path.name}.part-{uuid.uuid4().hex}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path, names: Collection[str]) -> Iterator[Path]:
    """A new folder that takes ``path``'s place when the block ends; after an error what was there is as it was.

    Args:
        names: the files that such a folder holds: one that holds any other is not replaced.

    Raises:
        FileExistsError: ``path`` is a file, or a folder with other files in it.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: give a folder")
    if path.exists() and (others := sorted({file.name for file in path.iterdir()} - set(names))):
        raise FileExistsError(f"{path} holds other files, as {others[0]}: give another folder, it would be replaced")
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = (path.with_name(f"{path.name}.{kind}-{uuid.uuid4().hex}") for kind in ("part", "old"))
    try:
        part.mkdir()
        yield part
        take_place(part, path, old)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def take_place(part: Path, path: Path, old: Path) -> None:
    """Give the folder ``part`` the name ``path``; what has it becomes ``old``, or has it again after an error.

    A kill between the two renames leaves ``old`` alone: who is to survive that looks there, too.
    """
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        part.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise


def replace_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step, or leave it as it was.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
