"""Means over seeds, their spread, and differences between variants that are paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# 97.5 % points of Student's t at 1 to 29 degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)


@dataclass(frozen=True)
class Sample:
    """Values by seed, in one unit."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float:
        """Standard deviation with n − 1; NaN for one value."""
        return statistics.stdev(self.values) if self.n > 1 else math.nan

    @property
    def half_width(self) -> float:
        """Of the mean's 95 % t confidence interval: t · sd / √n; NaN for one value.

        Raises:
            ValueError: there are more than 30 values.
        """
        return t_quantile(self.n) * self.sd / math.sqrt(self.n) if self.n > 1 else math.nan

    def told(self) -> str:
        """A difference with its interval: ``+0.12 ± 0.30``; of one value without."""
        return signed(self.mean) + (f" ± {self.half_width:.2f}" if self.n > 1 else "")


@dataclass(frozen=True)
class Band:
    """A line over x with the smallest and the largest of its seeds."""

    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    n: int
    """Seeds."""


def signed(value: float, form: str = ".2f") -> str:
    """With its sign, a minus as it is printed."""
    return f"{value:+{form}}".replace("-", "−")


def t_quantile(n: int) -> float:
    """97.5 % point of Student's t for the mean of ``n`` values, which has n − 1 degrees of freedom.

    Raises:
        ValueError: ``n`` is not in 2 to 30.
    """
    if not 2 <= n <= len(_T_975) + 1:
        raise ValueError(f"n = {n}: accepted are 2 to {len(_T_975) + 1} values")
    return _T_975[n - 2]


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Sample | None:
    """``values`` less ``baseline``, by seed, over the seeds that both have a finite value for; None: no such seed."""
    seeds = [
        seed for seed, value in values.items() if math.isfinite(value) and math.isfinite(baseline.get(seed, math.nan))
    ]
    return Sample(tuple(values[seed] - baseline[seed] for seed in sorted(seeds))) if seeds else None


def band(lines: Sequence[Mapping[float, float]]) -> Band:
    """Mean and range over ``lines``, each from x to value, at every x at which each of them is finite."""
    shared = sorted(x for x in lines[0] if all(math.isfinite(line.get(x, math.nan)) for line in lines))
    columns = [[line[x] for line in lines] for x in shared]
    return Band(
        x=tuple(shared),
        mean=tuple(map(statistics.fmean, columns)),
        low=tuple(map(min, columns)),
        high=tuple(map(max, columns)),
        n=len(lines),
    )
