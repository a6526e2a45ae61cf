"""``merged_norms``: Frobenius norms of the effective weights of many layers, without the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prelora.ops.slices import by_layer, split_lora
from prelora.ops.support import grouped_cuda_refusal, grouped_refusal
from prelora.registry import autocast, define


@define
def merged_norms(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    slices: Sequence[int],
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    squared: bool,
) -> Tensor:
    """Return ‖W_i + s_i · B_i · A_i‖ of each row slice i of every layer, or its square, summed in at least fp32.

    Args:
        weights: W of one or more layers, as in ``lora_merge``, and so is what follows.
        lora_a: each layer's A.
        lora_b: each layer's B.
        slices: number of slices of each layer.
        rows: of every slice.
        ranks: of every slice.
        scaling: of every slice.
        squared: sums of squares, to be added up over shards before the root is taken.

    Returns:
        [number of slices], those of the first layer first: fp32, or fp64 if any tensor is. No gradient.
    """
    squares = []
    layers = by_layer(slices, rows, ranks, scaling)
    for weight, a, b, (n, r, s) in zip(weights, lora_a, lora_b, layers, strict=True):
        wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
        for w_i, (a_i, b_i), s_i in zip(weight.split(list(n)), split_lora(a, b, n, r), s, strict=True):
            squares.append((w_i.to(wide) + s_i * (b_i.to(wide) @ a_i.to(wide))).square().sum())
    doubles = any(square.dtype == torch.float64 for square in squares)
    sums = torch.stack([square.to(torch.float64 if doubles else torch.float32) for square in squares])
    return sums if squared else sums.sqrt()


autocast(merged_norms, lambda dtype, *args: args)
merged_norms.provider("cpu", "prelora.ops.grouped", grouped_refusal)
merged_norms.provider("cuda", "prelora.ops.grouped", grouped_cuda_refusal)
