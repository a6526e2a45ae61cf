"""Figures of a run: one function each, from a loaded run to a ``matplotlib.figure.Figure``.

Every figure over epochs shows the phases as bands, the switch as a dashed and the freeze as a solid vertical line.
What a run does not have is said inside the figure, so that each works for a run stopped anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from prelora.analysis import drawing
from prelora.analysis.records import Run
from prelora.analysis.summary import (
    PhaseSummary,
    group_means,
    item_name,
    layer_means,
    rank_grid,
    speed_ups,
    summarize_phases,
)

NO_SWITCH = "no LoRA: the run did not switch"


def norms_by_group(run: Run) -> Figure:
    """Frobenius norm of the effective weights W + s·B·A, mean over layers, by group and epoch."""
    figure = drawing.new_figure(3.4)
    axes = figure.subplots()
    _group_lines(axes, run, group_means(run, lambda epoch: epoch.norms))
    drawing.time_axes(axes, run, "Frobenius norm, mean over layers")
    drawing.add_legend(axes, "group")
    return figure


def norms_by_layer(run: Run) -> Figure:
    """Frobenius norm of every layer's effective weight over epochs, a panel for each group."""
    groups = run.info.groups
    columns = min(3, max(1, len(groups)))
    rows = max(1, math.ceil(len(groups) / columns))
    figure = drawing.new_figure(0.5 + 2.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    layers = sorted({target.layer for target in run.info.targets})
    norm = Normalize(min(layers, default=0), max([*layers[1:], min(layers, default=0) + 1]))
    for axes, group in zip(grid.flat, groups, strict=False):
        _layer_lines(axes, run, group, norm)
        drawing.time_axes(axes, run, "Frobenius norm", group)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    drawing.add_depth_bar(figure, norm, grid, aspect=40, shrink=0.9)
    return figure


def loss_and_accuracy(run: Run) -> Figure:
    """Training and evaluation loss, and accuracy, over epochs."""
    figure = drawing.new_figure(5.0)
    upper, lower = figure.subplots(2, 1)
    epochs = [epoch.epoch for epoch in run.epochs]
    losses = [epoch.loss for epoch in run.epochs]
    drawing.draw_series(upper, epochs, losses, 0, "training")
    _evaluation_lines(upper, run, "loss", (("evaluation", False, 1), ("evaluation, EMA", True, 2)))
    drawing.mark_not_finite(upper, epochs, losses, "training not finite")
    drawing.time_axes(upper, run, "mean loss")
    drawing.add_legend(upper)
    _evaluation_lines(lower, run, "top1", (("top-1", False, 1), ("top-1, EMA", True, 2)))
    _evaluation_lines(lower, run, "top5", (("top-5", False, 3), ("top-5, EMA", True, 4)))
    drawing.time_axes(lower, run, "accuracy (%)")
    if not any(epoch.evaluation or epoch.ema_evaluation for epoch in run.epochs):
        drawing.add_note(lower, "no evaluation was made")
    drawing.add_legend(lower)
    return figure


def rank_map(run: Run) -> Figure:
    """Rank of every target, darker where higher: layers across, groups down."""
    labels, layers, grid = rank_grid(run)
    figure = drawing.new_figure(1.1 + 0.36 * max(3, len(labels)))
    axes = figure.subplots()
    drawing.style_axes(axes, "layer", "group")
    axes.grid(visible=False)
    if not labels:
        axes.set_xticks([])
        drawing.add_note(axes, NO_SWITCH)
        return figure
    ranks = sorted({rank for row in grid for rank in row if rank is not None})
    drawing.draw_rank_grid(axes, labels, layers, grid, ranks)
    return figure


def window_changes(run: Run) -> Figure:
    """The convergence test at every epoch it was made: largest change between windows against its threshold."""
    figure = drawing.new_figure(3.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    before = replace(run, epochs=tuple(run.in_phase("full")))
    tested = [epoch for epoch in before.epochs if epoch.event.norm_changes or epoch.event.loss_changes]
    epochs = [epoch.epoch for epoch in tested]
    for index, group in enumerate(run.info.groups):
        changes = [_largest(epoch.event.norm_changes.get(group, ())) for epoch in tested]
        drawing.draw_series(left, epochs, changes, index, group)
    drawing.draw_series(right, epochs, [_largest(epoch.event.loss_changes) for epoch in tested], 0, "loss")
    decides = run.info.config.get("criterion", "norm") == "norm"  # other criteria hold nothing against tau
    for axes, what, key, sign in (
        (left, "weight norm, by group", "tau" if decides else "", "τ"),
        (right, "training loss", "zeta", "ζ"),
    ):
        drawing.time_axes(axes, before, "largest change between windows (%)", what)
        if tested:
            drawing.mark_threshold(axes, run.info.config.get(key), sign)
        else:
            drawing.add_note(axes, "no convergence test was made")
    if tested:
        drawing.add_legend(left, "group")
    return figure


def throughput(run: Run) -> Figure:
    """Training images per second of every epoch by phase; median, quartiles, and the ceiling that FLOPs set."""
    summaries = summarize_phases(run)
    ceilings = {speed.phase: speed.ceiling for speed in speed_ups(run)}
    figure = drawing.new_figure(1.1 + 0.62 * max(1, len(summaries)))
    axes = figure.subplots()
    full = next((s.images_per_second for s in summaries if s.phase == "full"), None)
    for y, summary in enumerate(summaries):
        spread, (color, _, marker) = summary.images_per_second, drawing.STYLES[y]
        values = [epoch.img_per_s for epoch in run.in_phase(summary.phase)]
        shifts = [0.36 * ((i + 0.5) / len(values) - 0.5) for i in range(len(values))]
        axes.plot(values, [y + shift for shift in shifts], marker, color=color, ms=4, alpha=0.6, mew=0, ls="")
        if spread is None:
            continue
        axes.plot([spread.low, spread.high], [y + 0.3] * 2, color=drawing.INK, linewidth=2.5, solid_capstyle="butt")
        axes.plot([spread.median] * 2, [y - 0.26, y + 0.36], color=drawing.INK, linewidth=1.4)
        drawing.write(axes, f"{spread.median:,.4g}", (spread.median, y - 0.26), "above")
        ceiling = ceilings.get(summary.phase)
        if ceiling and full:
            bound = ceiling * full.median
            axes.plot([bound] * 2, [y - 0.26, y + 0.36], color=drawing.INK, linewidth=1.2, linestyle=(0, (1, 1.2)))
            side = "right" if bound >= spread.median else "left"
            drawing.write(axes, f"FLOP ceiling {bound:,.4g}", (bound, y + 0.3), side, drawing.MUTED)
    drawing.rows_axes(axes, "training throughput (img/s)", [_phase_label(summary) for summary in summaries])
    axes.set_xlim(0, 1.16 * max(axes.get_xlim()[1], 1e-9))
    return figure


def memory(run: Run) -> Figure:
    """Memory by phase: weights, gradients, optimizer and so on in one panel, the peak in another."""
    summaries = summarize_phases(run)
    rows = [_phase_label(summary) for summary in summaries]
    figure = drawing.new_figure(1.2 + 0.5 * max(1, len(summaries)))
    left, right = figure.subplots(1, 2, width_ratios=(1.9, 1))
    largest = max((sum(s.memory.values()) for s in summaries), default=0)
    unit, name = drawing.byte_unit(largest)
    starts = [0.0] * len(summaries)
    for index, item in enumerate(dict.fromkeys(item for summary in summaries for item in summary.memory)):
        sizes = [summary.memory.get(item, 0) / unit for summary in summaries]
        drawing.draw_bars(left, sizes, starts, index, item_name(item), largest / unit)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    drawing.rows_axes(left, f"static memory ({name})", rows)
    drawing.add_legend(left)
    highest = max((summary.peak_memory for summary in summaries), default=0)
    unit, name = drawing.byte_unit(highest)
    peaks = [summary.peak_memory / unit for summary in summaries]
    right.barh(range(len(peaks)), peaks, height=0.6, color=drawing.MUTED, linewidth=0)
    for y, peak in enumerate(peaks):
        drawing.write(right, f"{peak:.3g}" if peak else "not measured", (peak, y), "right")
    drawing.rows_axes(right, f"peak memory ({name})", rows)
    right.set_xlim(0, 1.2 * max(highest / unit, 1e-9))
    return figure


def lora_norms(run: Run) -> Figure:
    """After the switch: norms of the base, of LoRA, and of LoRA relative to the base, mean over layers."""
    figure = drawing.new_figure(3.2)
    panels = figure.subplots(1, 3)
    after = replace(run, epochs=tuple(epoch for epoch in run.epochs if epoch.lora_norms))
    base = group_means(after, lambda epoch: epoch.base_norms)
    lora = group_means(after, lambda epoch: epoch.lora_norms)
    ratio = {
        group: [100 * a / b if b else math.nan for a, b in zip(lora[group], base[group], strict=True)] for group in lora
    }
    shown = (
        ("base W", "Frobenius norm", base),
        ("LoRA s·B·A", "Frobenius norm", lora),
        ("LoRA over base", "ratio of norms (%)", ratio),
    )
    for axes, (title, label, lines) in zip(panels, shown, strict=True):
        _group_lines(axes, after, lines)
        drawing.time_axes(axes, after, label, title)
        if not after.epochs:
            drawing.add_note(axes, NO_SWITCH)
    drawing.add_legend(panels[-1], "group")
    return figure


def learning_rate(run: Run) -> Figure:
    """Learning rate of the base schedule at the end of each epoch."""
    figure = drawing.new_figure(2.4)
    axes = figure.subplots()
    drawing.draw_series(axes, [e.epoch for e in run.epochs], [e.lr for e in run.epochs], 0, "learning rate")
    drawing.time_axes(axes, run, "learning rate")
    axes.set_ylim(bottom=0)
    return figure


def updates(run: Run) -> Figure:
    """Relative update norm of each epoch, mean over layers: a norm can stand still while its direction turns."""
    figure = drawing.new_figure(3.0)
    axes = figure.subplots()
    _group_lines(axes, run, group_means(run, lambda epoch: epoch.updates))
    drawing.time_axes(axes, run, "‖Wₜ − Wₜ₋₁‖ / ‖Wₜ‖")
    drawing.add_legend(axes, "group")
    return figure


def _group_lines(axes: Axes, run: Run, lines: Mapping[str, Sequence[float]]) -> None:
    epochs = [epoch.epoch for epoch in run.epochs]
    for index, (group, values) in enumerate(lines.items()):
        drawing.draw_series(axes, epochs, values, index, group)


def _layer_lines(axes: Axes, run: Run, group: str, norm: Normalize) -> None:
    epochs = [epoch.epoch for epoch in run.epochs]
    lines = layer_means(run, group, lambda epoch: epoch.norms)
    first, last = min(lines), max(lines)
    marker = "o" if len(epochs) == 1 else ""
    for layer, values in lines.items():
        width, line_style = 2.0 if layer == last else 1.0, (0, (4, 1.5)) if layer == first else "-"
        axes.plot(
            epochs,
            values,
            color=drawing.DEPTHS(norm(layer)),
            linewidth=width,
            linestyle=line_style,
            marker=marker,
            ms=3,
        )


def _evaluation_lines(axes: Axes, run: Run, field: str, lines: Sequence[tuple[str, bool, int]]) -> None:
    for label, ema, index in lines:
        found = [(e.epoch, e.ema_evaluation if ema else e.evaluation) for e in run.epochs]
        points = [(epoch, getattr(evaluation, field)) for epoch, evaluation in found if evaluation is not None]
        if points:
            drawing.draw_series(axes, [p[0] for p in points], [p[1] for p in points], index, label)


def _largest(changes: Sequence[float]) -> float:
    """Largest absolute change; NaN if there is none or one is not finite."""
    return max(map(abs, changes)) if changes and all(map(math.isfinite, changes)) else math.nan


def _phase_label(summary: PhaseSummary) -> str:
    return f"{summary.phase.upper()}\n{summary.epochs} epoch{'s' * (summary.epochs != 1)}"
