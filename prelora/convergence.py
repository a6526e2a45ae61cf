"""Algorithm 1, the partial convergence test, and its like on update ranks, as pure functions on numbers.

Norms are given per group, per monitored epoch and per layer: ``norms[group][epoch][layer]``.
Epochs fall into windows of ``m``; an incomplete last window is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prelora.config import PreLoRAConfig

NEAR_ZERO = 1e-12

History = Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Verdict:
    """What Algorithm 1 found, and the numbers behind it."""

    passed: bool
    reason: str
    """One sentence: why it did not pass, or that it did."""
    norm_changes: dict[str, tuple[float, ...]]
    """Each group's k − 1 changes between consecutive windows, in percent; NaN where undefined."""
    loss_changes: tuple[float, ...]
    """The loss's k − 1 changes between consecutive windows, in percent; NaN where undefined."""
    update_ranks: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Each group's mean stable rank of the last k − 1 windows' changes; empty unless it is the criterion."""


def percent_change(previous: float, current: float) -> float:
    """Return (current − previous) / |previous| · 100; NaN if either is not finite or about 0."""
    if not (math.isfinite(previous) and math.isfinite(current)) or min(abs(previous), abs(current)) < NEAR_ZERO:
        return math.nan
    return (current - previous) / abs(previous) * 100


def window_values(values: Sequence[float], m: int, window: str) -> list[float]:
    """One value per complete window of ``m`` epochs: their mean, or the last (``window="last"``)."""
    starts = range(0, len(values) - m + 1, m)
    if window == "last":
        return [values[start + m - 1] for start in starts]
    return [_mean(values[start : start + m]) for start in starts]


def layer_windows(epochs: Sequence[Sequence[float]], m: int, window: str) -> list[list[float]]:
    """``epochs[epoch][layer]`` → ``[layer][window]``."""
    return [window_values(layer, m, window) for layer in zip(*epochs, strict=True)]


def layer_changes(epochs: Sequence[Sequence[float]], config: PreLoRAConfig) -> list[float]:
    """Each layer's signed norm change between the last two windows, in percent: Algorithm 2's input.

    Before two windows are complete (a switch forced by ``deadline``) the last two epochs stand in.

    Raises:
        ValueError: fewer than two epochs.
    """
    if len(epochs) < 2:
        raise ValueError(f"{len(epochs)} monitored epochs: ranks need at least 2")
    m = config.m if len(epochs) >= 2 * config.m else 1
    return [percent_change(layer[-2], layer[-1]) for layer in layer_windows(epochs, m, config.window)]


def group_changes(epochs: Sequence[Sequence[float]], config: PreLoRAConfig) -> list[float]:
    """A group's change between all consecutive windows, in percent (Algorithm 1, line 5)."""
    layers = layer_windows(epochs, config.m, config.window)
    if config.aggregate == "mean_abs":
        per_layer = [[abs(percent_change(a, b)) for a, b in itertools.pairwise(layer)] for layer in layers]
        return [_mean(changes) for changes in zip(*per_layer, strict=True)]
    means = [_mean(norms) for norms in zip(*layers, strict=True)]
    return [percent_change(a, b) for a, b in itertools.pairwise(means)]


def partial_convergence_test(
    norms: History, losses: Sequence[float], config: PreLoRAConfig, update_ranks: History | None = None
) -> Verdict:
    """Algorithm 1 on the last ``config.k`` complete windows.

    Passes iff every group's |ΔW| ≤ tau and |ΔL| ≤ zeta between all consecutive windows. A change that is
    undefined (a value that is not finite, or about zero) does not pass; nothing is raised for it.

    With ``criterion="update_rank"`` the norms' part is another: every group's mean over layers of the stable rank of
    the weights' change over a window must be at most ``update_rank_max``, in each of the last k − 1 windows.

    Args:
        norms: ``norms[group][epoch][layer]``, Frobenius norms of the monitored epochs.
        losses: mean training loss of the same epochs.
        update_ranks: ``update_ranks[group][window][layer]``, the last complete window last.

    Raises:
        ValueError: no groups, groups and losses of different length, or a group without the same layers throughout;
            fewer than k − 1 windows of update ranks where they are the criterion.
    """
    if not norms:
        raise ValueError("norms is empty: Algorithm 1 needs at least one group")
    for group, epochs in norms.items():
        if len(epochs) != len(losses):
            raise ValueError(f"group {group!r} has {len(epochs)} epochs of norms, and there are {len(losses)} losses")
        layers = {len(epoch) for epoch in epochs}
        if 0 in layers or len(layers) > 1:
            raise ValueError(f"group {group!r} has {sorted(layers)} layers: needs the same number, not 0, each epoch")
    complete = len(losses) // config.m
    if complete < config.k:
        return Verdict(False, f"{complete} of {config.k} windows complete", {}, ())
    used = slice((complete - config.k) * config.m, complete * config.m)
    loss_windows = window_values(losses[used], config.m, config.window)
    loss_changes = tuple(percent_change(a, b) for a, b in itertools.pairwise(loss_windows))
    norm_changes = {group: tuple(group_changes(epochs[used], config)) for group, epochs in norms.items()}
    if config.criterion == "update_rank":
        means = _mean_update_ranks(norms, update_ranks or {}, config.k - 1)
        reason = _first_high_rank(means, config) or _first_failure({}, loss_changes, config)
        within = "every update is within update_rank_max, and the loss within zeta"
        return Verdict(reason is None, reason or within, norm_changes, loss_changes, means)
    reason = _first_failure(norm_changes, loss_changes, config)
    return Verdict(reason is None, reason or "every change is within tau and zeta", norm_changes, loss_changes)


def _mean_update_ranks(groups: Iterable[str], ranks: History, windows: int) -> dict[str, tuple[float, ...]]:
    for group in groups:
        if len(known := ranks.get(group, ())) < windows:
            raise ValueError(f"group {group!r} has update ranks of {len(known)} windows: the test needs {windows}")
    return {group: tuple(_mean(layers) for layers in ranks[group][-windows:]) for group in groups}


def _first_high_rank(means: Mapping[str, Sequence[float]], config: PreLoRAConfig) -> str | None:
    for group, windows in means.items():
        for t, rank in enumerate(windows, start=2):
            if not rank <= config.update_rank_max:  # also true for NaN
                update = f"update of {group} in window {t} of {config.k}"
                if math.isnan(rank):
                    return f"{update} has no stable rank (a layer did not move, or a value is not finite)"
                return f"{update} has stable rank {rank:.3f}: over update_rank_max = {config.update_rank_max}"
    return None


def joined(verdicts: Mapping[tuple[str, ...], Verdict]) -> Verdict:
    """The verdicts of several units of groups as one, passed if all are.

    Args:
        verdicts: by the unit's groups. A reason that they do not all share stands behind its groups.
    """
    units: dict[str, list[str]] = {}
    for groups, verdict in verdicts.items():
        units.setdefault(verdict.reason, []).extend(groups)
    told = [reason if len(units) == 1 else f"{', '.join(groups)}: {reason}" for reason, groups in units.items()]
    return Verdict(
        all(verdict.passed for verdict in verdicts.values()),
        "; ".join(told),
        {group: changes for verdict in verdicts.values() for group, changes in verdict.norm_changes.items()},
        next((verdict.loss_changes for verdict in verdicts.values() if verdict.loss_changes), ()),
        {group: ranks for verdict in verdicts.values() for group, ranks in verdict.update_ranks.items()},
    )


def _first_failure(
    norm_changes: Mapping[str, Sequence[float]], loss_changes: Sequence[float], config: PreLoRAConfig
) -> str | None:
    rows = [(f"norm of {group}", steps, "tau", config.tau) for group, steps in norm_changes.items()]
    for what, steps, name, threshold in [*rows, ("loss", loss_changes, "zeta", config.zeta)]:
        for t, change in enumerate(steps, start=2):
            if not abs(change) <= threshold:  # also true for NaN
                between = f"between windows {t - 1} and {t} of {config.k}"
                if math.isnan(change):
                    return f"{what}: change {between} is undefined (a value is not finite, or about zero)"
                return f"{what} changed by {change:+.3f} % {between}: over {name} = {threshold} %"
    return None


def _mean(values: Sequence[float]) -> float:
    if not all(math.isfinite(value) for value in values):
        return math.nan
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # the sum is beyond the largest float
        return math.nan
