"""Algorithms 1 and 2 on a finished run's log: where it would have switched, why not before, and to which ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prelora.analysis.replay_log import NormLog
from prelora.config import PreLoRAConfig
from prelora.convergence import Verdict
from prelora.monitor import Monitor
from prelora.ranks import LayerShape, assign_ranks
from prelora.units import Clocks, decide, find_units


@dataclass(frozen=True)
class Window:
    """A test at the end of a window, and the smallest thresholds at which it passes."""

    epoch: int
    """Finished epochs."""
    by_group: dict[str, float]
    """Each group's largest |change| between the windows compared, percent; infinite where one is undefined.

    With criterion "update_rank" its largest stable rank instead."""
    loss: float
    """The loss's."""

    @property
    def tau(self) -> float:
        """Percent: no smaller tau passes here."""
        return max(self.by_group.values())

    def passes(self, tau: float, zeta: float) -> bool:
        """Whether the test passes here; thresholds in percent."""
        return self.tau <= tau and self.loss <= zeta

    def held_back(self, config: PreLoRAConfig) -> dict[str, float]:
        """By what: groups and ``"loss"`` over their threshold, and by how many percentage points or ranks."""
        threshold = config.tau if config.criterion == "norm" else config.update_rank_max
        over = {group: found - threshold for group, found in self.by_group.items()} | {"loss": self.loss - config.zeta}
        return {what: points for what, points in over.items() if points > 0}


@dataclass(frozen=True)
class Replay:
    """What a config makes of a log."""

    log: NormLog
    config: PreLoRAConfig
    windows: tuple[Window, ...]
    """Every test that FULL's epochs allow, also those after the switch."""
    switch_epoch: int | None
    """Finished epochs at the first switch; None: the log ends before one."""
    reason: str
    """Of the last decision: why it switched, or did not."""
    changes: dict[str, dict[str, float]]
    """Algorithm 2's input at each group's switch: its targets' norm changes, percent; only of groups that switch."""
    switch_epochs: dict[str, int]
    """Finished epochs at each group's switch.

    With ``switch="per_group"`` exact for the first; for the others as if all had gone on in FULL, as the log did.
    """


def replay(log: NormLog, config: PreLoRAConfig) -> Replay:
    """Feed the log's FULL epochs to the monitor that a live run decides by; nothing is trained.

    Raises:
        ValueError: the criterion is "update_rank", and the log has none of these windows.
    """
    if config.criterion == "update_rank":
        _check_update_ranks(log, config)
    monitor = Monitor(log.targets, config)
    windows: list[Window] = []
    clocks = Clocks(find_units(log.targets, config.switch))
    reason, changes = "", dict[str, dict[str, float]]()
    for epoch, (loss, norms) in enumerate(zip(log.losses, log.norms, strict=True), start=1):
        if epoch > config.monitor_from:
            monitor.record(loss, norms)
        if epoch > config.monitor_from and monitor.window_complete:
            if config.criterion == "update_rank":
                monitor.record_update(log.update_ranks[epoch - 1])
            windows += _tested(epoch, monitor.test())
        if "full" in clocks.phases.values():
            verdict, switching = decide(clocks, monitor, epoch)
            reason = verdict.reason
            changes |= monitor.changes(switching)
            clocks.mark(epoch, switching, [])
    first = min(clocks.switch_epochs.values(), default=None)
    return Replay(log, config, tuple(windows), first, reason, changes, clocks.switch_epochs)


def changes_at(log: NormLog, config: PreLoRAConfig, epoch: int) -> dict[str, dict[str, float]]:
    """Algorithm 2's input, were the run to switch after ``epoch``."""
    monitor = Monitor(log.targets, config)
    for index in range(config.monitor_from, epoch):
        monitor.record(log.losses[index], log.norms[index])
    return monitor.changes()


def ranks_without_shapes(changes: Mapping[str, Mapping[str, float]], config: PreLoRAConfig) -> dict[str, int]:
    """Algorithm 2 where no shape is known, so that no rank is capped at its layer's break-even.

    Raises:
        ValueError: the config has a budget, a share of parameters that nobody counted.
    """
    side = 4 * config.r_max  # breaks even at 2 · r_max: above every rank
    shapes = {name: LayerShape(side, side) for layers in changes.values() for name in layers}
    return assign_ranks(changes, shapes, config)


def _check_update_ranks(log: NormLog, config: PreLoRAConfig) -> None:
    """Hold that the log has the update ranks of the very windows that ``config`` tests."""
    if not any(log.update_ranks):
        raise ValueError(
            f"criterion = 'update_rank': the log of {log.name} has no update ranks; accepted is a run that was itself "
            f"trained with criterion = 'update_rank' or lora_init = 'window_update'"
        )
    for name in ("m", "monitor_from"):
        here, there = getattr(config, name), getattr(log.config, name)
        if here != there:
            raise ValueError(
                f"{name} = {here}: the update ranks of {log.name} are of its own windows, accepted is {name} = {there}"
            )


def _tested(epoch: int, verdict: Verdict) -> list[Window]:
    if not verdict.norm_changes:  # fewer than k windows
        return []
    largest = {group: _largest(steps) for group, steps in (verdict.update_ranks or verdict.norm_changes).items()}
    return [Window(epoch, largest, _largest(verdict.loss_changes))]


def _largest(changes: tuple[float, ...]) -> float:
    return max(math.inf if math.isnan(change) else abs(change) for change in changes)
