"""What every file of the data was when it was checked, and whether it still is that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prelora.data.storage import Storage, UnusableError
from prelora.files import replace_text

NAME = "prelora-manifest.json"
FORMAT = 1


class Facts(NamedTuple):
    """Of one file."""

    size: int
    """In bytes."""
    sha256: bytes
    problem: str | None
    """Why it cannot be used; None: it can."""


def write(path: Path, lines: Mapping[str, list[dict[str, Any]]]) -> None:
    """Replace the manifest at ``path``.

    Args:
        lines: of each split, name, sha256, bytes, width, height and problem (null: none) of each file.

    Raises:
        OSError: it cannot be written.
    """
    splits = ",\n".join(
        f'"{split}": [\n' + ",\n".join(json.dumps(line) for line in files) + "\n]" for split, files in lines.items()
    )
    replace_text(path, f'{{"format": {FORMAT}, "splits": {{\n{splits}\n}}}}\n')


def read(path: Path) -> dict[str, dict[str, Facts]] | None:
    """Split → name → facts; None if there is no manifest.

    Raises:
        ValueError: it is no manifest, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, accepted is {FORMAT}")
        return {
            split: {
                line["name"]: Facts(line["bytes"], bytes.fromhex(line["sha256"]), line["problem"]) for line in files
            }
            for split, files in content["splits"].items()
        }
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of `prelora data check`: {error}") from error


def facts_of(storage: Storage, known: Mapping[str, Facts], path: Path) -> list[Facts]:
    """The facts of a split's samples, in their order.

    Raises:
        ValueError: the manifest lists other files.
    """
    names = [storage.name(index) for index in range(len(storage))]
    odd = sorted(known.keys() ^ set(names))
    if odd:
        where = "there" if odd[0] in known else "here"
        raise ValueError(
            f"{path} and the data differ in {len(odd)} files, of which {odd[0]} is only {where}: "
            f"run `prelora data check {path.parent}` again"
        )
    return [known[name] for name in names]


def verify(data: bytes, known: Facts) -> None:
    """Raises:
    UnusableError: these are not the bytes that were checked.
    """
    if len(data) != known.size:
        raise UnusableError(f"{len(data)} bytes, the manifest says {known.size}")
    if hashlib.sha256(data).digest() != known.sha256:
        raise UnusableError("its SHA-256 is not the manifest's")
