"""Numbers computed from a run: what each phase cost, each speed-up and each saving beside its bound.

A speed-up is the ratio of two medians over epochs of the same run; its ceiling is the ratio of FLOPs per image.
Where one of them is unknown, ``why`` says so and there is no number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from prelora.analysis.records import Epoch, Run
from prelora.units import PHASES

FEW_EPOCHS = 3
"""With fewer epochs than this in a phase its median says little."""

STATIC_ITEMS = {"gradients": "trainable", "optimizer": "trainable", "weights": "all", "ema": "all"}
"""Items of memory, and over which parameters FULL spreads them: the trainable ones or all of the model's."""


HELD_AS = {"optimizer_state": "optimizer", "ddp_buckets": "gradients"}
"""Items released that FULL held under another name, or as much of."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some epochs' finite values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None without a finite value."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return None
        low, _, high = quantiles(finite, n=4, method="inclusive") if len(finite) > 1 else finite * 3
        return cls(median(finite), low, high, len(finite))


@dataclass(frozen=True)
class PhaseSummary:
    """What one phase cost."""

    phase: str
    epochs: int
    images_per_second: Spread | None
    computing: Spread | None
    """Images per second, not counting the time spent waiting for images."""
    flop_per_s: Spread | None
    parts: Mapping[str, float]
    """Share of a step's time by part; empty if not measured."""
    communication: Mapping[str, int]
    """Bytes that one rank hands to each kind of collective in an optimizer step."""
    seconds: Spread | None
    """Training part of an epoch."""
    seconds_per_image: float
    """Median over epochs; NaN if not measured."""
    trainable: int
    share: float
    """Trainable parameters over the model's own, LoRA not among the latter: above 1 in WARMUP."""
    peak_memory: int
    """Bytes, the largest of the phase; 0 if not measured."""
    memory: Mapping[str, int]
    """Bytes by item, at the end of the phase."""


@dataclass(frozen=True)
class SpeedUp:
    """A speed-up over FULL beside its ceiling; either may be missing, and then ``why`` says why."""

    phase: str
    """``"warmup"``, ``"lora"`` or ``"run"``, the whole run."""
    measured: float | None
    ceiling: float | None
    """What FLOPs allow on one compute-bound device."""
    why: str = ""
    epochs: tuple[int, int] = (0, 0)
    """Epochs measured: in FULL and in the phase."""
    communication: float | None = None
    """What the bytes between ranks allow where nothing but the network counts; None for one rank."""

    @property
    def of_ceiling(self) -> float | None:
        """Measured over ceiling."""
        return None if self.measured is None or self.ceiling is None else self.measured / self.ceiling

    @property
    def of_gain(self) -> float | None:
        """Share of the possible gain that was reached, (measured − 1) / (ceiling − 1).

        None if no gain is possible, or none was measured.
        """
        if self.measured is None or self.ceiling is None or self.ceiling - 1 < 1e-3 or self.measured < 1:
            return None
        return (self.measured - 1) / (self.ceiling - 1)

    @property
    def exceeds(self) -> bool:
        """Whether more was measured than FLOPs and communication allow."""
        if self.measured is None or self.ceiling is None:
            return False
        return self.measured > max(self.ceiling, self.communication or 0.0)


@dataclass(frozen=True)
class Saving:
    """Memory saved, in bytes, beside the most that could be; ``bound`` is None where none is known."""

    item: str
    measured: int
    bound: int | None


def summarize_phases(run: Run) -> list[PhaseSummary]:
    """Each phase that has an epoch, in order."""
    return [_summarize(run, phase) for phase in PHASES if run.in_phase(phase)]


def _summarize(run: Run, phase: str) -> PhaseSummary:
    epochs = run.in_phase(phase)
    per_image = Spread.of([epoch.seconds / epoch.images for epoch in epochs if epoch.images])
    return PhaseSummary(
        phase=phase,
        epochs=len(epochs),
        images_per_second=Spread.of([epoch.img_per_s for epoch in epochs]),
        computing=Spread.of([epoch.img_per_s_computing for epoch in epochs]),
        flop_per_s=Spread.of([epoch.flop_per_s for epoch in epochs]),
        parts=_shares(epochs),
        communication=epochs[-1].communication,
        seconds=Spread.of([epoch.seconds for epoch in epochs]),
        seconds_per_image=per_image.median if per_image else math.nan,
        trainable=epochs[-1].trainable,
        share=epochs[-1].trainable / run.info.parameters if run.info.parameters else math.nan,
        peak_memory=max(epoch.peak_memory for epoch in epochs),
        memory=epochs[-1].memory,
    )


def _shares(epochs: Sequence[Epoch]) -> dict[str, float]:
    spent: Counter[str] = Counter()
    for epoch in epochs:
        spent.update({part: seconds for part, seconds in epoch.parts.items() if math.isfinite(seconds)})
    total = sum(spent.values())
    return {part: seconds / total for part, seconds in spent.items()} if total else {}


def traffic(communication: Mapping[str, int]) -> int:
    """Bytes that cross a rank's links in a step, as rings over many ranks move them: an all-reduce's twice."""
    return sum(2 * size if kind == "all_reduce" else size for kind, size in communication.items())


def speed_ups(run: Run) -> list[SpeedUp]:
    """Speed-up over FULL of WARMUP, of LORA and of the whole run."""
    phases = {summary.phase: summary for summary in summarize_phases(run)}
    found = [_phase_speed_up(run, phases, phase) for phase in PHASES[1:] if phase in phases]
    return [*found, _run_speed_up(run, phases)] if found else []


def _phase_speed_up(run: Run, phases: Mapping[str, PhaseSummary], phase: str) -> SpeedUp:
    why = _missing(run, phases, [phase])
    if why:
        return SpeedUp(phase, None, None, why)
    full, here = phases["full"].images_per_second, phases[phase].images_per_second
    if full is None or here is None or full.median <= 0:
        return SpeedUp(phase, None, None, "no images per second were measured")
    ceiling = run.flops["full"] / run.flops[phase]
    less = _less_traffic(phases["full"], [phases[phase]])
    return SpeedUp(phase, here.median / full.median, ceiling, epochs=(full.count, here.count), communication=less)


def _run_speed_up(run: Run, phases: Mapping[str, PhaseSummary]) -> SpeedUp:
    """All epochs at FULL's median time per image, over each at its own phase's."""
    why = _missing(run, phases, list(phases))
    if not why and any(not summary.seconds_per_image > 0 for summary in phases.values()):
        why = "no seconds per image were measured in some phase"
    if why:
        return SpeedUp("run", None, None, why)
    count = sum(summary.epochs for summary in phases.values())
    spent = sum(summary.epochs * summary.seconds_per_image for summary in phases.values())
    flops = sum(summary.epochs * run.flops[phase] for phase, summary in phases.items())
    measured = count * phases["full"].seconds_per_image / spent
    ceiling, less = count * run.flops["full"] / flops, _less_traffic(phases["full"], list(phases.values()))
    return SpeedUp("run", measured, ceiling, epochs=(phases["full"].epochs, count), communication=less)


def _less_traffic(full: PhaseSummary, phases: Sequence[PhaseSummary]) -> float | None:
    """FULL's bytes between ranks over those of ``phases``, epoch by epoch; None where a step sends none."""
    sent = sum(phase.epochs * traffic(phase.communication) for phase in phases)
    return traffic(full.communication) * sum(phase.epochs for phase in phases) / sent if sent else None


def _missing(run: Run, phases: Mapping[str, PhaseSummary], needed: Sequence[str]) -> str:
    if "full" not in phases:
        return "no epoch was trained in FULL, so there is nothing to compare with"
    for phase in ("full", *needed):
        if not run.flops.get(phase, math.nan) > 0:
            return f"the FLOPs per image of {phase.upper()} were not counted, so its ceiling is unknown"
    return ""


def frozen_parameters(run: Run) -> int | None:
    """Parameters that stopped training at the freeze, from the counts the run wrote; None if it did not get there."""
    full, lora = run.in_phase("full"), run.in_phase("lora")
    if not full or not lora:
        return None
    ranks = lora[-1].event.ranks
    adapters = sum(target.lora_parameters(ranks[target.name]) for target in run.info.targets if target.name in ranks)
    return full[-1].trainable + adapters - lora[-1].trainable


def released_memory(run: Run) -> list[Saving]:
    """Memory released as the base was frozen, by item, beside the frozen parameters' share of that item in FULL."""
    if run.freeze is None:
        return []
    bounds, released = _static_bounds(run), Counter[str]()
    for epoch in run.epochs:
        released.update(epoch.event.released)
    return [Saving(item, size, bounds.get(HELD_AS.get(item, item))) for item, size in released.items()]


def peak_saving(run: Run) -> Saving | None:
    """Fall of the peak from FULL to LORA (negative: a rise), beside the most that gradients and optimizer can give."""
    phases = {summary.phase: summary for summary in summarize_phases(run)}
    bounds = _static_bounds(run)
    if not bounds or not phases["full"].peak_memory or not phases["lora"].peak_memory:
        return None
    bound = bounds.get("gradients", 0) + bounds.get("optimizer", 0)
    return Saving("peak", phases["full"].peak_memory - phases["lora"].peak_memory, bound)


def _static_bounds(run: Run) -> dict[str, int]:
    frozen, full = frozen_parameters(run), run.in_phase("full")
    if frozen is None:
        return {}
    held_by = {"trainable": full[-1].trainable, "all": run.info.parameters}
    return {
        item: round(size * frozen / held_by[STATIC_ITEMS[item]])
        for item, size in full[-1].memory.items()
        if item in STATIC_ITEMS and held_by[STATIC_ITEMS[item]]
    }


def item_name(item: str) -> str:
    """An item of memory as readers know it."""
    return {"ema": "EMA", "lora": "LoRA", "w_eff": "merged W + s·B·A", "ddp_buckets": "DDP buckets"}.get(
        item, item.replace("_", " ")
    )


def group_means(run: Run, values: Callable[[Epoch], Mapping[str, float]]) -> dict[str, list[float]]:
    """Mean over each group's targets, one value per epoch; NaN where the epoch has none."""
    names = {group: [t.name for t in run.info.targets if t.group == group] for group in run.info.groups}
    found = [values(epoch) for epoch in run.epochs]
    return {group: [_mean_of(epoch, members) for epoch in found] for group, members in names.items()}


def layer_means(run: Run, group: str, values: Callable[[Epoch], Mapping[str, float]]) -> dict[int, list[float]]:
    """Mean over the group's targets in each layer, one value per epoch; NaN where the epoch has none."""
    layers: dict[int, list[str]] = {}
    for target in run.info.targets:
        if target.group == group:
            layers.setdefault(target.layer, []).append(target.name)
    found = [values(epoch) for epoch in run.epochs]
    return {layer: [_mean_of(epoch, layers[layer]) for epoch in found] for layer in sorted(layers)}


def _mean_of(values: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(values.get(name, math.nan) for name in names) / len(names)


def rank_grid(run: Run) -> tuple[list[str], list[int], list[list[int | None]]]:
    """Ranks as rows of a grid: (row labels, layers, rank[row][layer]); None where a layer has no such target.

    A group with several targets in a layer has a row for each.
    """
    cells: dict[tuple[str, int], dict[int, int]] = {}
    taken: Counter[tuple[str, int]] = Counter()
    for target in run.info.targets:
        if target.name in run.ranks:
            place = taken[target.group, target.layer]
            taken[target.group, target.layer] += 1
            cells.setdefault((target.group, place), {})[target.layer] = run.ranks[target.name]
    layers = sorted({layer for row in cells.values() for layer in row})
    many = {group for group, place in cells if place}
    ordered = sorted(cells, key=lambda key: (run.info.groups.index(key[0]), key[1]))
    labels = [f"{group} {place + 1}" if group in many else group for group, place in ordered]
    return labels, layers, [[cells[key].get(layer) for layer in layers] for key in ordered]
