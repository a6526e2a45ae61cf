"""Replays as tables that are read in a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from prelora.analysis.drawing import byte_unit
from prelora.analysis.replay import Replay, Window
from prelora.analysis.replay_costs import Costs
from prelora.analysis.replay_thresholds import Suggestion
from prelora.config import PreLoRAConfig
from prelora.targets import by_group

COLUMNS = ("run", "k", "m", "tau %", "zeta %", "switch", "recorded", "mean rank", "trains", "FLOPs", "time*", "freed")


@dataclass(frozen=True)
class Outcome:
    """A replay with what its switch would bring."""

    replayed: Replay
    ranks: dict[str, int]
    """By target; empty without a switch."""
    costs: Costs | None
    """None without a switch, and where the log has no model."""


def describe_runs(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each run, and what the columns mean."""
    rows = [COLUMNS, *(_run_cells(outcome) for outcome in outcomes)]
    notes = [
        "",
        "switch, recorded: epochs in FULL before it, replayed and in the run itself; trains: parameters in LORA over "
        "the model's;",
        "FLOPs, time: saved of the whole run against as many epochs in FULL; freed: gradients and optimizer state of "
        "what is frozen.",
        "* the ceiling: FULL's measured images a second times the ratio of FLOPs; a real run gains less.",
    ]
    unswitched = [outcome.replayed for outcome in outcomes if outcome.replayed.switch_epoch is None]
    stopped = [f"{one.log.name}: no switch; {one.log.stopped_by}. Last test: {one.reason}." for one in unswitched]
    without = [
        f"{outcome.replayed.log.name}: no shapes in the log, so that no rank is capped at its break-even."
        for outcome in outcomes
        if outcome.replayed.log.run is None and outcome.ranks
    ]
    return [*_aligned(rows), *notes, *stopped, *without, *_group_switches(outcomes)]


def _group_switches(outcomes: Sequence[Outcome]) -> list[str]:
    """Of ``switch="per_group"``: after which epoch each group switches."""
    told = []
    for replayed in (one.replayed for one in outcomes if one.replayed.config.switch == "per_group"):
        at = [f"{group} {replayed.switch_epochs.get(group, '-')}" for group in by_group(replayed.log.targets)]
        told.append(
            f"{replayed.log.name}, per group: {', '.join(at)}. The first is exact; the others are as if all had gone "
            f"on in FULL. FLOPs, time and memory are not predicted."
        )
    return told


def describe_windows(replayed: Replay) -> list[str]:
    """Every test up to the switch: what held it back, and the smallest thresholds that pass there."""
    config, last = replayed.config, replayed.switch_epoch or len(replayed.log.losses)
    shown = [window for window in replayed.windows if window.epoch <= last]
    if not shown:
        return ["", f"No test: {replayed.reason}."]
    what, points = "tau %", "in percentage points"
    if config.criterion == "update_rank":
        what, points = "update_rank_max", "in ranks, and the loss in percentage points"
    rows = [("epoch", f"passes from {what}", "zeta %", f"held back by, {points}")]
    rows += [(str(w.epoch), _percent(w.tau), _percent(w.loss), _held_back(w, config)) for w in shown]
    return ["", *_aligned(rows, left=(3,))]


def describe_ranks(outcome: Outcome, *, every: bool) -> list[str]:
    """Ranks by group, as counts of each rank; with ``every``, those of all targets too."""
    ranks = outcome.ranks
    targets = [target for target in outcome.replayed.log.targets if target.name in ranks]
    if not ranks:
        return []
    groups = {target.group: [ranks[one.name] for one in targets if one.group == target.group] for target in targets}
    rows = [("group", "mean rank", "ranks")]
    for group, members in groups.items():
        counts = ", ".join(f"{members.count(rank)} × {rank}" for rank in sorted(set(members)))
        rows.append((group, f"{mean(members):.1f}", counts))
    listed = [("target", "rank"), *((name, str(rank)) for name, rank in ranks.items())] if every else []
    return ["", *_aligned(rows, left=(0, 2)), *([""] if every else []), *_aligned(listed)]


def describe_costs(costs: Costs | None) -> list[str]:
    """Time by phase, beside as many epochs in FULL."""
    if costs is None:
        return []
    rows = [("phase", "epochs", "FLOPs of FULL", "minutes*")]
    for phase, epochs in costs.epochs.items():
        share = getattr(costs.flops, phase) / costs.flops.full
        rows.append((phase.upper(), str(epochs), f"{100 * share:.1f} %", f"{costs.seconds[phase] / 60:.3g}"))
    rows.append(("all FULL", str(sum(costs.epochs.values())), "100.0 %", f"{costs.baseline / 60:.3g}"))
    return ["", *_aligned(rows)]


def describe_grid(taus: Sequence[float], zetas: Sequence[float], epochs: Sequence[Sequence[int | None]]) -> list[str]:
    """Switch epochs over tau (down) × zeta (across), both in percent."""
    rows = [("tau % \\ zeta %", *(f"{zeta:.4g}" for zeta in zetas))]
    for tau, line in zip(taus, epochs, strict=True):
        rows.append((f"{tau:.4g}", *("-" if epoch is None else str(epoch) for epoch in line)))
    return ["", "epochs in FULL before the switch; -: none within the log", *_aligned(rows)]


def describe_suggestions(suggestions: Sequence[Suggestion]) -> list[str]:
    """Thresholds in percent with their switch; the others for a wanted switch are alternatives to the first."""
    lines = [""]
    for place, one in enumerate(suggestions):
        alternative = "  or " if place and one.saved is None else ""
        saved = "" if one.saved is None else f" and saves {100 * one.saved:.2f} % of the whole run's FLOPs"
        lines.append(
            f"{alternative}--tau {one.tau!r} --zeta {one.zeta!r} switches after epoch {one.switch_epoch}{saved}"
        )
    return lines


def _run_cells(outcome: Outcome) -> tuple[str, ...]:
    replayed, costs = outcome.replayed, outcome.costs
    config, run = replayed.config, replayed.log.run
    recorded = run.switch.epoch if run is not None and run.switch is not None else None
    tau = f"{config.tau:.4g}" if config.criterion == "norm" else "-"
    thresholds = (str(config.k), str(config.m), tau, f"{config.zeta:.4g}")
    switches = ["-" if epoch is None else str(epoch) for epoch in (replayed.switch_epoch, recorded)]
    rank = f"{mean(outcome.ranks.values()):.1f}" if outcome.ranks else "-"
    gains = ["-"] * 4
    if costs is not None:
        unit, name = byte_unit(costs.freed)
        gains = [f"{100 * share:.2f} %" for share in (costs.share, costs.flops_saved)]
        gains += [f"{(costs.baseline - sum(costs.seconds.values())) / 60:.3g} min", f"{costs.freed / unit:.3g} {name}"]
    return (replayed.log.name, *thresholds, *switches, rank, *gains)


def _held_back(window: Window, config: PreLoRAConfig) -> str:
    over: Mapping[str, float] = window.held_back(config)
    if over:
        return ", ".join(f"{what} +{_percent(points)}" for what, points in over.items())
    return f"nothing, but min_epoch = {config.min_epoch}" if window.epoch < config.min_epoch else "nothing: passes"


def _percent(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "undefined"


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
