"""Which of two plans a ``LoRALinear`` takes: merged or two_path, by a model of what each costs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Work = Literal["inference", "warmup", "lora"]

FLOPS_PER_BYTE = {"cpu": {2: 12.0, 4: 6.0, 8: 3.0}, "cuda": {2: 200.0, 4: 80.0, 8: 10.0}}
"""Arithmetic that takes as long as moving a byte, by bytes per element: 2 AVX-512 cores, one A100."""


@dataclass(frozen=True)
class Choice:
    """The plan of one layer, and why."""

    execution: Literal["merged", "two_path"]
    reason: str


def choose_execution(
    *,
    tokens: int,
    in_features: int,
    rows: Sequence[int],
    ranks: Sequence[int],
    weight_bytes: int,
    compute_bytes: int,
    device_type: str,
    work: Work,
) -> Choice:
    """The cheaper plan for one forward (and backward) of ``tokens`` tokens.

    Only what the plans do differently is counted. Per step, merging costs one pass over the weight and 2·n·k·r FLOPs,
    the second path 2·M·r·(n + k) in forward, as many for x's gradient, and a pass over y and dx to add to them.
    In WARMUP merging also takes A's and B's gradients from that of W. Where autocast would cast the weight anyway,
    merging is that cast.

    Args:
        tokens: M, rows of the input.
        rows, ranks: of each slice.
        weight_bytes, compute_bytes: per element of the weight as it is kept and as it is multiplied.
        work: what is done with the layer.
    """
    m, k, n = tokens, in_features, sum(rows)
    b_elements = sum(rows_i * rank_i for rows_i, rank_i in zip(rows, ranks, strict=True))
    rank_elements = sum(ranks) * k + b_elements
    balance = FLOPS_PER_BYTE.get(device_type, FLOPS_PER_BYTE["cuda"])[compute_bytes]
    gemm = 2 * k * b_elements
    merge = gemm / balance
    if weight_bytes == compute_bytes:
        merge += n * k * (weight_bytes + compute_bytes)
    path = 2 * m * rank_elements / balance + compute_bytes * m * (k + 2 * n)
    if work != "inference":
        path += 2 * m * rank_elements / balance + compute_bytes * m * (n + 2 * k)
    own = {"inference": 0.0, "lora": 0.0, "warmup": 2 * gemm / balance + 2 * n * k * weight_bytes}[work]
    shared = 0.0 if work != "warmup" else 2 * m * rank_elements / balance + compute_bytes * m * (n + k)
    ratio = (merge + own) / (path + shared) if path + shared else 1.0
    cheaper: Literal["merged", "two_path"] = "merged" if ratio < 1 else "two_path"
    if torch.compiler.is_compiling():
        return Choice(cheaper, "the cheaper one")  # Dynamo cannot print a number that it keeps symbolic
    return Choice(cheaper, f"merging costs {ratio:.2g} of a second path at {tokens} tokens")


remembered_choice = functools.lru_cache(maxsize=1024)(choose_execution)
"""``choose_execution`` outside Dynamo, which traces no cache: a layer asks the same of it at every step."""
