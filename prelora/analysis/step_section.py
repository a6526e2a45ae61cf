"""The report's section on where a step's time goes, and at what rate it computes."""

from __future__ import annotations

import math

from prelora.analysis.markup import NOTHING, Html, number, paragraph, percent, section, size, table
from prelora.analysis.records import Run
from prelora.analysis.sections import NAMES
from prelora.analysis.summary import PhaseSummary, Spread, summarize_phases

NOTE = (
    "Shares of the time of the phase's steps. Communication is what of it the backward pass does not hide, and the "
    "ranks' agreement on each step. FLOP/s: FLOPs per image of the phase times images, over the time not spent waiting "
    "for images; the peak is that of one large matrix product, measured on the same ranks when the run began."
)


def step_section(run: Run) -> Html:
    """Each phase's step by part, its rates with and without waiting for images, and what it sends."""
    summaries = [summary for summary in summarize_phases(run) if summary.parts]
    if not summaries:
        return Html("")
    parts = list(summaries[0].parts)
    several = any(summary.communication for summary in summaries)
    headers = ["", *(part.capitalize() for part in parts), "Images/s without the wait", "GFLOP/s", "of the peak"]
    headers += ["Sent per step and rank"] if several else []
    rows = [_row(run, summary, parts, several) for summary in summaries]
    return section("Where a step's time goes", table(headers, rows), paragraph(NOTE, kind="note"))


def _row(run: Run, summary: PhaseSummary, parts: list[str], several: bool) -> list[object]:
    rate = summary.flop_per_s
    sent = ", ".join(f"{size(count)} {kind.replace('_', '-')}" for kind, count in summary.communication.items())
    return [
        NAMES[summary.phase],
        *(percent(summary.parts.get(part)) for part in parts),
        _median(summary.computing),
        number(rate.median / 1e9) if rate else NOTHING,
        percent(rate.median / run.info.peak) if rate and math.isfinite(run.info.peak) else NOTHING,
        *([sent or NOTHING] if several else []),
    ]


def _median(spread: Spread | None) -> str:
    return number(spread.median) if spread else NOTHING
