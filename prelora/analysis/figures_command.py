"""``prelora figures``: every figure and table of collected results, for each data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from prelora.analysis import results_cost_figures, results_differences, results_figures, results_phase_figure
from prelora.analysis.replay_figure import save_grid
from prelora.analysis.results import MissingDataError, Results, load_results
from prelora.analysis.results_table import table1
from prelora.files import replace_text

FIGURES: tuple[Callable[[Results], Figure], ...] = (
    results_figures.fig1,
    results_figures.fig3,
    results_figures.fig4,
    results_figures.fig5,
    results_figures.fig6,
    results_phase_figure.fig7,
    results_figures.ranks,
    results_cost_figures.accuracy_wall_clock,
    results_cost_figures.flops_loss,
    results_cost_figures.speedup_ceiling,
    results_differences.controls,
    results_differences.alternatives,
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
        lines += map(str, save_grid(figure, out / draw.__name__))
    table = out / "table1.md"
    try:
        replace_text(table, table1(results))
        lines.append(str(table))
    except MissingDataError as error:
        lines.append(f"{results.name}: table1 left out: {error}")
    return lines
