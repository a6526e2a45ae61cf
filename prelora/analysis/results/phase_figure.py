"""Full training against PreLoRA by phase: time, throughput and memory (the paper's Figure 7)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prelora.analysis import drawing
from prelora.analysis.results.clock import baseline_of, epoch_seconds, phase_ceiling
from prelora.analysis.results.loading import BASELINE, PRELORA, Results
from prelora.analysis.results.rows import EpochRow, RunRow
from prelora.analysis.results.series import compared, say_below
from prelora.units import Phase

ITEMS = {
    "memory_parameters": "weights",
    "memory_gradients": "gradients",
    "memory_optimizer": "optimizer state",
    "memory_other": "other",
    "memory_saved": "saved activations",
}


def fig7(results: Results) -> Figure:
    """Full training against PreLoRA (Exp2): epoch time, throughput, memory by item (Figure 7)."""
    compared(results, (PRELORA,))
    figure = drawing.new_figure(4.9)
    (time, rate), (memory, peak) = figure.subplots(2, 2)
    _cost_bars(time, rate, results)
    _memory_bars(memory, peak, results)
    drawing.legend_above(figure, memory, len(ITEMS))
    say_below(
        figure,
        results,
        [BASELINE, PRELORA],
        f"PreLoRA: {results.title(PRELORA)}; dotted: what FLOPs allow; colours: items of memory",
        machine=True,
        bands=False,
    )
    return figure


def _cost_bars(time: Axes, rate: Axes, results: Results) -> None:
    """Seconds of an epoch and images per second: full training, and PreLoRA as a whole and by phase."""
    rows = _cost_rows(results)
    unit, name = drawing.duration_unit(max(seconds for _, seconds, _, _ in rows))
    bounded = [(seconds / unit, rows[0][1] / unit / ceiling) for _, seconds, _, ceiling in rows]
    _bounded_bars(time, bounded)
    rates = [(images / seconds, ceiling * rows[0][2] / rows[0][1]) for _, seconds, images, ceiling in rows]
    _bounded_bars(rate, rates)
    labels = [label for label, _, _, _ in rows]
    for axes, what in ((time, f"time of an epoch ({name})"), (rate, "training throughput (img/s)")):
        drawing.rows_axes(axes, what, labels)
        axes.set_ylabel("")
        axes.set_xlim(0, 1.4 * axes.get_xlim()[1])
    rate.set_yticklabels([])


def _cost_rows(results: Results) -> list[tuple[str, float, float, float]]:
    """Label, seconds and images of a mean epoch, and FLOP ceiling of the speed-up."""
    pairs = [(run, baseline_of(results, run)) for run in results.of(PRELORA)]
    full = _mean_epoch(results, [full for _, full in pairs])
    whole = _mean_epoch(results, [run for run, _ in pairs])
    rows = [(results.title(BASELINE), *full, 1.0)]
    rows.append(("PreLoRA,\nwhole run", *whole, statistics.fmean(full.flops / run.flops for run, full in pairs)))
    for phase in _phases(results):
        costs = _mean_epoch(results, [run for run, _ in pairs], phase)
        ceiling = statistics.fmean(phase_ceiling(results, run, phase) for run, _ in pairs)
        rows.append((f"PreLoRA,\n{phase.upper()}", *costs, ceiling))
    return rows


def _phases(results: Results) -> list[Phase]:
    """Those after the switch that every PreLoRA run has."""
    phases: tuple[Phase, ...] = ("warmup", "lora")
    runs = [{row.phase for row in results.epochs_of(run)} for run in results.of(PRELORA)]
    return [phase for phase in phases if all(phase in run for run in runs)]


def _mean_epoch(results: Results, runs: Sequence[RunRow], phase: Phase | None = None) -> tuple[float, float]:
    """Quiet seconds and images of an epoch, mean over the epochs (of a phase) of all runs."""
    pairs = [
        (seconds[row.epoch], row.images)
        for run in runs
        for seconds in [epoch_seconds(results, run)]
        for row in results.epochs_of(run)
        if phase in (None, row.phase)
    ]
    return statistics.fmean(pair[0] for pair in pairs), statistics.fmean(pair[1] for pair in pairs)


def _bounded_bars(axes: Axes, rows: Sequence[tuple[float, float]]) -> None:
    """Measured bars with their bounds as dotted ticks; the first row is what the others are held against."""
    for y, (measured, bound) in enumerate(rows):
        axes.barh(y, measured, height=0.6, color=drawing.RANKS(0.4) if y else drawing.MUTED, linewidth=0)
        text = f"{measured:,.4g}"
        if y:
            axes.plot([bound] * 2, [y - 0.4, y + 0.4], color=drawing.INK, linewidth=1.3, linestyle=(0, (1, 1)))
            text += f" (bound {bound:,.4g})"
        drawing.write(axes, text, (max(measured, bound), y), "right")


def _memory_bars(items: Axes, peak: Axes, results: Results) -> None:
    """Memory in the last epoch of full training and of each later phase of PreLoRA: by item, and the peak."""
    rows = {results.title(BASELINE): [results.epochs_of(run)[-1] for run in results.of(BASELINE)]}
    for phase in _phases(results):
        found = [[row for row in results.epochs_of(run) if row.phase == phase][-1] for run in results.of(PRELORA)]
        rows[f"PreLoRA,\n{phase.upper()}"] = found
    sizes = {name: [_mean_of(found, item) for found in rows.values()] for item, name in ITEMS.items()}
    measured = {name: found for name, found in sizes.items() if not any(map(math.isnan, found))}
    totals = [sum(column) for column in zip(*measured.values(), strict=True)] or [0.0]
    unit, name = drawing.byte_unit(max(totals))
    starts = [0.0] * len(rows)
    for index, (label, bytes_by_row) in enumerate(measured.items()):
        shown = [size / unit for size in bytes_by_row]
        drawing.draw_bars(items, shown, starts, index, label, max(totals) / unit)
        starts = [start + size for start, size in zip(starts, shown, strict=True)]
    drawing.rows_axes(items, f"memory by item ({name})", list(rows))
    peaks = [_mean_of(found, "peak_memory") for found in rows.values()]
    known = [size for size in peaks if math.isfinite(size)]
    unit, name = drawing.byte_unit(max(known, default=0))
    peak.barh(range(len(peaks)), [size / unit for size in peaks], height=0.6, color=drawing.MUTED, linewidth=0)
    for y, size in enumerate(peaks):
        text = f"{size / unit:.3g}" if math.isfinite(size) else "not measured"
        drawing.write(peak, text, (size / unit if math.isfinite(size) else 0, y), "right")
    drawing.rows_axes(peak, f"peak memory ({name})", [""] * len(rows))
    peak.set_xlim(0, 1.2 * max(peak.get_xlim()[1], 1e-9))
    for axes in (items, peak):
        axes.set_ylabel("")


def _mean_of(rows: Sequence[EpochRow], field: str) -> float:
    """Mean over the rows that have it; NaN if none has."""
    values = [getattr(row, field) for row in rows if math.isfinite(getattr(row, field))]
    return statistics.fmean(values) if values else math.nan
