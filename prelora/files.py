"""Write a file whole or not at all."""

import contextlib
import uuid
from collections.abc import Iterator
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


def replace_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step, or leave it as it was.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
