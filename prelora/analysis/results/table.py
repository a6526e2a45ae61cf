"""The paper's Table 1 from collected results, in Markdown, with spread, pairing and ceilings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from prelora.analysis.results.clock import baseline_of, phase_time, run_speed_up
from prelora.analysis.results.differences import top1_difference
from prelora.analysis.results.loading import BASELINE, PRELORA, MissingDataError, Results, machine_line
from prelora.analysis.results.rows import RunRow
from prelora.analysis.results.stats import Sample, signed

HEADER = (
    "variant",
    "τ %",
    "ζ %",
    "switch after epoch, by seed",
    "top-1 %, mean ± sd",
    "less full's, same seed [95 % CI]",
    "time saved % (at most)",
    "step time as run, s",
    "FLOPs saved %",
    "trainable at the end %",
    "n",
)
NOT_MEASURED = "–"


def table1(results: Results) -> str:
    """A line for each variant in the order of ``runs.csv``; what was not measured is a dash.

    Raises:
        MissingDataError: there is no ``full``.
    """
    results.of(BASELINE)
    rows = [_cells(results, variant) for variant in results.variants]
    borrowed = [variant for variant in results.variants if _is_timed_as_another(results, variant)]
    notes = [
        "Top-1 is that of the last epoch. The difference is paired by seed, its interval Student's t. Time saved is of "
        "the whole run, from steps timed on the quiet machine, beside what FLOPs allow; the step time as run adds up "
        "the steps on a machine that may have been busy.",
    ]
    if borrowed:
        notes.append(f"Their phases were timed as those of {PRELORA}: {', '.join(map(results.title, borrowed))}.")
    if machine_line(results.environment):
        notes.append(f"Measured on {machine_line(results.environment)}.")
    lines = [f"# {results.name}", "", *_markdown([HEADER, *rows]), "", *notes]
    return "\n".join(lines) + "\n"


def _cells(results: Results, variant: str) -> tuple[str, ...]:
    runs = results.of(variant)
    first = runs[0]
    switches = ", ".join("never" if run.switch_epoch is None else str(run.switch_epoch) for run in runs)
    return (
        first.title,
        _number(first.tau, "g"),
        _number(first.zeta, "g"),
        switches,
        _spread([run.final_top1 for run in runs], ".2f"),
        NOT_MEASURED if variant == BASELINE else _difference(top1_difference(results, variant, BASELINE)),
        NOT_MEASURED if variant == BASELINE else _time_saved(results, runs),
        _spread([run.step_seconds for run in runs], ".0f"),
        NOT_MEASURED if variant == BASELINE else _flops_saved(results, runs),
        _number(statistics.fmean(100 * run.trainable / run.parameters for run in runs), ".1f"),
        str(len(runs)),
    )


def _time_saved(results: Results, runs: Sequence[RunRow]) -> str:
    """Of the whole run, beside the most that FLOPs allow."""
    try:
        ratios = [run_speed_up(results, run) for run in runs]
    except MissingDataError:  # not timed
        return NOT_MEASURED
    allowed = statistics.fmean(_saved(ceiling) for _, ceiling in ratios)
    return f"{_spread([_saved(measured) for measured, _ in ratios], '.1f')} ({_number(allowed, '.1f')})"


def _flops_saved(results: Results, runs: Sequence[RunRow]) -> str:
    try:
        return _spread([_saved(baseline_of(results, run).flops / run.flops) for run in runs], ".1f")
    except MissingDataError:  # a seed without full training
        return NOT_MEASURED


def _saved(ratio: float) -> float:
    """Percent, of a speed-up."""
    return 100 * (1 - 1 / ratio)


def _is_timed_as_another(results: Results, variant: str) -> bool:
    """Whether a phase after the switch takes another variant's steps."""
    phases = [(run, row.phase) for run in results.of(variant) for row in results.epochs.get((variant, run.seed), ())]
    try:
        return any(phase_time(results, run, phase).source not in (variant, BASELINE) for run, phase in set(phases))
    except MissingDataError:  # not timed at all
        return False


def _difference(found: Sample | None) -> str:
    if found is None:
        return NOT_MEASURED
    if found.n == 1:
        return f"{signed(found.mean)} (one seed)"
    low, high = found.mean - found.half_width, found.mean + found.half_width
    return f"{signed(found.mean)} [{signed(low)}, {signed(high)}]"


def _spread(values: Sequence[float], form: str) -> str:
    """Mean ± sd over seeds; a dash if one was not measured."""
    if not all(map(math.isfinite, values)):
        return NOT_MEASURED
    sample = Sample(tuple(values))
    return _number(sample.mean, form) + (f" ± {sample.sd:{form}}" if sample.n > 1 else "")


def _number(value: float, form: str) -> str:
    return f"{value:{form}}".replace("-", "−") if math.isfinite(value) else NOT_MEASURED


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]
