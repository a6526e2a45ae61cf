"""Rows as text: a plain table for the terminal, Markdown for a file."""

from __future__ import annotations

from collections.abc import Sequence

from bench.rows import Row, Spread

COLUMNS = ("suite", "cell", "part", "variant", "median (quartiles)", "÷ bound", "÷ peer")


def markdown_table(rows: Sequence[Row]) -> str:
    """All columns; aligned, so that it reads well as it stands."""
    cells = [[_bold(text, row) for text in (row.suite, row.cell, *_figures(row))] for row in rows]
    lines = _aligned([list(COLUMNS), *cells])
    widths = [max(3, len(cell)) for cell in lines[0]]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def plain_table(rows: Sequence[Row]) -> str:
    """The rows of one cell, without its name."""
    lines = _aligned([list(COLUMNS[2:]), *(_figures(row) for row in rows)])
    return "\n".join("  " + "  ".join(line).rstrip() for line in lines)


def number(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(spread: Spread) -> str:
    """A ratio and half the distance between its quartiles; alone, if there is but one."""
    return f"{spread.median:.2f}" + (f" ± {spread.half:.2f}" if spread.high > spread.low else "")


def _figures(row: Row) -> list[str]:
    if row.value is None:
        return [row.part, row.variant, f"not run: {row.not_run}", "", ""]
    value = f"{number(row.value.median)} {row.unit}"
    if row.rounds > 1:
        value += f" ({number(row.value.low)}–{number(row.value.high)})"
    shown = row.peers if row.role == "ours" else {}
    if row.disturbed and row.unit == "ms":
        value += f", others {row.others:.0%}"
    peers = ", ".join(f"{name} {ratio(spread)}" for name, spread in shown.items())
    items = " + ".join(f"{name} {number(size)}" for name, size in row.items.items())
    said = "; ".join(text for text in (peers, items, row.note) if text)
    return [row.part, row.variant, value, ratio(row.bound) if row.bound else "", said]


def _bold(text: str, row: Row) -> str:
    """Ours stand out; a vertical bar would end the cell."""
    text = text.replace("|", "\\|")
    return f"**{text}**" if row.role == "ours" and text == row.variant else text


def _aligned(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Every column as wide as its widest cell, but for the last and for what was not run."""
    columns = len(lines[0])
    widths = [
        max(len(line[place]) for line in lines if not line[place].startswith("not run")) for place in range(columns - 1)
    ]
    return [[*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]] for line in lines]
