"""A CSV file into frozen dataclasses; what does not fit is named by file, line and column."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Row = TypeVar("Row")


def read_rows(path: Path, kind: type[Row], key: Sequence[str]) -> list[Row]:
    """Every line of ``path`` as a ``kind``, in the file's order; columns without a field of that name are passed over.

    Args:
        path: UTF-8, with a header.
        kind: a dataclass with fields of ``str``, ``int``, ``float``, ``int | None`` and ``Literal``. A field with a
            default may lack its column. An empty cell is NaN in a ``float`` and None in an ``int | None``.
        key: the fields by which no two lines may agree.

    Raises:
        ValueError: a column is missing, a line is too short or too long, a cell cannot be read, a line says the same
            as an earlier one, or ``kind`` refuses its values.
    """
    hints, defaults = get_type_hints(kind), _fields_with_default(kind)
    rows: list[Row] = []
    seen: dict[tuple[Any, ...], int] = {}
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.reader(stream)
        header = next(reader, [])
        if not header and next(reader, None) is None:
            return []  # a table that had no row to take its columns from
        columns = {name: header.index(name) for name in hints if name in header}
        for name in hints:
            if name not in columns and name not in defaults:
                raise ValueError(f"{path}: line 1: no column {name!r}: there are {', '.join(header) or 'none'}")
        for cells in reader:
            where = f"{path}: line {reader.line_num}"
            if len(cells) != len(header):
                raise ValueError(f"{where}: {len(cells)} cells: accepted are {len(header)}, one for each column")
            values = {
                name: _read(cells[at].strip(), hints[name], f"{where}, column {name}") for name, at in columns.items()
            }
            identity = tuple(values[name] for name in key)
            if identity in seen:
                shown = ", ".join(f"{name} {values[name]}" for name in key)
                raise ValueError(f"{where}: {shown} stands in line {seen[identity]} already: accepted is once")
            seen[identity] = reader.line_num
            try:
                rows.append(kind(**values))
            except ValueError as error:
                raise ValueError(f"{where}, column {error}") from None
    return rows


def _fields_with_default(kind: type) -> set[str]:
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind)
    return {field.name for field in fields if field.default is not dataclasses.MISSING}


def _read(text: str, hint: Any, where: str) -> Any:
    if not text and hint is float:
        return math.nan
    if not text and isinstance(hint, UnionType):
        return None
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise ValueError(f"{where}: {text!r}: accepted are {', '.join(get_args(hint))}")
        return text
    if hint is str:
        if not text:
            raise ValueError(f"{where}: the cell is empty: accepted is a text")
        return text
    kind, wanted = (float, "a number, or nothing") if hint is float else (int, "an integer")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r}: accepted is {wanted}") from None
