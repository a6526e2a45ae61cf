"""Named inputs of the operators, for tests and benchmarks alike: small, odd, and those of real ViTs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearCase:
    """One LoRA layer and the number of tokens that pass through it."""

    tokens: int
    in_features: int
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    bias: bool = True
    scaling: tuple[float, ...] | None = None
    """None: alpha = 16, so 16 / rank."""

    @property
    def out_features(self) -> int:
        """Rows of all slices."""
        return sum(self.rows)

    @property
    def scalings(self) -> tuple[float, ...]:
        """s_i of each slice."""
        return self.scaling or tuple(16 / rank for rank in self.ranks)


SMALL = {
    "one row": LinearCase(1, 16, (16,), (4,)),
    "no rows": LinearCase(0, 24, (8, 8), (2, 3)),
    "rank 1": LinearCase(33, 40, (56,), (1,)),
    "rank 12 without bias": LinearCase(65, 72, (40,), (12,), bias=False),
    "odd sizes, rank 3": LinearCase(37, 53, (29,), (3,)),
    "qkv of unequal ranks": LinearCase(50, 48, (48, 48, 48), (24, 3, 8)),
    "slices of unequal rows": LinearCase(19, 33, (5, 60, 7), (2, 16, 1)),
    "rank above in features": LinearCase(21, 16, (48,), (64,)),
    "rank 128": LinearCase(40, 136, (152,), (128,)),
}
"""For tests: each has something that a kernel could get wrong."""

WIDTHS = {"ViT-S": 384, "ViT-B": 768, "ViT-L": 1024}
TOKENS_PER_IMAGE = 197


def vit_layers(model: str, rank: int, images: int) -> dict[str, LinearCase]:
    """The four target modules of a block of ViT-S, -B or -L/16 at 224 × 224, at one rank for every slice."""
    width, tokens = WIDTHS[model], images * TOKENS_PER_IMAGE
    return {
        "qkv": LinearCase(tokens, width, (width,) * 3, (rank,) * 3),
        "attn_out": LinearCase(tokens, width, (width,), (rank,)),
        "mlp_in": LinearCase(tokens, width, (4 * width,), (rank,)),
        "mlp_out": LinearCase(tokens, 4 * width, (width,), (rank,)),
    }


@dataclass(frozen=True)
class LinearTensors:
    """The tensors of a ``LinearCase``; W, A, B and b in ``wide``, x and dy in ``dtype``."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor


def linear_tensors(
    case: LinearCase,
    dtype: torch.dtype,
    wide: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LinearTensors:
    """Random tensors of a trained layer's sizes: W and A as they are initialised, B of the same order.

    Args:
        wide: dtype of the parameters; None: that of x.
        device: ``"meta"`` for shapes alone.
    """
    wide = wide or dtype
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, bound: float, as_dtype: torch.dtype) -> Tensor:
        if torch.device(device).type == "meta":
            return torch.empty(shape, dtype=as_dtype, device=device)
        drawn = torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
        return drawn.to(device, as_dtype)

    k, n = case.in_features, case.out_features
    packed = sum(rows * rank for rows, rank in zip(case.rows, case.ranks, strict=True))
    return LinearTensors(
        x=draw(case.tokens, k, bound=1.7, as_dtype=dtype),
        dy=draw(case.tokens, n, bound=1.7, as_dtype=dtype),
        weight=draw(n, k, bound=k**-0.5, as_dtype=wide),
        bias=draw(n, bound=k**-0.5, as_dtype=wide) if case.bias else None,
        lora_a=draw(sum(case.ranks), k, bound=k**-0.5, as_dtype=wide),
        lora_b=draw(packed, bound=max(case.ranks) ** -0.5, as_dtype=wide),
    )


def merge_arguments(
    cases: Sequence[LinearCase], dtype: torch.dtype, wide: torch.dtype, device: torch.device | str = "cpu"
) -> list[Any]:
    """Arguments of ``lora_merge`` for these layers at once."""
    layers = [linear_tensors(case, dtype, wide, device, seed) for seed, case in enumerate(cases)]
    return [
        [layer.weight for layer in layers],
        [layer.lora_a for layer in layers],
        [layer.lora_b for layer in layers],
        [len(case.rows) for case in cases],
        [rows for case in cases for rows in case.rows],
        [rank for case in cases for rank in case.ranks],
        [scaling for case in cases for scaling in case.scalings],
        dtype,
    ]


@dataclass(frozen=True)
class GroupCase:
    """One group of a grouped product: op(A) [m, k] · op(B) [k, n], with D or without."""

    m: int
    n: int
    k: int
    trans_a: bool = False
    trans_b: bool = False
    alpha: float = 0.75
    beta: float = 1.0


LAYOUTS = ((False, False), (False, True), (True, False), (True, True))

GROUPS = {
    "one element": (GroupCase(1, 1, 1),),
    "every layout": tuple(GroupCase(37, 53, 11, *layout) for layout in LAYOUTS),
    "ranks 1 to 128": tuple(
        GroupCase(33 + 7 * rank % 50, 29 + 5 * rank % 70, rank, *LAYOUTS[rank % 4]) for rank in range(1, 129)
    ),
    "rank as m and as n": (GroupCase(3, 130, 200, True), GroupCase(130, 3, 200, False, True), GroupCase(12, 65, 257)),
    "an empty one between others": (GroupCase(5, 7, 3), GroupCase(0, 7, 3), GroupCase(5, 0, 3), GroupCase(16, 16, 16)),
    "beta 0, alpha 0, negative": (
        GroupCase(20, 18, 5, beta=0.0),
        GroupCase(20, 18, 5, alpha=0.0),
        GroupCase(9, 8, 7, beta=-2.5),
    ),
    "several tiles, long sum": (GroupCase(150, 70, 1030), GroupCase(70, 150, 530, True, True)),
}
"""For tests of ``grouped_gemm``: each has something that a kernel could get wrong."""


def group_arguments(
    cases: Sequence[GroupCase], dtypes: Sequence[torch.dtype], device: torch.device | str = "cpu", seed: int = 0
) -> list[Any]:
    """Arguments of ``grouped_gemm``; A, B, D and the results in these four dtypes. What is not to be read is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        # Rows lie apart, by an odd distance, and NaN lies between them.
        wide = torch.full((rows, columns + 3), math.nan, dtype=torch.float64)
        wide[:, :columns].uniform_(-1, 1, generator=generator)
        return wide.to(device, dtype)[:, :columns]

    return [
        [draw(*((g.k, g.m) if g.trans_a else (g.m, g.k)), dtypes[0]) for g in cases],
        [draw(*((g.n, g.k) if g.trans_b else (g.k, g.n)), dtypes[1]) for g in cases],
        [
            draw(g.m, g.n, dtypes[2]) if g.beta else torch.full((g.m, g.n), math.nan).to(device, dtypes[2])
            for g in cases
        ],
        [g.alpha for g in cases],
        [g.beta for g in cases],
        [g.trans_a for g in cases],
        [g.trans_b for g in cases],
        dtypes[3],
    ]


def norm_tensors(model: str = "ViT-L", depth: int = 24, device: torch.device | str = "cpu") -> list[Tensor]:
    """Weights of every target of a ViT; of qkv the three row slices, as views."""
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor] = []
    for _ in range(depth):
        for case in vit_layers(model, 8, 1).values():
            weight = torch.empty(case.out_features, case.in_features, device=device)
            if weight.device.type != "meta":
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
            tensors += weight.split(list(case.rows))
    return tensors
