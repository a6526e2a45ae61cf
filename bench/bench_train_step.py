"""Whole training steps of timm ViTs: forward, backward and AdamW, in every phase, against full training and PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.models import StepCell, base_model
from bench.precision import DEVICE, PRECISIONS
from bench.steps import step_variants

OPERATORS = ("lora_linear", "lora_merge", "lora_two_path")
BATCHES = {
    "cpu": {"ViT-S": (8, 32), "ViT-B": (8,), "ViT-L": (4,)},
    "cuda": {"ViT-S": (128, 512), "ViT-B": (64, 256), "ViT-L": (32, 128)},
}[DEVICE.type]
RANKS = (16, 32)
DEFAULT = ("ViT-S", BATCHES["ViT-S"][0], 16)
SECONDS = 60.0


def cells() -> Iterator[Any]:
    """Every model, batch, rank, precision and way to put adapters on qkv."""
    for model, batches in BATCHES.items():
        for batch in batches:
            for rank in RANKS:
                marks = [pytest.mark.default_cell] if (model, batch, rank) == DEFAULT else []
                for precision in PRECISIONS:
                    for qkv in ("sliced", "fused"):
                        cell = StepCell(model, batch, rank, precision, qkv)
                        yield pytest.param(cell, id=f"train_step-{cell.name}", marks=marks)


@pytest.mark.parametrize("cell", list(cells()))
def bench_train_step(cell: StepCell, measure: Any, compiled: str | None) -> None:
    """Every way to train one model, a step each in turn."""
    base = base_model(cell.model)
    measure("train_step", cell.name, step_variants(cell, base, compiled), SECONDS)
