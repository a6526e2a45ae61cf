"""``triton`` provider of ``lora_two_path``: the low-rank path inside the GEMM, or added to a library GEMM's result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from prelora.kernels.lora_col import lora_col
from prelora.kernels.lora_dx import lora_dx
from prelora.kernels.lora_expand import lora_expand
from prelora.kernels.lora_forward import lora_forward
from prelora.kernels.lora_row import lora_row
from torch import Tensor

FUSED_BELOW = 4096
"""In features from which a library GEMM and a pass over y are taken instead of one fused GEMM. By arithmetic for an
A100, where a Triton GEMM breaks even at 79 % of cuBLAS with 1024 in features and at 94 % with 4096; not timed."""


def lora_two_path(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y and drop(x)·Aᵀ; see ``prelora.ops.lora_two_path``."""
    x2 = x.reshape(-1, x.shape[-1])
    h, _ = lora_row(x2, None, lora_a, lora_b, rows, ranks, scaling, dropout, seed)
    assert h is not None
    if weight.shape[1] < FUSED_BELOW:
        y = lora_forward(x2, weight, bias, h, lora_b, rows, ranks, scaling)
    else:
        y = F.linear(x2, weight, None if bias is None else bias.to(x.dtype))
        lora_expand(y, h, lora_b, rows, ranks, scaling)
    return y.view(*x.shape[:-1], y.shape[1]), h.view(*x.shape[:-1], h.shape[1])


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
) -> list[Tensor]:
    """Return the needed ones of dx, dW, db, dA, dB; see ``prelora.ops.lora_two_path``."""
    need_x, need_weight, need_bias, need_a, need_b = need
    grads = []
    dy2 = dy.reshape(-1, dy.shape[-1])
    x2 = None if x is None else x.reshape(-1, x.shape[-1])
    ds = None
    if need_x or need_a:
        _, ds = lora_row(None, dy2, lora_a, lora_b, rows, ranks, scaling)
    if need_x:
        assert weight is not None
        assert ds is not None
        grads.append(lora_dx(dy2, weight, ds, lora_a, dropout, seed).view(*dy.shape[:-1], weight.shape[1]))
    if need_weight:
        assert x2 is not None
        grads.append(torch.mm(dy2.t(), x2))
    if need_bias:
        grads.append(dy2.sum(0))
    if need_a or need_b:
        columns = (x2 if need_a else None, dy2 if need_b else None, h.reshape(-1, h.shape[-1]), ds)
        da, db = lora_col(*columns, rows, ranks, scaling, lora_a.dtype, dropout, seed)
        grads += [grad for grad in (da, None if db is None else db.view(lora_b.shape)) if grad is not None]
    return grads
