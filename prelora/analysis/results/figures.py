"""Figures of how collected runs train: the paper's Figures 1 and 3 to 6, over epochs, and the ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prelora.analysis import drawing
from prelora.analysis.results.loading import BASELINE, PRELORA, MissingDataError, Results
from prelora.analysis.results.rows import EpochRow, NormRow, RunRow
from prelora.analysis.results.series import (
    STYLE,
    THRESHOLDS,
    by_epoch,
    compared,
    cut,
    draw,
    from_epoch,
    say_below,
    speed_ups,
)
from prelora.analysis.results.stats import Band, band

QUERY = "q"


def fig1(results: Results) -> Figure:
    """Norms by group and training loss of full training, by epoch (Figure 1)."""
    runs = results.of(BASELINE)
    groups = dict.fromkeys(row.group for run in runs for row in results.norms_of(run))
    figure = drawing.new_figure(5.4)
    upper, lower = figure.subplots(2, 1, height_ratios=(1.4, 1))
    for index, group in enumerate(groups):
        lines = [{float(row.epoch): row.norm for row in results.norms_of(run) if row.group == group} for run in runs]
        draw(upper, band(lines), index, group)
    draw(lower, by_epoch(results, BASELINE, _train_loss), 0, "training loss")
    _epoch_axes(upper, "Frobenius norm, mean over layers", "weight norms")
    _epoch_axes(lower, "mean cross-entropy", "training loss")
    drawing.add_legend(upper, "group")
    say_below(figure, results, [BASELINE], "Full training")
    return figure


def fig3(results: Results) -> Figure:
    """Query norm of each layer of full training, by epoch (Figure 3)."""
    rows = [row for row in results.layers if row.group == QUERY]
    if not rows:
        raise MissingDataError(f"no layer of group {QUERY} in layers.csv")
    layers, seeds = sorted({row.layer for row in rows}), sorted({row.seed for row in rows})
    figure = drawing.new_figure(3.6)
    axes = figure.subplots()
    shades = Normalize(layers[0], max(layers[-1], layers[0] + 1))
    for layer in layers:
        lines = [
            {float(row.epoch): row.norm for row in rows if (row.layer, row.seed) == (layer, seed)} for seed in seeds
        ]
        line, color = band(lines), drawing.DEPTHS(shades(layer))
        style = (0, (4, 1.5)) if layer == layers[0] else "-"
        axes.plot(line.x, line.mean, color=color, linewidth=2.2 if layer == layers[-1] else 1.1, linestyle=style)
        if line.n > 1:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.14, linewidth=0)
    _epoch_axes(axes, "Frobenius norm of the query weight", "")
    drawing.add_depth_bar(figure, shades, axes, aspect=24)
    say_below(figure, results, [BASELINE], "Full training")
    return figure


def fig4(results: Results) -> Figure:
    """Thresholds Exp1 to Exp3 against full training: losses, epoch speed-up, top-1 (Figure 4)."""
    variants = compared(results, THRESHOLDS)
    start = from_epoch(results, variants)
    figure = drawing.new_figure(6.6)
    (loss, speed), (top1, evaluation) = figure.subplots(2, 2)
    for variant in variants:
        index, title = STYLE[variant], results.title(variant)
        draw(loss, cut(by_epoch(results, variant, _train_loss), start), index, title)
        _evaluated(top1, results, variant, lambda row: row.top1, start, index)
        _evaluated(evaluation, results, variant, lambda row: row.eval_loss, start, index)
    _epoch_axes(loss, "mean cross-entropy", "training loss")
    _speed_up_panel(speed, results, [(variant, STYLE[variant]) for variant in variants], start)
    _epoch_axes(top1, "top-1 accuracy (%)", "validation top-1")
    _epoch_axes(evaluation, "mean cross-entropy", "validation loss")
    drawing.legend_above(figure, loss, len(variants))
    say_below(figure, results, variants, _begins(start), machine=True)
    return figure


def fig5(results: Results) -> Figure:
    """Warm-up of w epochs for each w: training loss and epoch speed-up (Figure 5)."""
    widths = _widths(results)
    variants = [BASELINE, *widths.values()]
    start = from_epoch(results, variants)
    figure = drawing.new_figure(4.2)
    loss, speed = figure.subplots(1, 2)
    draw(loss, cut(by_epoch(results, BASELINE, _train_loss), start), 0, results.title(BASELINE))
    for index, (width, variant) in enumerate(widths.items(), start=1):
        draw(loss, cut(by_epoch(results, variant, _train_loss), start), index, f"w = {width}")
    _epoch_axes(loss, "mean cross-entropy", "training loss")
    _speed_up_panel(speed, results, [(variant, index) for index, variant in enumerate(variants)], start)
    drawing.legend_above(figure, loss, len(variants))
    say_below(figure, results, variants, _begins(start), machine=True)
    return figure


def fig6(results: Results) -> Figure:
    """Norms of base and LoRA of the query during warm-up, for each w (Figure 6)."""
    widths = _widths(results)
    figure = drawing.new_figure(3.8)
    base, lora = figure.subplots(1, 2)
    for index, (width, variant) in enumerate(widths.items(), start=1):
        for axes, value in ((base, _base_norm), (lora, _lora_norm)):
            draw(axes, _during_warmup(results, variant, value), index, f"w = {width}")
    for axes, what in ((base, "base W, query"), (lora, "LoRA s·B·A, query")):
        drawing.style_axes(axes, "epochs since the switch", "Frobenius norm, mean over layers", what)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    drawing.legend_above(figure, base, len(widths))
    say_below(figure, results, list(widths.values()))
    return figure


def ranks(results: Results) -> Figure:
    """Ranks that Algorithm 2 gave Exp2: groups down, layers across, a panel for each seed."""
    rows = [row for row in results.ranks if row.variant == PRELORA]
    if not rows:
        raise MissingDataError(f"no rank of {PRELORA} in ranks.csv")
    groups = list(dict.fromkeys(row.group for row in rows))
    layers, seeds = sorted({row.layer for row in rows}), sorted({row.seed for row in rows})
    given = sorted({row.rank for row in rows})
    columns = min(3, len(seeds))
    down = -(-len(seeds) // columns)
    figure = drawing.new_figure(0.7 + down * (0.7 + 0.3 * len(groups)))
    grid = figure.subplots(down, columns, squeeze=False)
    for axes, seed in zip(grid.flat, seeds, strict=False):
        found = {(row.group, row.layer): row.rank for row in rows if row.seed == seed}
        drawing.style_axes(axes, "layer", "group", f"seed {seed}")
        cells = [[found.get((group, layer)) for layer in layers] for group in groups]
        drawing.draw_rank_grid(axes, groups, layers, cells, given)
    for axes in grid[:, 1:].flat:
        axes.set_ylabel("")
        axes.set_yticklabels([])
    for axes in grid.flat[len(seeds) :]:
        axes.set_visible(False)
    drawing.write_below(figure, f"{results.name}, {results.title(PRELORA)}: rank of every target, darker is higher.")
    return figure


def _widths(results: Results) -> dict[int, str]:
    """Variant by warm-up epochs; ``exp2`` stands in for w = 2."""
    found = {int(variant[1:]): variant for variant in results.variants if re.fullmatch(r"w\d+", variant)}
    if not found:
        raise MissingDataError("no run of a variant w1, w2, w3 and so on")
    if 2 not in found and PRELORA in results.variants:
        found[2] = PRELORA
    return dict(sorted(found.items()))


def _during_warmup(results: Results, variant: str, value: Callable[[NormRow], float]) -> Band:
    """Over epochs since the switch, from 0 to the freeze."""
    lines = []
    for run in results.of(variant):
        switch, freeze = _warmup_of(run)
        rows = [row for row in results.norms_of(run) if row.group == QUERY and switch <= row.epoch <= freeze]
        lines.append({float(row.epoch - switch): value(row) for row in rows})
    found = band(lines)
    if not found.x:
        raise MissingDataError(f"no norm of group {QUERY} in the warm-up of {variant}")
    return found


def _warmup_of(run: RunRow) -> tuple[int, int]:
    if run.switch_epoch is None or run.freeze_epoch is None:
        raise MissingDataError(f"no switch and freeze of {run.variant}, seed {run.seed}")
    return run.switch_epoch, run.freeze_epoch


def _base_norm(row: NormRow) -> float:
    return row.base_norm if row.base_norm == row.base_norm else row.norm


def _lora_norm(row: NormRow) -> float:
    return row.lora_norm if row.lora_norm == row.lora_norm else 0.0


def _train_loss(row: EpochRow) -> float:
    return row.train_loss


def _evaluated(
    axes: Axes, results: Results, variant: str, value: Callable[[EpochRow], float], start: int, index: int
) -> None:
    draw(axes, cut(by_epoch(results, variant, value), start), index, results.title(variant))


def _speed_up_panel(axes: Axes, results: Results, variants: Sequence[tuple[str, int]], start: int) -> None:
    """Speed-ups with their ceilings as thin dashes; if nothing was timed, it says so."""
    _epoch_axes(axes, "epoch time of full over this one (×)", "epoch speed-up; thin dashes: what FLOPs allow")
    try:
        lines = [(speed_ups(results, variant), index) for variant, index in variants]
    except MissingDataError as error:
        drawing.add_note(axes, str(error))
        return
    for (measured, allowed), index in lines:
        draw(axes, cut(measured, start), index, "")
        if index:
            ceiling, color = cut(allowed, start), drawing.STYLES[index % len(drawing.STYLES)][0]
            axes.plot(ceiling.x, ceiling.mean, color=color, linewidth=0.8, linestyle=(0, (3, 2)))


def _epoch_axes(axes: Axes, y_label: str, title: str) -> None:
    drawing.style_axes(axes, "epoch", y_label, title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _begins(start: int) -> str:
    return f"From epoch {start} on, shortly before the first switch" if start > 1 else "All epochs"
