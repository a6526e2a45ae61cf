"""Lines of the results' figures: means over the seeds of a variant, with the range of the seeds behind them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prelora.analysis import drawing
from prelora.analysis.results.clock import baseline_of, cumulative, epoch_seconds
from prelora.analysis.results.loading import BASELINE, MissingDataError, Results, machine_line
from prelora.analysis.results.rows import EpochRow, RunRow
from prelora.analysis.results.stats import Band, band

STYLE = {"full": 0, "exp1": 1, "exp2": 2, "exp3": 3, "compressed": 4}
"""A variant's place in ``drawing.STYLES``, the same in every figure that compares these."""
THRESHOLDS = ("exp1", "exp2", "exp3")


def present(results: Results, variants: Sequence[str]) -> list[str]:
    """Those of ``variants`` that have runs."""
    return [variant for variant in variants if variant in results.variants]


def compared(results: Results, variants: Sequence[str]) -> list[str]:
    """``full``, and those of ``variants`` that have runs.

    Raises:
        MissingDataError: there is no ``full``, or none of the others.
    """
    results.of(BASELINE)
    found = present(results, variants)
    if not found:
        raise MissingDataError(f"no run of {' or '.join(variants)}")
    return [BASELINE, *found]


def by_epoch(results: Results, variant: str, value: Callable[[EpochRow], float]) -> Band:
    """A value of every epoch, over the variant's seeds.

    Raises:
        MissingDataError: the variant has no epochs, or no epoch has the value in every seed.
    """
    lines = [{float(row.epoch): value(row) for row in results.epochs_of(run)} for run in results.of(variant)]
    return _filled(band(lines), f"no such value in the epochs of {variant}")


def against(
    results: Results,
    variant: str,
    cost: Callable[[RunRow], Mapping[int, float]],
    value: Callable[[EpochRow], float],
) -> Band:
    """As ``by_epoch``, over the mean of a cost that adds up from the first epoch on."""
    found = by_epoch(results, variant, value)
    costs = band([{float(epoch): spent for epoch, spent in cost(run).items()} for run in results.of(variant)])
    spent = dict(zip(costs.x, costs.mean, strict=True))
    return Band(tuple(spent[epoch] for epoch in found.x), found.mean, found.low, found.high, found.n)


def speed_ups(results: Results, variant: str) -> tuple[Band, Band]:
    """By epoch: ``full``'s quiet time over the variant's, and the same of FLOPs, which is the ceiling.

    Raises:
        MissingDataError: epochs or timings are missing.
    """
    measured, allowed = [], []
    for run in results.of(variant):
        full = baseline_of(results, run)
        seconds, of_full = epoch_seconds(results, run), epoch_seconds(results, full)
        measured.append({float(epoch): of_full[epoch] / seconds[epoch] for epoch in seconds.keys() & of_full.keys()})
        flops = {row.epoch: row.flops for row in results.epochs_of(full)}
        rows = [row for row in results.epochs_of(run) if row.epoch in flops]
        allowed.append({float(row.epoch): flops[row.epoch] / row.flops for row in rows})
    return band(measured), band(allowed)


def spent_seconds(results: Results) -> Callable[[RunRow], dict[int, float]]:
    """A run's quiet wall-clock up to and with each epoch."""
    return lambda run: cumulative(epoch_seconds(results, run))


def spent_flops(results: Results) -> Callable[[RunRow], dict[int, float]]:
    """A run's FLOPs up to and with each epoch."""
    return lambda run: cumulative({row.epoch: row.flops for row in results.epochs_of(run)})


def from_epoch(results: Results, variants: Sequence[str]) -> int:
    """Where figures begin: shortly before the first switch of ``variants``; earlier, forked runs are ``full``."""
    switches = [run.switch_epoch for variant in variants for run in results.of(variant) if run.switch_epoch is not None]
    last = max(run.epochs for variant in variants for run in results.of(variant))
    return max(1, min(switches, default=1) - max(1, last // 20))


def from_cost(results: Results, variants: Sequence[str], cost: Callable[[RunRow], Mapping[int, float]]) -> float:
    """What ``full`` has spent at ``from_epoch``, mean over seeds."""
    first = from_epoch(results, variants)
    spent = [cost(run)[first] for run in results.of(BASELINE) if first <= run.epochs]
    return statistics.fmean(spent) if spent else 0.0


def cut(line: Band, low: float, unit: float = 1.0) -> Band:
    """What of a line lies at ``low`` or above; x in units of ``unit``."""
    kept = [i for i, x in enumerate(line.x) if x >= low]
    x = tuple(line.x[i] / unit for i in kept)
    mean, smallest, largest = (tuple(part[i] for i in kept) for part in (line.mean, line.low, line.high))
    return Band(x, mean, smallest, largest, line.n)


def draw(axes: Axes, line: Band, index: int, label: str) -> None:
    """The mean as a line and, of more than one seed, the range as a band."""
    drawing.draw_series(axes, line.x, line.mean, index, label)
    if line.n > 1:
        drawing.draw_band(axes, line.x, line.low, line.high, index)


def say_below(
    figure: Figure,
    results: Results,
    variants: Sequence[str],
    *more: str,
    machine: bool = False,
    bands: bool = True,
) -> None:
    """Under the figure: the seeds, what a band is, and where it was measured."""
    counts = {variant: len(results.of(variant)) for variant in variants}
    smallest, largest = min(counts.values()), max(counts.values())
    seeds = f"n = {largest}" if smallest == largest else f"n = {smallest} to {largest}"
    sentences = [f"{results.name}, {seeds}"]
    if bands and largest > 1:
        sentences.append("Lines: means over seeds; bands: smallest to largest seed")
    sentences += more
    if machine and machine_line(results.environment):
        sentences.append(machine_line(results.environment))
    drawing.write_below(figure, ". ".join(sentences) + ".")


def _filled(found: Band, otherwise: str) -> Band:
    if not found.x:
        raise MissingDataError(otherwise)
    return found
