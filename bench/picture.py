"""One picture of all suites: each cell is a row, each variant a marker that tells apart in grey as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from bench.rows import Row, Spread
from prelora.analysis import drawing

MOST_CELLS = 16
"""Rows of a panel; a full sweep has hundreds, which are all in the table."""
FULL, LORA = "full", ("prelora merged", "prelora LORA")
Rows = Mapping[str, list[Row]]
"""Rows by cell and part."""


@dataclass(frozen=True)
class Panel:
    """One suite's part of the picture."""

    suite: str
    title: str
    x_label: str
    place: Callable[[Row], Spread | None]
    """Where a row's marker goes; None: nowhere."""


def over_full(row: Row) -> Spread | None:
    """Time over that of full training; what is merely a share of a step has no place there."""
    return row.peers.get(FULL) if row.part in ("both", "step") else None


def over_bound(row: Row) -> Spread | None:
    """Time over the bound."""
    return row.bound


PANELS = (
    Panel("train_step", "Training steps", "time ÷ time of full training (left is faster)", over_full),
    Panel("lora_linear", "One layer, forward and backward", "time ÷ time of a full nn.Linear", over_full),
    Panel("merge", "Merging all layers", "time ÷ bytes at the bandwidth of a copy", over_bound),
    Panel("weight_norms", "Norms of all targets", "time ÷ bytes at the bandwidth of a copy", over_bound),
)


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for every suite that was measured."""
    panels = [(panel, by_cell(rows, panel)) for panel in PANELS]
    panels = [(panel, cells) for panel, cells in panels if cells]
    memory = [row for row in rows if row.suite == "memory" and row.value is not None][: 2 * MOST_CELLS]
    heights = [1.0 + 0.62 * len(cells) for _, cells in panels] + [1.0 + 0.24 * len(memory)] * bool(memory)
    figure = drawing.new_figure(sum(heights) or 1.0)
    if not heights:
        drawing.add_note(figure.subplots(), "nothing was measured")
        return figure
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (panel, cells) in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, cells, _measured(rows, panel.suite))
    if memory:
        _draw_memory(grid[-1], memory)
    return figure


def by_cell(rows: Sequence[Row], panel: Panel) -> dict[str, list[Row]]:
    """What a panel shows, by the name of the cell, and of the part where a cell has several wholes."""
    shown = [row for row in rows if row.suite == panel.suite and row.value is not None and row.whole]
    shown = [row for row in shown if panel.place(row) is not None or row.variant == FULL]
    parts = {row.part for row in shown}
    cells: dict[str, list[Row]] = {}
    for row in shown:
        name = f"{row.cell}\n{row.part}" if len(parts) > 1 else row.cell
        name += f"\n(disturbed: others took {row.others:.0%})" * row.disturbed
        cells.setdefault(name, []).append(row)
    return dict(list(cells.items())[:MOST_CELLS])


def _measured(rows: Sequence[Row], suite: str) -> int:
    return len({(row.cell, row.part) for row in rows if row.suite == suite and row.bound is not None and row.whole})


def _draw_panel(axes: Axes, panel: Panel, cells: Rows, measured: int) -> None:
    title = panel.title if measured <= len(cells) else f"{panel.title} (first {len(cells)} of {measured})"
    drawing.style_axes(axes, panel.x_label, "", title)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=drawing.GRID, linewidth=0.6)
    names = list(dict.fromkeys(row.variant for members in cells.values() for row in members if panel.place(row)))
    for index, name in enumerate(names):
        lane = (index + 0.5) / len(names) - 0.5
        members = [(y, row) for y, each in enumerate(cells.values()) for row in each if row.variant == name]
        places = [(y + 0.8 * lane, place, row) for y, row in members if (place := panel.place(row)) is not None]
        _draw_variant(axes, places, index, name)
    axes.axvline(1, color=drawing.MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
    if panel.place is over_full:
        _draw_bounds(axes, cells)
    for y in range(1, len(cells)):
        axes.axhline(y - 0.5, color=drawing.GRID, linewidth=0.6)
    axes.set_yticks(range(len(cells)), list(cells))
    axes.set_ylim(len(cells) - 0.5, -0.5)
    _log_axis(axes)
    drawing.add_legend(axes)


def _draw_variant(axes: Axes, places: Sequence[tuple[float, Spread, Row]], index: int, name: str) -> None:
    """Median as a marker, full for ours and hollow for peers, between its quartiles."""
    color, _, marker = drawing.STYLES[index % len(drawing.STYLES)]
    if index >= len(drawing.STYLES):
        marker = "<>hX*d"[index % len(drawing.STYLES)]
    ours = places[0][2].role == "ours"
    axes.hlines(
        [y for y, _, _ in places],
        [spread.low for _, spread, _ in places],
        [spread.high for _, spread, _ in places],
        color=color,
        linewidth=1,
    )
    axes.plot(
        [spread.median for _, spread, _ in places],
        [y for y, _, _ in places],
        linestyle="none",
        marker=marker,
        markersize=5,
        markerfacecolor=color if ours else "white",
        markeredgecolor=color,
        label=name,
    )


def _draw_bounds(axes: Axes, cells: Rows) -> None:
    """A bar across each row where the FLOPs put LORA at best."""
    label = "bound of LORA"
    for y, members in enumerate(cells.values()):
        for row in members:
            if row.variant in LORA and row.bound is not None:
                at = row.peers[FULL].median / row.bound.median
                axes.vlines(at, y - 0.45, y + 0.45, color=drawing.INK, linewidth=1.6, label=label)
                label = "_bound"


def _log_axis(axes: Axes) -> None:
    """Plain numbers, as many as fit; a range too small for ticks of a logarithmic axis stays linear."""
    low, high = axes.get_xlim()
    if low > 0 and high / low < 1.5:
        return
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    wide = math.log10(high / low) > 1.2
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    """What is held, stacked, and the process's peak."""
    items = list(dict.fromkeys(item for row in rows for item in row.items))
    peaks = [row.value.median for row in rows if row.value is not None]
    per_unit, unit = drawing.byte_unit(max(peaks) * 2**20)
    scale = 2**20 / per_unit
    drawing.style_axes(axes, f"{unit} in one step", "", "Memory of a training step")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=drawing.GRID, linewidth=0.6)
    starts = [0.0] * len(rows)
    for index, item in enumerate(items):
        sizes = [scale * row.items.get(item, 0.0) for row in rows]
        drawing.draw_bars(axes, sizes, starts, index, item, scale * max(peaks))
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    for y, peak in enumerate(peaks):
        axes.vlines(scale * peak, y - 0.4, y + 0.4, color=drawing.INK, linewidth=1.6, label="peak" if y == 0 else "_")
    axes.set_yticks(range(len(rows)), [f"{row.cell}  {row.variant}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    drawing.add_legend(axes)
