"""Time several variants in one run, A B C A B C …, so that what drifts on the machine drifts for all of them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bench.bounds import Bound
from prelora.errors import ProviderError

WHOLE = "both"
"""Name of the sum of a variant's parts."""
SHORTEST = 0.002
"""Seconds that one timing lasts at least; what is faster is called several times within it."""

Role = Literal["ours", "peer", "yardstick"]
"""A peer is what ours are measured against; a yardstick only says what the machine can do."""

Samples = dict[str, dict[str, list[float]]]
"""Seconds of one call in every round, by variant and part."""


@dataclass(frozen=True)
class Variant:
    """One way to compute what the others of its cell compute too."""

    name: str
    parts: Mapping[str, Callable[[], object]]
    """What is timed, in the order in which it runs."""
    role: Role = "ours"
    bound: Bound | None = None
    summed: bool = True
    """Whether its parts together are one thing, whose time is taken as well."""
    within_whole: bool = False
    """Whether it is a share of what the peers do: its ratios are then to a peer's whole."""
    note: Callable[[], str] = str
    """Something to say beside its figures, asked for once they are taken."""


@dataclass(frozen=True)
class NotRun:
    """A variant that this machine or these options leave out, and why."""

    name: str
    reason: str
    role: Role = "ours"


class Interleaved:
    """Variants that take turns; ``warm_up`` first, then as many rounds as wanted."""

    def __init__(self, variants: Sequence[Variant | NotRun], device: torch.device) -> None:
        self.variants = list(variants)
        self.device = device
        self.samples: Samples = {}
        self._repeats: dict[str, int] = {}

    def warm_up(self, turns: int = 2) -> float:
        """Call each variant a few times, learn how often to call it in a timing; returns the seconds of one round.

        A variant that a provider refuses becomes a ``NotRun`` with the provider's reason.
        """
        for place, variant in enumerate(self.variants):
            if isinstance(variant, Variant):
                try:
                    last = [sum(self._time(variant, 1)) for _ in range(turns)][-1]
                except ProviderError as error:
                    self.variants[place] = NotRun(variant.name, str(error), variant.role)
                    continue
                self._repeats[variant.name] = min(1000, max(1, math.ceil(SHORTEST / max(last, 1e-9))))
        start = time.perf_counter()
        for variant in self.runnable:
            self._time(variant, self._repeats[variant.name])
        return time.perf_counter() - start

    @property
    def runnable(self) -> list[Variant]:
        """The variants that are timed, in their order."""
        return [variant for variant in self.variants if isinstance(variant, Variant)]

    def round(self) -> None:
        """Time every variant once, one after another."""
        gc.collect()
        for variant in self.runnable:
            seconds = self._time(variant, self._repeats.get(variant.name, 1))
            timed = dict(zip(variant.parts, seconds, strict=True))
            if variant.summed and len(timed) > 1:
                timed[WHOLE] = sum(seconds)
            for part, value in timed.items():
                self.samples.setdefault(variant.name, {}).setdefault(part, []).append(value)

    def _time(self, variant: Variant, repeats: int) -> list[float]:
        calls = list(variant.parts.values())
        timer = _time_cuda if self.device.type == "cuda" else _time_cpu
        return timer(calls, repeats)


def _time_cpu(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each call, averaged over ``repeats`` runs of them all in order."""
    totals = [0.0] * len(calls)
    for _ in range(repeats):
        last = time.perf_counter()
        for place, call in enumerate(calls):
            call()
            now = time.perf_counter()
            totals[place] += now - last
            last = now
    return [total / repeats for total in totals]


def _time_cuda(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """As ``_time_cpu``, by events on the stream: the launches of one call run while the last one computes."""
    torch.cuda.synchronize()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)] for _ in range(repeats)]
    for events in marks:
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
    torch.cuda.synchronize()
    totals = [0.0] * len(calls)
    for events in marks:
        for place in range(len(calls)):
            totals[place] += events[place].elapsed_time(events[place + 1]) / 1e3
    return [total / repeats for total in totals]
