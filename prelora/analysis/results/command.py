"""``prelora figures``: every figure and table of collected results, for each data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from prelora.analysis.drawing import save_figure
from prelora.analysis.results import cost_figures, differences, figures, phase_figure
from prelora.analysis.results.loading import MissingDataError, Results, load_results
from prelora.analysis.results.table import table1
from prelora.files import replace_text

FIGURES: tuple[Callable[[Results], Figure], ...] = (
    figures.fig1,
    figures.fig3,
    figures.fig4,
    figures.fig5,
    figures.fig6,
    phase_figure.fig7,
    figures.ranks,
    cost_figures.accuracy_wall_clock,
    cost_figures.flops_loss,
    cost_figures.speedup_ceiling,
    differences.controls,
    differences.alternatives,
)
"""Each is written under its function's name."""


def write_figures(results: Path, out: Path | None = None) -> list[str]:
    """Draw what each data set's folder in ``results`` has data for; returns a line for each file or omission.

    Args:
        results: holds a folder with ``runs.csv`` for each data set; other folders are passed over.
        out: a data set's files go to ``out/NAME`` (default: its folder's ``figures``).

    Raises:
        ValueError: there is no data set, or one of its files does not say what it should.
        OSError: a file cannot be read or written.
    """
    folders = sorted(path.parent for path in results.glob("*/runs.csv"))
    if not folders:
        raise ValueError(
            f"{results}: no data set: accepted is a folder that holds NAME/runs.csv, one for each data set"
        )
    lines: list[str] = []
    for folder in folders:
        lines += _write_dataset(load_results(folder), folder / "figures" if out is None else out / folder.name)
    return lines


def _write_dataset(results: Results, out: Path) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for draw in FIGURES:
        try:
            figure = draw(results)
        except MissingDataError as error:
            lines.append(f"{results.name}: {draw.__name__} left out: {error}")
            continue
        lines += map(str, save_figure(figure, out / draw.__name__))
    table = out / "table1.md"
    try:
        replace_text(table, table1(results))
        lines.append(str(table))
    except MissingDataError as error:
        lines.append(f"{results.name}: table1 left out: {error}")
    return lines
