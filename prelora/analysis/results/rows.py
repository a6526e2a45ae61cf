"""What the lines of the collected results say: a dataclass for each CSV file of a data set's folder."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prelora.units import Phase


@dataclass(frozen=True)
class RunRow:
    """A line of ``runs.csv``: one training run, by variant and seed."""

    variant: str
    seed: int
    title: str
    epochs: int
    switch_epoch: int | None
    """Finished epochs at the switch; None: never."""
    freeze_epoch: int | None
    prefix_epochs: int
    """Epochs trained once, as ``full`` of the same seed."""
    final_top1: float
    """Percent, of the last epoch."""
    best_top1: float
    final_loss: float
    eval_loss: float
    step_seconds: float
    """As run, on a machine that may have been busy."""
    flops: float
    """Of training, all epochs, the shared ones included."""
    parameters: float
    trainable: float
    """Parameters that train in the last epoch."""
    lora_parameters: float = math.nan
    tau: float = math.nan
    zeta: float = math.nan

    def __post_init__(self) -> None:
        _check_positive(self, "flops")
        if not 0 <= self.prefix_epochs <= self.epochs:
            raise ValueError(f"prefix_epochs: {self.prefix_epochs}: accepted is 0 to epochs, which is {self.epochs}")


@dataclass(frozen=True)
class EpochRow:
    """A line of ``epochs.csv``; memory in bytes, NaN where it was not measured."""

    variant: str
    seed: int
    epoch: int
    """From 1."""
    phase: Phase
    images: int
    train_loss: float
    top1: float
    """Percent."""
    eval_loss: float
    flops: float
    """Of the whole epoch."""
    lr: float = math.nan
    seconds: float = math.nan
    img_per_s: float = math.nan
    trainable: float = math.nan
    memory_parameters: float = math.nan
    memory_gradients: float = math.nan
    memory_optimizer: float = math.nan
    memory_other: float = math.nan
    memory_saved: float = math.nan
    """Activations kept for backward."""
    peak_memory: float = math.nan

    def __post_init__(self) -> None:
        _check_positive(self, "flops", "images")


@dataclass(frozen=True)
class NormRow:
    """A line of ``norms.csv``: means over the layers of a group."""

    variant: str
    seed: int
    epoch: int
    group: str
    norm: float
    """Frobenius norm of the effective weight W + s·B·A."""
    base_norm: float
    lora_norm: float
    update: float
    """Relative update norm."""


@dataclass(frozen=True)
class LayerRow:
    """A line of ``layers.csv``: one layer's norm in ``full``."""

    seed: int
    epoch: int
    group: str
    layer: int
    norm: float


@dataclass(frozen=True)
class RankRow:
    """A line of ``ranks.csv``: what Algorithm 2 gave a layer."""

    variant: str
    seed: int
    group: str
    layer: int
    rank: int
    change: float = math.nan
    """Percent, Algorithm 2's input."""


@dataclass(frozen=True)
class TimingRow:
    """A line of ``timing.csv``: one optimizer step, timed on a quiet machine; a round has a step of every phase."""

    variant: str
    seed: int
    phase: Phase
    round: int
    seconds: float
    batch: int
    """Images in the step."""

    def __post_init__(self) -> None:
        _check_positive(self, "seconds", "batch")
        if math.isnan(self.seconds):
            raise ValueError("seconds: the cell is empty: accepted is a number above 0")


def _check_positive(row: object, *fields: str) -> None:
    for field in fields:
        if getattr(row, field) <= 0:
            raise ValueError(f"{field}: {getattr(row, field)}: accepted is above 0")
