"""How the LoRA of a weight with row slices of unequal rank lies in memory, and the update that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor


def split_b(lora_b: Tensor, rows: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Views B_i [rows_i, rank_i] of each slice; arguments as in ``split_lora``."""
    # Not Tensor.split, which is Python and takes twice as long.
    blocks = torch.split_with_sizes(lora_b.reshape(-1), [n * r for n, r in zip(rows, ranks, strict=True)])
    return [block.view(n, r) for block, n, r in zip(blocks, rows, ranks, strict=True)]


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
    return list(zip(torch.split_with_sizes(lora_a, list(ranks)), split_b(lora_b, rows, ranks), strict=True))


def lora_delta(
    lora_a: Tensor, lora_b: Tensor, rows: Sequence[int], ranks: Sequence[int], scaling: Sequence[float]
) -> Tensor:
    """The weight update s·B·A of all slices, [out, in]."""
    slices = split_lora(lora_a, lora_b, rows, ranks)
    return torch.cat([s * (b @ a) for (a, b), s in zip(slices, scaling, strict=True)])


def by_layer(slices: Sequence[int], *per_slice: Sequence) -> Iterator[tuple[Sequence, ...]]:
    """Cut sequences that run over the slices of many layers into those of each layer.

    Args:
        slices: number of slices of each layer.
        per_slice: sequences with one item per slice, over all layers.
    """
    ends = list(accumulate(slices))
    for end, count in zip(ends, slices, strict=True):
        yield tuple(values[end - count : end] for values in per_slice)
