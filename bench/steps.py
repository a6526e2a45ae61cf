"""Every variant of a training step of one ViT: each way to train it, and what bounds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.bounds import model_bounds
from bench.interleave import NotRun, Variant
from bench.models import (
    B_ONLY,
    FROZEN,
    FULL,
    LORA,
    OURS,
    PEFT,
    PEFT_JOINT,
    WARMUP,
    WAYS,
    Moments,
    StepCell,
    Trained,
    trained,
)
from prelora.analysis.plan import ModelFlops, count_model

TRAINS = {
    FULL: "full",
    FROZEN: "frozen",
    WARMUP: "full",
    LORA: "lora",
    B_ONLY: "lora, A frozen",
    PEFT: "lora",
    PEFT_JOINT: "full",
}
"""What each way trains, by the names of the bounds."""
COMPILED = (FULL, PEFT, LORA)


def step_variants(cell: StepCell, base: nn.Module, no_compile: str | None) -> list[Variant | NotRun]:
    """All ways, and the compiled ones; weights and moments of the base are shared between them all."""
    targets = cell.targets(base)
    side = base.patch_embed.img_size[0]
    flops = count_model(base, targets, torch.empty(1, 3, side, side, device="meta"))
    ranks = {target.name: cell.rank for target in targets}
    bounds = model_bounds(flops, ranks, FROZEN)
    moments = Moments()
    variants: list[Variant | NotRun] = []
    for way in WAYS:
        run = trained(way, cell, base, image_size=side)
        bound = None if way == FROZEN else bounds[TRAINS[way]]
        ceiling = _ceiling(way, flops, bounds)
        variants.append(_variant(way, way, run, moments, bound, ceiling))
    for way in COMPILED:
        name, role = f"{way} compiled", "ours" if way in OURS else "peer"
        if no_compile is not None:
            variants.append(NotRun(name, no_compile, role))
            continue
        run = trained(way, cell, base, compile_it=True, image_size=side)
        variants.append(_variant(name, way, run, moments, bounds[TRAINS[way]], ""))
    return variants


def _variant(name: str, way: str, run: Trained, moments: Moments, bound: Any, ceiling: str) -> Variant:
    def step() -> None:
        run.step()
        if steps.pop("first", None):
            moments.share(run.model, run.optimizer)

    steps = {"first": True}
    return Variant(
        name,
        {"step": step},
        "ours" if way in OURS else "peer",
        bound,
        note=lambda: "; ".join(filter(None, [ceiling, run.plans()])),
    )


def _ceiling(way: str, flops: ModelFlops, bounds: Any) -> str:
    """How short the FLOPs let a step of ours be."""
    if way not in OURS:
        return ""
    factor = bounds[TRAINS[way]].factors["step"]
    return f"at best {factor * flops.frozen / flops.full:.2f} of full"
