"""The learning rate by step: linear warm-up, cosine, and if asked a cooldown that ends the run earlier."""

from __future__ import annotations

from typing import Any

from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.optim import Optimizer

from prelora.train.config import TrainConfig


class CosineWithCooldown(CosineLRScheduler):
    """timm's cosine whose last steps go linearly from where it stands to its end, however far it has come."""

    def __init__(self, optimizer: Optimizer, *, cooldown_from: int, total_steps: int, **cosine: Any) -> None:
        """Args: cooldown_from: the step at which the cooldown starts; total_steps: of the run; cosine: timm's own."""
        self.cooldown_from, self.total_steps = cooldown_from, total_steps
        super().__init__(optimizer, **cosine)

    def _get_lr(self, t: int) -> list[float]:
        if t < self.cooldown_from:
            return super()._get_lr(t)
        left = max(self.total_steps - t, 0) / (self.total_steps - self.cooldown_from)
        return [self.lr_min + left * (lr - self.lr_min) for lr in super()._get_lr(self.cooldown_from)]


def build_scheduler(optimizer: Optimizer, config: TrainConfig, steps: int) -> CosineLRScheduler:
    """The config's schedule; ``steps``: optimizer steps of an epoch."""
    optim = config.optim
    cosine: dict[str, Any] = {
        "t_initial": (optim.schedule_epochs or config.epochs) * steps,
        "lr_min": optim.min_lr,
        "warmup_t": optim.warmup_epochs * steps,
        "t_in_epochs": False,
    }
    if not optim.cooldown_epochs:
        return CosineLRScheduler(optimizer, **cosine)
    total = config.epochs * steps
    start = total - optim.cooldown_epochs * steps
    return CosineWithCooldown(optimizer, cooldown_from=start, total_steps=total, **cosine)
