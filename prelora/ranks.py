"""Algorithm 2, rank assignment, as pure functions on numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prelora.config import PreLoRAConfig
from prelora.errors import PreLoRAWarning

MIDDLE = 0.5
"""v of a layer in a group without spread: it gives the (lower) middle rank."""

NOISE = 1e-9
"""Differences up to this, relative to the largest, are rounding and not change: they decide no rank."""


@dataclass(frozen=True)
class LayerShape:
    """What of a layer bears on its rank's cost."""

    in_features: int
    out_features: int

    def lora_parameters(self, rank: int) -> int:
        """Parameters of A [rank, in] and B [out, rank]."""
        return rank * (self.in_features + self.out_features)


def rank_set(r_min: int, r_max: int) -> list[int]:
    """R: the powers of two from ``r_min`` to ``r_max`` (Algorithm 2, lines 3-6)."""
    return [1 << p for p in range(r_min.bit_length() - 1, r_max.bit_length())]


def minmax(changes: Sequence[float]) -> list[float] | None:
    """Absolute changes scaled to [0, 1] (Algorithm 2, line 10); None if they are all equal or one is not finite."""
    low, high = min(changes), max(changes)
    if not all(map(math.isfinite, changes)) or high - low <= NOISE * high:
        return None
    return [(change - low) / (high - low) for change in changes]


def quantiles(changes: Sequence[float]) -> list[float] | None:
    """Each absolute change's place among the others, in [0, 1]; ties share the mean of their places."""
    if minmax(changes) is None:
        return None
    ordered = sorted(changes)
    first = {value: ordered.index(value) for value in ordered}
    count = {value: ordered.count(value) for value in ordered}
    return [(first[change] + (count[change] - 1) / 2) / (len(changes) - 1) for change in changes]


def bucket(v: float, size: int, gamma: float = 1.0) -> int:
    """Index into R for v ** gamma, v in [0, 1] (Algorithm 2, lines 12-16, is gamma = 1).

    An edge belongs to the bucket below it, and so does what lies within ``NOISE`` above the edge: rounding v
    alone would lift 2/3 above it.
    """
    v = max(round(v, 9) - NOISE, 0.0) ** gamma
    return max(math.ceil(v * size) - 1, 0)


def cap_at_break_even(rank: int, shape: LayerShape) -> int:
    """The largest power of two below in·out/(in + out), if ``rank`` is not below that; else ``rank``.

    Raises:
        ValueError: the layer is so small that not even rank 1 is below the break-even.
    """
    n, k = shape.out_features, shape.in_features
    if rank * (n + k) < n * k:
        return rank
    if n + k >= n * k:
        raise ValueError(f"a {k} → {n} layer has its break-even rank at {n * k / (n + k):.2f}: LoRA cannot pay there")
    capped = rank
    while capped * (n + k) >= n * k:
        capped //= 2
    return capped


def assign_ranks(
    changes: Mapping[str, Mapping[str, float]],
    shapes: Mapping[str, LayerShape],
    config: PreLoRAConfig,
    *,
    total_parameters: int | None = None,
    other_trainable: int = 0,
) -> dict[str, int]:
    """Algorithm 2: a rank for every layer from its norm change between the last two windows.

    Args:
        changes: ``changes[group][layer]``, in percent, signed; layers are named as in ``shapes``.
        shapes: every layer's in and out features.
        total_parameters: parameters of the model without LoRA; needed with ``config.budget``.
        other_trainable: parameters that go on training beside LoRA, counted into the budget.

    Returns:
        The rank by layer, in the order of ``changes``; with another ``config.assignment`` than ``"change"`` what that
        makes of Algorithm 2's ranks.

    Raises:
        ValueError: an empty group, a layer in two groups, without a shape or too small for LoRA, or a budget that
            even ``r_min`` everywhere exceeds.
    """
    ranks_available = rank_set(config.r_min, config.r_max)
    values: dict[str, float] = {}
    for group, layers in changes.items():
        if twice := [layer for layer in layers if layer in values]:
            raise ValueError(f"layer {twice[0]!r} of group {group!r} is in another group too: it can have one rank")
        values |= _normalize(group, layers, config)
    missing = [layer for layer in values if layer not in shapes]
    if missing:
        raise ValueError(f"no shape for layer {missing[0]!r}: shapes has {', '.join(list(shapes)[:4])}, …")

    def wanted(gamma: float) -> dict[str, int]:
        return {layer: ranks_available[bucket(v, len(ranks_available), gamma)] for layer, v in values.items()}

    def capped(ranks: Mapping[str, int]) -> dict[str, int]:
        return {layer: cap_at_break_even(rank, shapes[layer]) for layer, rank in ranks.items()}

    if config.budget is None:
        ranks = wanted(1.0)
    elif total_parameters is None:
        raise ValueError(f"budget = {config.budget}: needs total_parameters")
    else:

        def share(gamma: float) -> float:
            plan = capped(wanted(gamma))
            lora = sum(shapes[layer].lora_parameters(rank) for layer, rank in plan.items())
            return (lora + other_trainable) / total_parameters

        ranks = wanted(_fit_budget(share, config.budget))
    result = capped(ranks)
    _warn_capped(result, ranks)
    if config.assignment == "uniform":
        return capped(dict.fromkeys(result, _uniform_rank(result, shapes)))
    if config.assignment == "reversed":
        return capped(_reversed(result, changes))
    return dict.fromkeys(result, 0) if config.assignment == "none" else result


def _normalize(group: str, layers: Mapping[str, float], config: PreLoRAConfig) -> dict[str, float]:
    if not layers:
        raise ValueError(f"group {group!r} has no layers")
    magnitudes = [abs(change) for change in layers.values()]
    scaled = quantiles(magnitudes) if config.normalize == "quantile" else minmax(magnitudes)
    if scaled is None:
        warnings.warn(
            f"group {group!r}: the norm changes of its {len(layers)} layer(s) have no spread to rank by "
            f"({', '.join(f'{change:.3g}' for change in magnitudes[:4])}…); all take the middle rank",
            PreLoRAWarning,
            stacklevel=3,
        )
        scaled = [MIDDLE] * len(layers)
    return dict(zip(layers, scaled, strict=True))


def _fit_budget(share: Callable[[float], float], budget: float) -> float:
    """The exponent on v that brings the share closest to ``budget`` from below; ranks stay monotone in v."""
    # At the low end v ** gamma is about 1, so that all but v = 0 have r_max; at the high end it is 0 even for
    # v = 1, which bucket() lowers by NOISE, so that all have r_min.
    low, high = 2.0**-20, 2.0**40
    if share(high) > budget:
        raise ValueError(
            f"budget = {budget}: the smallest plan already trains {share(high):.4f} of the parameters; "
            f"accepted is at least that, or a smaller r_min"
        )
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if share(middle) <= budget else (middle, high)
    return high


def _uniform_rank(ranks: Mapping[str, int], shapes: Mapping[str, LayerShape]) -> int:
    """The largest rank that every layer can have with no more LoRA parameters than ``ranks`` take; at least 1."""
    total = sum(shapes[layer].lora_parameters(rank) for layer, rank in ranks.items())
    return max(1, total // sum(shapes[layer].lora_parameters(1) for layer in ranks))


def _reversed(ranks: Mapping[str, int], changes: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """Each group's ranks, the largest to the layer that changed least."""
    dealt: dict[str, int] = {}
    for layers in changes.values():
        still_first = sorted(layers, key=lambda layer: abs(layers[layer]))
        dealt |= dict(zip(still_first, sorted((ranks[layer] for layer in layers), reverse=True), strict=True))
    return {layer: dealt[layer] for layer in ranks}


def _warn_capped(ranks: Mapping[str, int], wanted: Mapping[str, int]) -> None:
    capped = [layer for layer in ranks if ranks[layer] != wanted[layer]]
    if capped:
        first = capped[0]
        warnings.warn(
            f"{len(capped)} layer(s) had a rank at or above the break-even in·out/(in + out) and were capped, "
            f"as {first!r}: {wanted[first]} → {ranks[first]}",
            PreLoRAWarning,
            stacklevel=3,
        )
