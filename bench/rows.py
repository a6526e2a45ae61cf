"""From the times of interleaved rounds to rows: medians, quartiles, and ratios paired within each round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.bounds import Bound
from bench.interleave import WHOLE, NotRun, Role, Samples, Variant

NOTICEABLE = 0.1
"""Share of the cores taken by others above which a row counts as disturbed."""


@dataclass(frozen=True)
class Spread:
    """A median between its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def half(self) -> float:
        """Half the distance between the quartiles."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Row:
    """What was measured of one part of one variant."""

    suite: str
    cell: str
    part: str
    variant: str
    role: Role = "ours"
    unit: str = "ms"
    value: Spread | None = None
    """None: not run."""
    rounds: int = 0
    peers: dict[str, Spread] = field(default_factory=dict)
    """Value over that of each other peer, the median of the ratios within a round."""
    bound: Spread | None = None
    """Value over the bound."""
    basis: str = ""
    """What the bound is made of."""
    items: dict[str, float] = field(default_factory=dict)
    """What the value is the sum of, in the same unit."""
    note: str = ""
    not_run: str = ""
    """Why there is no value."""
    others: float | None = None
    """Share of the cores that other processes took meanwhile; None: unknown."""

    @property
    def whole(self) -> bool:
        """Whether this is the variant as a whole, not its forward or backward alone."""
        return self.part not in ("forward", "backward")

    @property
    def disturbed(self) -> bool:
        """Whether others took so much that the value says more about them: where a core is taken, every parallel
        region waits for a time slice, and ratios are off by any factor, without much spread."""
        return self.value is not None and (self.others or 0.0) > NOTICEABLE

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Row:
        """The row that ``dataclasses.asdict`` made a dict of."""
        spreads = {name: Spread(**saved[name]) for name in ("value", "bound") if saved[name] is not None}
        peers = {name: Spread(**spread) for name, spread in saved["peers"].items()}
        return cls(**{**saved, **spreads, "peers": peers})


def summarize(suite: str, cell: str, variants: Sequence[Variant | NotRun], samples: Samples) -> list[Row]:
    """The rows of one cell, in the variants' order."""
    peers = [variant.name for variant in variants if isinstance(variant, Variant) and variant.role == "peer"]
    rows: list[Row] = []
    for variant in variants:
        if isinstance(variant, NotRun):
            rows.append(Row(suite, cell, "", variant.name, variant.role, not_run=variant.reason))
            continue
        note = variant.note()
        for part, seconds in samples[variant.name].items():
            bound = variant.bound
            at_best = bound and _ratios(seconds, _at_best(bound, part, samples))
            rows.append(
                Row(
                    suite,
                    cell,
                    part,
                    variant.name,
                    role=variant.role,
                    value=Spread.of([1e3 * value for value in seconds]),
                    rounds=len(seconds),
                    peers=_against(variant, part, seconds, {name: samples[name] for name in peers}),
                    bound=at_best,
                    basis=bound.basis if bound else "",
                    note=note,
                )
            )
    return rows


def _against(variant: Variant, part: str, seconds: Sequence[float], peers: Samples) -> dict[str, Spread]:
    """Ratios of one part to that of every other peer that has it."""
    if variant.role == "yardstick":
        return {}
    others = {name: theirs for name, theirs in peers.items() if name != variant.name}
    comparable = {name: theirs for name, theirs in others.items() if part in theirs or variant.within_whole}
    return {name: _paired(seconds, part, theirs) for name, theirs in comparable.items()}


def _paired(seconds: Sequence[float], part: str, other: Mapping[str, list[float]]) -> Spread:
    """Ratios to another variant's time of the same part and round."""
    return _ratios(seconds, _of(part, other))


def _at_best(bound: Bound, part: str, samples: Samples) -> list[float]:
    """Seconds of the bound in each round."""
    own = [bound.factors[part] * its for its in _of(part, samples[bound.variant])]
    return own if bound.other is None else list(map(max, own, _at_best(bound.other, part, samples)))


def _of(part: str, times: Mapping[str, list[float]]) -> list[float]:
    """A variant's times of a part; of its whole, if it has no such part."""
    return times.get(part) or times.get(WHOLE) or next(iter(times.values()))


def _ratios(seconds: Sequence[float], others: Sequence[float]) -> Spread:
    return Spread.of([mine / its for mine, its in zip(seconds, others, strict=True)])
