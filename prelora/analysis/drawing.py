"""How figures look: series that differ in colour, line style and marker, the phases behind every time plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from prelora.analysis.records import Run
from prelora.units import PHASES

INK = "#1b2126"
MUTED = "#5c6772"
GRID = "#dfe3e7"
BANDS = {"full": "#fdfdfe", "warmup": "#eceff1", "lora": "#f6f7f9"}
WIDTH = 10.0
"""Inches; the report shows 72 to the inch at about its own width."""

STYLES: tuple[tuple[str, Any, str], ...] = (
    ("#1a7fc1", "-", "o"),
    ("#d55e00", (0, (5, 1.5)), "s"),
    ("#009e73", (0, (6, 1.5, 1.2, 1.5)), "^"),
    ("#c0569b", (0, (1.3, 1.3)), "D"),
    ("#b98500", (0, (3, 1, 1, 1, 1, 1)), "v"),
    ("#3f9fd6", (0, (9, 2)), "P"),
    ("#6b4fa0", (0, (4, 1.5, 1.2, 1.5, 1.2, 1.5)), "X"),
    ("#7a6a5a", (0, (2.5, 2.5)), "*"),
)
DEPTHS = LinearSegmentedColormap.from_list("depth", ["#7fc8c2", "#2f8fb3", "#6468b8", "#a0458c"])
HATCHES = ("", "//", "..", "xx", "--")
RANKS = LinearSegmentedColormap.from_list("ranks", ["#e3eef4", "#8dbdd6", "#3a7fae", "#123f66"])


def new_figure(height: float) -> Figure:
    """An empty figure of ``height`` inches that draws itself with Agg."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, x_label: str, y_label: str, title: str = "") -> None:
    """Labels, a quiet grid, and no box."""
    axes.set_xlabel(x_label, color=MUTED, fontsize=8.5)
    axes.set_ylabel(y_label, color=MUTED, fontsize=8.5)
    if title:
        axes.set_title(title, loc="left", fontsize=9, color=INK, pad=14 if x_label == "epoch" else 6)
    axes.set_facecolor("none")
    axes.tick_params(colors=MUTED, labelsize=8, length=3, width=0.6)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set(color=MUTED, linewidth=0.6)


def time_axes(axes: Axes, run: Run, y_label: str, title: str = "") -> None:
    """Style an axis over epochs: phases as bands with their names, lines at the switch and at the freeze."""
    style_axes(axes, "epoch", y_label, title)
    first, last = (run.epochs[0].epoch, run.epochs[-1].epoch) if run.epochs else (1, 1)
    shown = last - first + 1
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    for phase in PHASES:
        epochs = run.in_phase(phase)
        if epochs:
            start, stop = epochs[0].epoch - 0.5, epochs[-1].epoch + 0.5
            axes.axvspan(start, stop, facecolor=BANDS[phase], edgecolor="none", zorder=0)
            _name_band(axes, phase.upper(), (start - first + 0.5) / shown, (stop - start) / shown)
    for epoch in run.epochs:
        for happened, line_style in ((epoch.event.switched, (0, (4, 2))), (epoch.event.froze, "-")):
            if happened:
                axes.axvline(epoch.epoch + 0.5, color=INK, linewidth=0.9, linestyle=line_style, zorder=1.5)


def _name_band(axes: Axes, name: str, start: float, share: float) -> None:
    """Name a band above the axes, unless it is too narrow for its name."""
    place = axes.get_subplotspec()
    across = place.get_gridspec().ncols if place is not None else 1
    width = WIDTH * 72 * 0.86 / across * share
    if width > 5.2 * len(name):
        axes.annotate(
            name,
            (start + share / 2, 1),
            xytext=(0, 2.5),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6.5,
            color=MUTED,
        )


def draw_series(axes: Axes, epochs: Sequence[float], values: Sequence[float], index: int, label: str) -> Line2D:
    """One line over epochs; its marker is drawn about eight times, and wherever a value stands alone."""
    color, line_style, marker = STYLES[index % len(STYLES)]
    finite = [math.isfinite(value) for value in values]
    padded = [False, *finite, False]
    alone = [padded[i + 1] and not padded[i] and not padded[i + 2] for i in range(len(finite))]
    step = max(1, len(values) // 8)
    offset = index * step // len(STYLES)
    marked = [i for i in range(len(values)) if finite[i] and (alone[i] or i % step == offset)]
    (line,) = axes.plot(
        epochs, values, color=color, linestyle=line_style, linewidth=1.5, marker=marker, markersize=4, label=label
    )
    line.set_markevery(marked)
    line.set_markeredgewidth(0)
    return line


def draw_band(axes: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float], index: int) -> None:
    """What lies between ``low`` and ``high``, its edges in the line style of the series, for print without colour."""
    color, line_style, _ = STYLES[index % len(STYLES)]
    axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0, zorder=1.2)
    for edge in (low, high):
        axes.plot(x, edge, color=color, linestyle=line_style, linewidth=0.5, alpha=0.7, zorder=1.3)


def mark_not_finite(axes: Axes, epochs: Sequence[int], values: Sequence[float], label: str) -> None:
    """Crosses at the foot of the axes where a value is not finite."""
    lost = [epoch for epoch, value in zip(epochs, values, strict=True) if not math.isfinite(value)]
    if lost:
        axes.plot(
            lost, [0.03] * len(lost), "x", color=INK, markersize=5, label=label, transform=axes.get_xaxis_transform()
        )


def legend_above(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend for all panels, above them, of what ``axes`` names."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=3.4,
    )


def write_below(figure: Figure, text: str) -> None:
    """What holds for the whole figure, in small print under it."""
    figure.supxlabel(text, x=0.008, ha="left", fontsize=7.5, color=MUTED)


def add_legend(axes: Axes, title: str = "") -> None:
    """A legend to the right of the axes, if there is anything to name."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        legend = axes.legend(
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            title=title or None,
            title_fontproperties={"size": 8},
            handlelength=3.4,
            alignment="left",
        )
        legend.get_title().set_color(INK)


def add_note(axes: Axes, text: str) -> None:
    """Say in the middle of the axes why they are empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=MUTED)
    axes.set_yticks([])
    axes.grid(visible=False)


def byte_unit(largest: float) -> tuple[float, str]:
    """The binary unit that ``largest`` bytes are told in: (bytes per unit, name)."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, int(math.log2(largest) // 10))) if largest >= 1 else 0
    return 1024.0**power, units[power]


def duration_unit(longest: float) -> tuple[float, str]:
    """The unit that ``longest`` seconds are told in: (seconds per unit, name)."""
    return (3600.0, "h") if longest >= 7200 else (60.0, "min") if longest >= 120 else (1.0, "s")


def flop_unit(largest: float) -> tuple[float, str]:
    """The decimal unit that ``largest`` floating-point operations are told in: (FLOPs per unit, name)."""
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP")
    power = min(len(units) - 1, int(math.log10(largest) // 3)) if largest >= 1 else 0
    return 1000.0**power, units[power]


def write(axes: Axes, text: str, place: tuple[float, float], side: str, color: str = INK) -> None:
    """Write a value next to what it is the value of: ``"above"``, ``"left"`` or ``"right"`` of it."""
    shift = {"above": (0, 2), "left": (-4, 0), "right": (4, 0)}[side]
    across = {"above": "center", "left": "right", "right": "left"}[side]
    up = "bottom" if side == "above" else "center"
    axes.annotate(text, place, xytext=shift, textcoords="offset points", ha=across, va=up, color=color, fontsize=8)


def rows_axes(axes: Axes, x_label: str, rows: Sequence[str]) -> None:
    """Style an axis whose rows are phases, the first on top."""
    style_axes(axes, x_label, "phase")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)


def draw_bars(
    axes: Axes, sizes: Sequence[float], starts: Sequence[float], index: int, label: str, largest: float
) -> None:
    """One item's bars of a stack across the rows, with its size written on where there is room."""
    color, _, _ = STYLES[index % len(STYLES)]
    bars = axes.barh(range(len(sizes)), sizes, left=starts, height=0.6, label=label, color=color, linewidth=0)
    for row, (bar, size, start) in enumerate(zip(bars, sizes, starts, strict=True)):
        bar.set(hatch=HATCHES[index % len(HATCHES)], edgecolor=(1, 1, 1, 0.35))
        if size > 0.07 * largest:
            box = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
            axes.text(
                start + size / 2, row, f"{size:.3g}", ha="center", va="center", fontsize=7.5, color="#fefefe", bbox=box
            )


def mark_threshold(axes: Axes, threshold: float | None, sign: str) -> None:
    """Make the y axis logarithmic and show the largest change that passes, in percent."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    if threshold is None:
        return
    axes.axhline(threshold, color=INK, linewidth=1, linestyle=(0, (1, 1.5)))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, threshold / 2), max(high, threshold * 2))
    axes.annotate(
        f"{sign} = {threshold:g} %",
        (0, threshold),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=8,
        color=INK,
    )


def add_depth_bar(figure: Figure, norm: Normalize, axes: Any, *, aspect: float, shrink: float = 1.0) -> None:
    """What the colours of ``DEPTHS`` mean, beside ``axes``, one or several: the layer."""
    bar = figure.colorbar(ScalarMappable(norm, DEPTHS), ax=axes, aspect=aspect, pad=0.015, shrink=shrink)
    bar.set_label("layer (first dashed, last thick)", fontsize=8.5, color=MUTED)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=2)
    bar.locator = MaxNLocator(integer=True, nbins=8)
    if bar.solids is not None:
        bar.solids.set(rasterized=False, edgecolor="face")
    bar.outline.set_visible(False)


def draw_rank_grid(
    axes: Axes, groups: Sequence[str], layers: Sequence[int], grid: Sequence[Sequence[int | None]], ranks: Sequence[int]
) -> None:
    """Ranks as a map, darker where higher, each cell with its number.

    Args:
        grid: [group][layer]; None: not a target.
        ranks: every rank that there is, rising; panels that share them share their shades.
    """
    shades = {rank: (place + 0.5) / len(ranks) for place, rank in enumerate(ranks)}
    values = [[math.nan if rank is None else shades[rank] for rank in row] for row in grid]
    axes.pcolormesh(values, cmap=RANKS, vmin=0, vmax=1, edgecolors=GRID, linewidth=0.8)
    for y, row in enumerate(grid):
        for x, rank in enumerate(row):
            if rank is not None:
                ink = "#10202d" if shades[rank] < 0.6 else "#fefefe"
                axes.text(x + 0.5, y + 0.5, str(rank), ha="center", va="center", fontsize=7.5, color=ink)
    axes.set_xticks([x + 0.5 for x in range(len(layers))], [str(layer) for layer in layers])
    axes.set_yticks([y + 0.5 for y in range(len(groups))], groups)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and as SVG; returns both paths."""
    written = [path.with_name(f"{path.name}{suffix}") for suffix in (".png", ".svg")]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name, "hatch.linewidth": 0.7}):
        for file in written:
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return written
