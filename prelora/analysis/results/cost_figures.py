"""Figures of what collected runs reach for what they cost: top-1 against time, loss against FLOPs, speed-ups."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prelora.analysis import drawing
from prelora.analysis.results.clock import (
    phase_ceiling,
    phase_time,
    run_speed_up,
    wall_clock,
)
from prelora.analysis.results.differences import top1_difference
from prelora.analysis.results.loading import BASELINE, MissingDataError, Results
from prelora.analysis.results.series import (
    STYLE,
    THRESHOLDS,
    against,
    compared,
    cut,
    draw,
    from_cost,
    present,
    say_below,
    spent_flops,
    spent_seconds,
)
from prelora.analysis.results.stats import Sample

COMPARED = (*THRESHOLDS, "compressed")


@dataclass(frozen=True)
class _End:
    """Where a variant's runs end, by seed."""

    seconds: Sample
    top1: Sample
    saved: Sample
    """Percent of full training's time."""
    allowed: Sample
    """The same of FLOPs: the most that may be saved."""
    difference: Sample | None
    """Top-1 less full training's, percentage points; None: full training's own."""


def accuracy_wall_clock(results: Results) -> Figure:
    """Top-1 against quiet wall-clock; at the end, its difference to full training against the time saved."""
    variants = compared(results, COMPARED)
    seconds = spent_seconds(results)
    ends = {variant: _end(results, variant) for variant in variants}
    unit, name = drawing.duration_unit(max(max(end.seconds.values) for end in ends.values()))
    start = from_cost(results, present(results, (BASELINE, *THRESHOLDS)), seconds)
    figure = drawing.new_figure(4.9)
    course, final = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for variant in variants:
        line, index, end = against(results, variant, seconds, lambda row: row.top1), STYLE[variant], ends[variant]
        shown = cut(line, start, unit)
        drawing.draw_series(course, shown.x, shown.mean, index, _told(results, variant, end, unit, name))
        _mark(course, [value / unit for value in end.seconds.values], end.top1, index)
        if end.difference is not None:
            _mark(final, end.saved.values, end.difference, index)
            color, _, marker = drawing.STYLES[index]
            final.plot(
                end.saved.values, end.difference.values, marker, color=color, ms=3.5, mfc="white", mew=0.8, ls=""
            )
    drawing.style_axes(
        course,
        f"training time on the quiet machine ({name})",
        "validation top-1 (%)",
        "from shortly before the first switch on",
    )
    drawing.style_axes(
        final, "time saved (% of full training)", "top-1 less full's (percentage points)", "at the end, same seed"
    )
    final.plot(0, 0, drawing.STYLES[0][2], color=drawing.STYLES[0][0], ms=7)
    for line_at_zero in (final.axhline, final.axvline):
        line_at_zero(0, color=drawing.MUTED, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
    final.margins(0.08)
    drawing.legend_above(figure, course, 1)
    whiskers = "Whiskers: 95 % t intervals, to the right of differences paired by seed; small and hollow: seeds"
    several = any(end.top1.n > 1 for end in ends.values())
    say_below(figure, results, variants, *([whiskers] if several else []), machine=True, bands=False)
    return figure


def flops_loss(results: Results) -> Figure:
    """Training and evaluation loss against the FLOPs spent so far."""
    variants = compared(results, COMPARED)
    spent = spent_flops(results)
    unit, name = drawing.flop_unit(max(run.flops for variant in variants for run in results.of(variant)))
    start = from_cost(results, present(results, (BASELINE, *THRESHOLDS)), spent)
    figure = drawing.new_figure(4.0)
    panels = figure.subplots(1, 2)
    values = (("training loss", lambda row: row.train_loss), ("validation loss", lambda row: row.eval_loss))
    for axes, (title, value) in zip(panels, values, strict=True):
        for variant in variants:
            line = against(results, variant, spent, value)
            draw(axes, cut(line, start, unit), STYLE[variant], results.title(variant))
        drawing.style_axes(axes, f"training so far ({name})", "mean cross-entropy", title)
    drawing.legend_above(figure, panels[0], len(variants))
    say_below(figure, results, variants, "From shortly before the first switch on")
    return figure


def speedup_ceiling(results: Results) -> Figure:
    """Speed-up over full training of the whole run and in LORA, each beside its FLOP ceiling, for every variant."""
    variants = [variant for variant in results.variants if variant != BASELINE]
    if not variants:
        raise MissingDataError(f"no run but {BASELINE}")
    whole = {variant: _samples([run_speed_up(results, run) for run in results.of(variant)]) for variant in variants}
    lora = {variant: _lora_speed_ups(results, variant) for variant in variants}
    figure = drawing.new_figure(1.5 + 0.36 * len(variants))
    left, right = figure.subplots(1, 2, sharey=True)
    titles = [results.title(variant) for variant in variants]
    for axes, found, what in ((left, whole, "whole run"), (right, lora, "a step in LORA")):
        drawing.rows_axes(axes, "speed-up over full training (×)", titles)
        axes.set_title(what, loc="left", fontsize=9, color=drawing.INK)
        axes.set_ylabel("")
        _speed_up_bars(axes, [found[variant] for variant in variants])
    right.tick_params(axis="y", length=0)
    say_below(
        figure,
        results,
        variants,
        "Bars: means of measured speed-ups, dots: seeds; dotted: what FLOPs allow",
        machine=True,
        bands=False,
    )
    return figure


def _end(results: Results, variant: str) -> _End:
    runs = results.of(variant)
    if any(math.isnan(run.final_top1) for run in runs):
        raise MissingDataError(f"no final_top1 of {variant}")
    measured, allowed = _samples([run_speed_up(results, run) for run in runs])
    return _End(
        seconds=Sample(tuple(wall_clock(results, run) for run in runs)),
        top1=Sample(tuple(run.final_top1 for run in runs)),
        saved=Sample(tuple(100 * (1 - 1 / ratio) for ratio in measured.values)),
        allowed=Sample(tuple(100 * (1 - 1 / ratio) for ratio in allowed.values)),
        difference=None if variant == BASELINE else top1_difference(results, variant, BASELINE),
    )


def _told(results: Results, variant: str, end: _End, unit: float, name: str) -> str:
    """A variant's end in words, every saving beside what FLOPs allow."""
    reached = (
        f"{end.top1.mean:.2f} ± {end.top1.half_width:.2f} %" if end.top1.n > 1 else f"{end.top1.mean:.2f} % (n = 1)"
    )
    told = f"{results.title(variant)}: {reached} in {end.seconds.mean / unit:.3g} {name}"
    if end.difference is None:
        return told
    saved = f"{end.saved.mean:.1f} % of the time saved, FLOPs allow {end.allowed.mean:.1f} %".replace("-", "−")
    return f"{told}; {end.difference.told()} points, {saved}"


def _mark(axes: Axes, x: Sequence[float], y: Sample, index: int) -> None:
    """The mean with its whiskers: the interval upright, the range of ``x`` across."""
    color, _, marker = drawing.STYLES[index]
    at = statistics.fmean(x)
    across = [[max(0.0, at - min(x))], [max(0.0, max(x) - at)]] if y.n > 1 else None  # rounding of the mean
    half = y.half_width if y.n > 1 else None
    axes.errorbar(at, y.mean, yerr=half, xerr=across, color=color, marker=marker, ms=7, elinewidth=1.3, capsize=3.5)


def _samples(pairs: Sequence[tuple[float, float]]) -> tuple[Sample, Sample]:
    return Sample(tuple(pair[0] for pair in pairs)), Sample(tuple(pair[1] for pair in pairs))


def _lora_speed_ups(results: Results, variant: str) -> tuple[Sample, Sample] | None:
    """Measured and allowed, by seed; None: the variant has no epoch in LORA."""
    runs = [run for run in results.of(variant) if any(row.phase == "lora" for row in results.epochs_of(run))]
    if not runs:
        return None
    return _samples([(phase_time(results, run, "lora").ratio, phase_ceiling(results, run, "lora")) for run in runs])


def _speed_up_bars(axes: Axes, rows: Sequence[tuple[Sample, Sample] | None]) -> None:
    for y, row in enumerate(rows):
        if row is None:
            axes.annotate(
                "no LORA phase",
                (0, y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=drawing.MUTED,
            )
            continue
        measured, allowed = row
        axes.barh(y, measured.mean, height=0.56, color=drawing.STYLES[5][0], alpha=0.55, linewidth=0)
        if measured.n > 1:
            axes.plot(measured.values, [y] * measured.n, "o", color=drawing.INK, ms=2.5, mew=0, alpha=0.8)
        axes.plot([allowed.mean] * 2, [y - 0.38, y + 0.38], color=drawing.INK, linewidth=1.4, linestyle=(0, (1, 1)))
        beyond = max(1.0, allowed.mean, *measured.values)
        drawing.write(axes, f"{measured.mean:.2f} of {allowed.mean:.2f}", (beyond, y), "right")
    axes.axvline(1, color=drawing.MUTED, linewidth=0.8, zorder=1)
    axes.set_xlim(0, 1.3 * axes.get_xlim()[1])
