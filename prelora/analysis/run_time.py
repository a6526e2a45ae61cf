"""How long a whole run is predicted to take, beside the full-rank baseline and what the FLOPs allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prelora.analysis.planner import Plan
from prelora.data import imagenet
from prelora.units import PHASES


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a run is in which phase.

    Raises:
        ValueError: epochs that do not fit each other.
    """

    epochs: int = 300
    switch: int = 150
    """Epochs in FULL."""
    warmup: int = 10
    """Epochs in WARMUP."""
    images: int = imagenet.TRAIN_IMAGES
    """Training images of an epoch."""

    def __post_init__(self) -> None:
        if not 0 <= self.switch <= self.epochs or self.warmup < 0:
            raise ValueError(f"switch after {self.switch} of {self.epochs} epochs: accepted are 0 to {self.epochs}")

    @property
    def in_phase(self) -> dict[str, int]:
        """Epochs of each phase."""
        warmup = min(self.warmup, self.epochs - self.switch)
        return {"full": self.switch, "warmup": warmup, "lora": self.epochs - self.switch - warmup}


@dataclass(frozen=True)
class RunTime:
    """Predicted seconds, and speed-ups over the full-rank baseline with the most that FLOPs allow."""

    steps_per_epoch: int
    seconds: float
    baseline: float
    ceiling: float
    """Baseline's FLOPs over the run's."""

    @property
    def speedup(self) -> float:
        """Baseline's time over the run's."""
        return self.baseline / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "speedup": self.speedup}


def run_time(plan: Plan, schedule: Schedule) -> RunTime:
    """Training alone, without evaluation, checkpoints and waiting for data.

    Raises:
        ValueError: the plan has no times, or its batch is larger than an epoch.
    """
    steps = schedule.images // plan.global_batch
    if steps == 0:
        raise ValueError(f"the global batch of {plan.global_batch} is larger than the {schedule.images} images")
    epochs = schedule.in_phase
    step: dict[str, float] = {}
    for name, phase in plan.phases.items():
        if phase.time is None:
            raise ValueError("run_time() of a plan without times: make_plan(timed=True)")
        step[name] = phase.time.total
    flops = {name: phase.flops for name, phase in plan.phases.items()}
    return RunTime(
        steps_per_epoch=steps,
        seconds=steps * _over_phases(step, epochs),
        baseline=steps * step["full"] * schedule.epochs,
        ceiling=flops["full"] * schedule.epochs / _over_phases(flops, epochs),
    )


def _over_phases(each: Mapping[str, float], epochs: Mapping[str, int]) -> float:
    return sum(each[name] * epochs[name] for name in PHASES)
