"""Write a file whole or not at all."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step, or leave it as it was.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
