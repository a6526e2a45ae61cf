"""Which thresholds switch when: exact, because every test's smallest passing tau and zeta are known.

The changes that Algorithm 1 compares do not depend on the thresholds. So a pair (tau, zeta) switches after the first
window whose own pair is at or below it, and larger ones never switch later.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prelora.analysis.replay import Replay

DIGITS = 4
"""Significant digits of a proposed threshold, where rounding up to them does not move the switch."""


@dataclass(frozen=True)
class Suggestion:
    """Thresholds in percent, and where they switch."""

    tau: float
    zeta: float
    switch_epoch: int
    """Finished epochs."""
    saved: float | None = None
    """Share of the whole run's FLOPs; None: not asked for."""


def switch_epoch(replayed: Replay, tau: float, zeta: float) -> int | None:
    """Finished epochs when these thresholds, in percent, switch; None: not within the log."""
    config, last = replayed.config, len(replayed.log.losses)
    passed = [w.epoch for w in replayed.windows if w.epoch >= config.min_epoch and w.passes(tau, zeta)]
    forced = [config.deadline] if config.deadline is not None and config.deadline <= last else []
    return min(passed + forced, default=None)


def grid(replayed: Replay, taus: Sequence[float], zetas: Sequence[float]) -> list[list[int | None]]:
    """``[tau][zeta]`` → finished epochs at the switch."""
    return [[switch_epoch(replayed, tau, zeta) for zeta in zetas] for tau in taus]


def reachable(replayed: Replay) -> list[Suggestion]:
    """Every epoch after which some thresholds switch by the test, with the smallest that do."""
    found = []
    for window in replayed.windows:
        if not (math.isfinite(window.tau) and math.isfinite(window.loss)):
            continue
        # Anything that passes here is at or above this pair: if the pair switches earlier, so does all of it.
        if switch_epoch(replayed, window.tau, window.loss) == window.epoch:
            found.append(_rounded_up(replayed, window.tau, window.loss, window.epoch))
    return found


def suggest_switch(replayed: Replay, first: int, last: int) -> list[Suggestion]:
    """The smallest thresholds for each reachable switch after ``first`` to ``last`` epochs, nearest the middle first.

    Raises:
        ValueError: no thresholds switch there; the message says where some do.
    """
    every = reachable(replayed)
    inside = [one for one in every if first <= one.switch_epoch <= last]
    if not inside:
        epochs = ", ".join(str(one.switch_epoch) for one in every) or "none"
        raise ValueError(
            f"no thresholds switch {replayed.log.name} after {first} to {last} epochs; reachable are: {epochs}"
        )
    return sorted(inside, key=lambda one: abs(2 * one.switch_epoch - first - last))


def suggest_saving(replayed: Replay, wanted: float, saved_at: Callable[[int], float]) -> Suggestion:
    """The latest switch that still saves ``wanted``: no smaller pair of thresholds does.

    Args:
        wanted: share of the FLOPs of the whole run, all in FULL.
        saved_at: that share for a switch after so many epochs, with the ranks assigned there.

    Raises:
        ValueError: no switch in the log saves as much; the message says the most that one does.
    """
    priced = [dataclasses.replace(one, saved=saved_at(one.switch_epoch)) for one in reachable(replayed)]
    enough = [one for one in priced if one.saved is not None and one.saved >= wanted]
    if not enough:
        most = max((one.saved for one in priced if one.saved is not None), default=0.0)
        raise ValueError(
            f"suggest-saving = {wanted:g}: no switch in {replayed.log.name} saves as much; the most is {most:.4f}"
        )
    return max(enough, key=lambda one: one.switch_epoch)


def _rounded_up(replayed: Replay, tau: float, zeta: float, epoch: int) -> Suggestion:
    """Few digits where they switch at the same epoch, all of them otherwise."""
    for pair in ((_up(tau), _up(zeta)), (_up(tau), zeta), (tau, _up(zeta))):
        if all(pair) and switch_epoch(replayed, *pair) == epoch:
            return Suggestion(*pair, epoch)
    return Suggestion(tau or math.ulp(0.0), zeta or math.ulp(0.0), epoch)  # 0 is not a threshold


def _up(value: float) -> float:
    if value == 0:
        return 10.0**-DIGITS
    step = DIGITS - 1 - math.floor(math.log10(value))
    rounded = round(value, step)
    return rounded if rounded >= value else round(rounded + 10.0**-step, step)
