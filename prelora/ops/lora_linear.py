"""``lora_linear``: a Linear plus low-rank updates of unequal rank on slices of its rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def split_lora(
    lora_a: Tensor, lora_b: Tensor, rows: Sequence[int], ranks: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Views (A_i [rank_i, in], B_i [rows_i, rank_i]) of each slice.

    Args:
        lora_a: every slice's A, stacked: [sum of ranks, in].
        lora_b: every slice's B in row-major order, one after another: any shape of sum rows_i · rank_i elements.
        rows: rows of each slice, in order; they sum to the out features.
        ranks: rank of each slice.
    """
    sizes = [n * r for n, r in zip(rows, ranks, strict=True)]
    blocks = lora_b.reshape(-1).split(sizes)
    return [(a, b.view(n, r)) for a, b, n, r in zip(lora_a.split(list(ranks)), blocks, rows, ranks, strict=True)]


def lora_delta(
    lora_a: Tensor, lora_b: Tensor, rows: Sequence[int], ranks: Sequence[int], scaling: Sequence[float]
) -> Tensor:
    """The weight update s·B·A of all slices, [out, in]."""
    slices = split_lora(lora_a, lora_b, rows, ranks)
    return torch.cat([s * (b @ a) for (a, b), s in zip(slices, scaling, strict=True)])


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    x_lora: Tensor | None = None,
) -> Tensor:
    """Return x·Wᵀ + b + [s_i · (x·A_iᵀ)·B_iᵀ for each row slice i].

    Args:
        x: [*, in].
        weight: [out, in].
        bias: [out] or None.
        lora_a, lora_b, rows, ranks: as in ``split_lora``.
        scaling: s_i = alpha / rank_i of each slice.
        x_lora: [*, in], what the low-rank path reads instead of x (x after dropout).

    Returns:
        [*, out], in x's dtype (under autocast, in autocast's).
    """
    y = F.linear(x, weight, bias)
    h = F.linear(x if x_lora is None else x_lora, lora_a)
    slices = split_lora(lora_a, lora_b, rows, ranks)
    updates = [
        F.linear(h_i, b) * s for h_i, (_, b), s in zip(h.split(list(ranks), dim=-1), slices, scaling, strict=True)
    ]
    return y + (updates[0] if len(updates) == 1 else torch.cat(updates, dim=-1))
