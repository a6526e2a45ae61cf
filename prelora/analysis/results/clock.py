"""Wall-clock of collected runs, from steps that were timed on a quiet machine, and what FLOPs allow of it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from prelora.analysis.results.loading import BASELINE, PRELORA, MissingDataError, Results
from prelora.analysis.results.rows import EpochRow, RunRow, TimingRow
from prelora.units import Phase


@dataclass(frozen=True)
class PhaseTime:
    """What an image costs in a phase."""

    seconds: float
    """Per image, of whole optimizer steps."""
    ratio: float
    """FULL's step over this phase's, images alike: the speed-up."""
    source: str
    """The variant whose steps were timed."""


def phase_time(results: Results, run: RunRow, phase: Phase) -> PhaseTime:
    """The quiet time of an image in one phase of a run: the rule behind every wall-clock figure.

    The steps are those that ``timing.csv`` has of this variant and seed, else of this variant with another seed, else
    of ``exp2``. Each round has a step of every phase, one after another in one process; the speed-up is the median
    over rounds of FULL's time over the phase's, and the seconds are the median of all FULL steps of the file over that
    speed-up. So a process that ran slower as a whole moves no run against another. Rounds without a FULL step give the
    median of their own seconds instead.

    Raises:
        MissingDataError: ``timing.csv`` has no step of the phase that may serve.
    """
    everywhere = _per_image([row for row in results.timing if row.phase == "full"])
    if not everywhere:
        raise MissingDataError("no step of phase full in timing.csv")
    full = statistics.median(everywhere.values())
    if phase == "full":
        return PhaseTime(full, 1.0, BASELINE)
    rows = _timed(results.timing, run, phase)
    taken = _per_image(rows)
    ratios = [everywhere[place] / seconds for place, seconds in taken.items() if place in everywhere]
    ratio = statistics.median(ratios) if ratios else full / statistics.median(taken.values())
    return PhaseTime(full / ratio, ratio, rows[0].variant)


def epoch_seconds(results: Results, run: RunRow) -> dict[int, float]:
    """Quiet wall-clock of each epoch: its steps, images over batch, times the quiet time of its phase's step.

    Raises:
        MissingDataError: the run has no epochs, or one of its phases was not timed.
    """
    rows = results.epochs_of(run)
    times = {phase: phase_time(results, run, phase).seconds for phase in dict.fromkeys(row.phase for row in rows)}
    return {row.epoch: row.images * times[row.phase] for row in rows}


def wall_clock(results: Results, run: RunRow) -> float:
    """Quiet seconds of the whole run, the epochs that it shares with ``full`` included.

    Raises:
        MissingDataError: as ``epoch_seconds``.
    """
    return sum(epoch_seconds(results, run).values())


def cumulative(by_epoch: dict[int, float]) -> dict[int, float]:
    """Sum up to and with each epoch."""
    return dict(zip(by_epoch, itertools.accumulate(by_epoch.values()), strict=True))


def baseline_of(results: Results, run: RunRow) -> RunRow:
    """``full`` of the same seed.

    Raises:
        MissingDataError: there is none.
    """
    for other in results.of(BASELINE):
        if other.seed == run.seed:
            return other
    raise MissingDataError(f"no run of {BASELINE}, seed {run.seed}")


def run_speed_up(results: Results, run: RunRow) -> tuple[float, float]:
    """``full``'s wall-clock over the run's, and the same of FLOPs, which is its ceiling.

    Raises:
        MissingDataError: no ``full`` of that seed, or one of the two has no epochs or an untimed phase.
    """
    full = baseline_of(results, run)
    return wall_clock(results, full) / wall_clock(results, run), full.flops / run.flops


def phase_ceiling(results: Results, run: RunRow, phase: Phase) -> float:
    """FLOPs of an image in FULL over those in a phase of the run.

    Raises:
        MissingDataError: no ``full`` of that seed, or no epoch of the phase in the run.
    """
    full = _flops_per_image(results.epochs_of(baseline_of(results, run)), "full")
    return full / _flops_per_image(results.epochs_of(run), phase)


def _flops_per_image(rows: Sequence[EpochRow], phase: Phase) -> float:
    flops = [row.flops / row.images for row in rows if row.phase == phase]
    if not flops:
        raise MissingDataError(f"no epoch of {rows[0].variant} in phase {phase}")
    return statistics.fmean(flops)


def _timed(timing: Sequence[TimingRow], run: RunRow, phase: Phase) -> list[TimingRow]:
    """The rows that serve a phase of a run, all of one variant."""
    rows = [row for row in timing if row.phase == phase]
    choices = (
        [row for row in rows if (row.variant, row.seed) == (run.variant, run.seed)],
        [row for row in rows if row.variant == run.variant],
        [row for row in rows if row.variant == PRELORA],
    )
    found = next(filter(None, choices), None)
    if found is None:
        raise MissingDataError(f"no step of phase {phase} in timing.csv, of {run.variant} or of {PRELORA}")
    return found


def _per_image(rows: Sequence[TimingRow]) -> dict[tuple[str, int, int], float]:
    """Seconds per image by variant, seed and round."""
    return {(row.variant, row.seed, row.round): row.seconds / row.batch for row in rows}
