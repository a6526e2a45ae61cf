"""What a variant could reach at best: the time of GEMMs by FLOPs, bytes over the bandwidth of a copy, or both.

All are taken from variants of the same round, so that a bound is as slow as the machine is at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from prelora.analysis.plan import ModelFlops
from prelora.ops.cases import LinearCase

LARGEST_COPY = 512 * 2**20
"""Bytes that a copy reads and writes at most; beyond the caches, twice the bytes take twice the time."""


@dataclass(frozen=True)
class Bound:
    """The time of another variant of the same cell, times a factor for each part."""

    variant: str
    factors: Mapping[str, float]
    """By part; of a part that the other variant does not have, it is a factor on its whole."""
    basis: str
    """What the factor is made of, for the reader."""
    other: Bound | None = None
    """Another one that holds as well: the larger of them counts."""


def layer_bounds(case: LinearCase, frozen: str) -> dict[str, Bound]:
    """Of one layer, by what trains: ``"full"`` (joint training too), ``"frozen"``, ``"lora"``, ``"lora, A frozen"``.

    A frozen Linear is two GEMMs, one forward and one backward. LoRA's gradients add x·Aᵀ, dy·B and the two products
    that give dA and dB, as merged execution does it; with A frozen only x·Aᵀ, in forward, and the product for dB.
    """
    gemm = case.in_features * case.out_features
    through_a = sum(case.ranks) * case.in_features / gemm
    through_b = sum(rows * rank for rows, rank in zip(case.rows, case.ranks, strict=True)) / gemm
    extra = {
        "full": (0.0, 1.0),
        "frozen": (0.0, 0.0),
        "lora": (0.0, 2 * through_a + 2 * through_b),
        "lora, A frozen": (through_a, through_b),
    }
    return {
        name: Bound(
            frozen,
            {"forward": 1 + forward, "backward": 1 + backward, "both": 1 + (forward + backward) / 2},
            "FLOPs of frozen GEMMs",
        )
        for name, (forward, backward) in extra.items()
    }


def model_bounds(flops: ModelFlops, ranks: Mapping[str, int], frozen: str) -> dict[str, Bound]:
    """Of a training step, by what trains; the keys are those of ``layer_bounds``."""
    phases = flops.phases(ranks)
    counted = {
        "full": phases.warmup,
        "frozen": flops.frozen,
        "lora": phases.lora,
        # x·Aᵀ and the product for dB: half of what LoRA's gradients take.
        "lora, A frozen": (flops.frozen + phases.lora) / 2,
    }
    return {
        name: Bound(frozen, {"step": count / flops.frozen}, "FLOPs of the frozen model")
        for name, count in counted.items()
    }


def copy_of(bytes_moved: int, device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy that reads and writes ``bytes_moved`` in all, if that is not too much; and what it really moves."""
    elements = max(1, min(bytes_moved, LARGEST_COPY) // 8)
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 8 * elements


def gemm_of(device: torch.device, size: int = 2048) -> tuple[Callable[[], object], int]:
    """A square fp32 product, and its FLOPs."""
    a, b = torch.randn(2, size, size, device=device)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * size**3


def byte_bound(copy: str, bytes_by_part: Mapping[str, int], copied: int) -> Bound:
    """The time of the copy, by bytes."""
    factors = {part: count / copied for part, count in bytes_by_part.items()}
    return Bound(copy, factors, "bytes at the bandwidth of a copy")


def roofline(copy: Bound, gemm: str, flops_by_part: Mapping[str, int], multiplied: int) -> Bound:
    """The larger of ``copy``, from ``byte_bound``, and the time of the variant ``gemm``, by FLOPs."""
    factors = {part: count / multiplied for part, count in flops_by_part.items()}
    by_flops = Bound(gemm, factors, "FLOPs of a large fp32 GEMM")
    return replace(copy, basis=f"the larger of {copy.basis} and {by_flops.basis}", other=by_flops)
