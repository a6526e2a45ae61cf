"""Switch epochs over tau × zeta as a picture: darker switches later, hatched not at all, each cell with its number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from prelora.analysis.drawing import GRID, INK, MUTED, RANKS, new_figure, style_axes

ROW, LARGEST = 0.32, 12.0
"""Inches of a row, and of the whole figure."""
WRITTEN = 24
"""Columns up to which a cell has room for its number."""


def draw_grid(
    name: str, taus: Sequence[float], zetas: Sequence[float], epochs: Sequence[Sequence[int | None]], logged: int
) -> Figure:
    """The picture of ``replay_thresholds.grid``.

    Args:
        epochs: [tau][zeta], finished epochs at the switch; None: not within the log.
        logged: epochs in FULL that the log has.
    """
    figure = new_figure(min(LARGEST, 1.6 + ROW * len(taus)))
    axes = figure.subplots()
    style_axes(axes, "ζ, largest change of the loss, %", "τ, largest change of a group's norm, %", "")
    axes.grid(visible=False)
    values = np.array([[np.nan if epoch is None else epoch for epoch in row] for row in epochs], dtype=float)
    image = axes.imshow(values, cmap=RANKS, vmin=0, vmax=logged, aspect="auto", origin="lower")
    for row, column in np.ndindex(values.shape):
        epoch = epochs[row][column]
        if epoch is None:
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor="white", edgecolor=GRID, hatch="///", linewidth=0))
        elif len(zetas) <= WRITTEN:
            color = "white" if epoch > 0.55 * logged else INK
            axes.text(column, row, str(epoch), ha="center", va="center", fontsize=7.5, color=color)
    _ticks(axes.set_xticks, zetas)
    _ticks(axes.set_yticks, taus)
    axes.set_title(f"{name}: epochs in FULL before the switch", loc="left", fontsize=9, color=INK)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label(f"epochs; hatched: no switch in {logged}", color=MUTED, fontsize=8.5)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=3, width=0.6)
    return figure


def _ticks(place: Callable[..., object], values: Sequence[float]) -> None:
    step = -(-len(values) // WRITTEN)
    place(range(0, len(values), step), [f"{value:.4g}" for value in values[::step]])
