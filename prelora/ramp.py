"""LoRA's learning rate after an injection: a linear ramp on top of any scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from prelora.optim import is_lora_group

RAMP_SHARE, RAMP_STEPS = 0.01, 500


@dataclass(frozen=True)
class Ramp:
    """A linear ramp, a pure function of the step."""

    start: int
    """Steps taken at injection."""
    length: int
    """Steps of the ramp; 0: none."""

    @classmethod
    def at(cls, step: int, total_steps: int | None) -> Ramp:
        """The ramp of an injection: 1 % of the steps that remain, or (None) of those done, at most 500."""
        remaining = total_steps - step if total_steps is not None else step
        return cls(step, min(RAMP_STEPS, round(RAMP_SHARE * max(remaining, 0))))

    def factor(self, step: int) -> float:
        """The factor for the optimizer step after ``step`` finished ones."""
        return 1.0 if self.length <= 0 else min(1.0, (step - self.start + 1) / self.length)


class LoRARamp:
    """A ramp on the learning rate of each of LoRA's groups, from its own injection.

    The factor is applied while ``optimizer.step`` runs and taken back after it, so that no scheduler sees it.
    """

    def __init__(self) -> None:
        self.ramps: dict[str, Ramp] = {}
        """By name of the optimizer's group."""
        self._saved: list[Any] = []

    def begin(self, optimizer: Optimizer, ramp: Ramp) -> None:
        """Give ``ramp`` to LoRA's groups that have none yet: those of the newest injection."""
        names = [group.get("name", "") for group in optimizer.param_groups]
        self.ramps |= {name: ramp for name in names if is_lora_group(name) and name not in self.ramps}

    def before(self, optimizer: Optimizer, step: int) -> None:
        """Scale LoRA's groups for the coming step."""
        self.after(optimizer)  # of a step that raised
        self._saved = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            ramp = self.ramps.get(group.get("name", ""))
            if ramp is not None and (factor := ramp.factor(step)) < 1:
                group["lr"] = group["lr"] * factor

    def after(self, optimizer: Optimizer) -> None:
        """Give the groups their own learning rate back; outside of a step there is nothing to give."""
        if self._saved:
            for group, lr in zip(optimizer.param_groups, self._saved, strict=True):
                group["lr"] = lr
        self._saved = []
