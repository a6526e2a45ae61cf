"""What ``pytest bench/ --benchmark-json out.json`` wrote, as one table and one picture.

    python -m bench.report out.json [more.json …] [--output DIR] [--all-parts]

Prints the table; with ``--output`` also writes ``bench.md``, ``bench.png`` and ``bench.svg``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows import Row
from bench.table import markdown_table, ratio
from prelora.files import replace_text

LEGEND = (
    "Times are medians of interleaved rounds, with quartiles. ÷ peer and ÷ bound are medians of ratios taken within "
    "each round, ± half the distance between their quartiles: below 1 is faster than the peer, 1 is the bound itself. "
    "Ours are bold."
)


class ReportError(Exception):
    """A file cannot be reported; the message says why."""


@dataclass(frozen=True)
class Session:
    """What one file holds."""

    path: Path
    rows: list[Row]
    environment: dict[str, Any]
    tests: dict[str, str]
    """How each operator's tests ended, before anything of it was measured."""


def load(path: Path) -> Session:
    """Read one file.

    Raises:
        ReportError: not such a file, nothing in it, or figures whose operators' tests were not green.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        environment = saved["machine_info"]["environment"]
        cells = [benchmark["extra_info"] for benchmark in saved["benchmarks"]]
        rows = [Row.from_dict(row) for cell in cells for row in cell["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is not what `pytest bench/ --benchmark-json` writes: {error!r}") from error
    if not rows:
        raise ReportError(f"{path} holds no figures")
    if not all(cell.get("tests") for cell in cells):
        raise ReportError(f"{path} holds figures without a record of green operator tests: they are not reported")
    tests = {operator: ended for cell in cells for operator, ended in cell["tests"].items()}
    return Session(path, rows, environment, tests)


def markdown(sessions: Sequence[Session], all_parts: bool = False) -> str:
    """Headline, table, legend and conditions."""
    rows = [row for session in sessions for row in session.rows]
    shown = [row for row in rows if all_parts or row.whole]
    lines = ["# PreLoRA beside its peers and its bounds", "", *headline(rows), "", markdown_table(shown), "", LEGEND]
    for session in sessions:
        lines += ["", f"## {session.path.name}: measured with", "", *conditions(session)]
    return "\n".join([*lines, ""])


def headline(rows: Sequence[Row]) -> list[str]:
    """What the training steps come to, in ratios alone, and which cells are not to be trusted."""
    lines = []
    for row in rows:
        if row.suite == "train_step" and row.role == "ours" and row.value is not None and not row.disturbed:
            peers = ", ".join(f"{ratio(spread)} of {name}" for name, spread in row.peers.items())
            bound = f"; {ratio(row.bound)} of its bound" if row.bound else ""
            lines.append(f"- {row.cell}, {row.variant}: {peers}{bound}" + (f" ({row.note})" if row.note else ""))
    lines = lines or ["No training steps were measured undisturbed."]
    disturbed = {f"{row.suite} {row.cell}": row.others or 0.0 for row in rows if row.disturbed and row.unit == "ms"}
    if disturbed:
        named = ", ".join(f"{name} ({share:.0%})" for name, share in disturbed.items())
        lines += ["", f"**Not to be trusted**, since other processes took so much of the cores: {named}."]
    return lines


def conditions(session: Session) -> list[str]:
    """The environment and the tests that were run before, one item a line."""
    lines = []
    for name, value in session.environment.items():
        if value not in (None, {}, []):
            text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            lines.append(f"- {name.replace('_', ' ')}: {text}")
    return [*lines, *(f"- tests of {operator}: {ended}" for operator, ended in session.tests.items())]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the files; 2 if the input is not to be reported."""
    from bench.picture import draw

    parser = argparse.ArgumentParser(prog="python -m bench.report", description="One table and one picture.")
    parser.add_argument("json", type=Path, nargs="+", help="what --benchmark-json wrote")
    parser.add_argument("--output", type=Path, help="folder for bench.md, bench.png and bench.svg")
    parser.add_argument("--all-parts", action="store_true", help="also rows of forward and backward alone")
    options = parser.parse_args(arguments)
    try:
        sessions = [load(path) for path in options.json]
    except ReportError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    text = markdown(sessions, options.all_parts)
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        replace_text(options.output / "bench.md", text)
        figure = draw([row for session in sessions for row in session.rows])
        for suffix in ("png", "svg"):
            figure.savefig(options.output / f"bench.{suffix}", dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
