"""Bytes that each operator reads and writes when the kernels serve it, from its arguments, which may be ``meta``.

Library GEMMs count each operand once; what kernels say of their grids, loads and stores, is under read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from prelora.kernels import lora_col, lora_dx, lora_dy, lora_expand, lora_forward, lora_row
from prelora.kernels import lora_merge as merge
from prelora.kernels import weight_norms as norms
from prelora.kernels.lora_two_path import FUSED_BELOW
from torch import Tensor

Moved = tuple[int, int]
"""Bytes read, bytes written."""


def lora_linear(x: Tensor, w_eff: Tensor, *_: object) -> Moved:
    """Of ``lora_linear``."""
    return x.nbytes + w_eff.nbytes, _tokens(x) * w_eff.shape[0] * x.element_size()


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    w_eff: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    need: Sequence[bool],
) -> Moved:
    """Of ``lora_linear_backward``."""
    need_x, need_weight, _, need_a, need_b = need
    tokens, k = _tokens(dy), lora_a.shape[1]
    read, written = _dense_backward(dy, x, k, need)
    if need_x and w_eff is not None:
        read, written = read + dy.nbytes + w_eff.nbytes, written + tokens * k * dy.element_size()
    if need_weight and (need_a or need_b):
        dw = dy.new_empty((dy.shape[-1], k), device="meta")
        read += merge.backward_traffic([dw], [lora_a], [len(rows)], list(rows), list(ranks))
    elif need_a or need_b:
        sizes = (tokens, k, rows, ranks, dy.dtype)
        joint = need_a and need_b and lora_dy.worth_it(tokens, rows, ranks, dy.dtype)
        if joint:
            read += lora_dy.traffic(tokens, rows, ranks, dy.dtype, lora_b.dtype)
        read += lora_row.traffic(*sizes, x=need_b and s is None, dy=need_a and not joint)
        read += lora_col.traffic(*sizes, lora_a.dtype, da=need_a, db=need_b and not joint)
    return read, written


def lora_two_path(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    *_: object,
) -> Moved:
    """Of ``lora_two_path``."""
    tokens, (n, k) = _tokens(x), weight.shape
    shrink = lora_row.traffic(tokens, k, rows, ranks, x.dtype, dy=False)
    if k < FUSED_BELOW:
        bias_bytes = 0 if bias is None else bias.element_size()
        return shrink + lora_forward.traffic(tokens, k, rows, ranks, x.dtype, bias_bytes), 0
    expand = lora_expand.traffic(tokens, rows, ranks, x.dtype)
    return shrink + expand + x.nbytes + weight.nbytes, tokens * n * x.element_size()


def lora_two_path_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    need: Sequence[bool],
) -> Moved:
    """Of ``lora_two_path_backward``."""
    need_x, _, _, need_a, need_b = need
    tokens, k, n = _tokens(dy), lora_a.shape[1], dy.shape[-1]
    read, written = _dense_backward(dy, x, k, need)
    if need_x or need_a:
        read += lora_row.traffic(tokens, k, rows, ranks, dy.dtype, x=False)
    if need_x:
        read += lora_dx.traffic(tokens, k, n, sum(ranks), dy.dtype, seed is not None)
    if need_a or need_b:
        read += lora_col.traffic(tokens, k, rows, ranks, dy.dtype, lora_a.dtype, da=need_a, db=need_b)
    return read, written


def lora_merge(
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    slices: list[int],
    rows: list[int],
    ranks: list[int],
    scaling: list[float],
    dtype: torch.dtype,
) -> Moved:
    """Of ``lora_merge``."""
    written = sum(weight.numel() for weight in weights) * dtype.itemsize
    return merge.traffic(weights, lora_a, slices, rows, ranks, dtype) - written, written


def lora_merge_backward(
    grads: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    slices: list[int],
    rows: list[int],
    ranks: list[int],
    scaling: list[float],
) -> Moved:
    """Of ``lora_merge_backward``."""
    return merge.backward_traffic(grads, lora_a, slices, rows, ranks), 0


def weight_norms(tensors: list[Tensor], squared: bool) -> Moved:
    """Of ``weight_norms``."""
    return norms.traffic(tensors), 0


def _dense_backward(dy: Tensor, x: Tensor | None, k: int, need: Sequence[bool]) -> Moved:
    """Of dW and db."""
    _, need_weight, need_bias, *_ = need
    read = dy.nbytes * (need_weight + need_bias)
    if not need_weight or x is None:
        return read, 0
    return read + x.nbytes, dy.shape[-1] * k * dy.element_size()


def _tokens(tensor: Tensor) -> int:
    return tensor.numel() // tensor.shape[-1]
