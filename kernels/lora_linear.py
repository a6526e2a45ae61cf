"""``triton`` provider of ``lora_linear``: library GEMMs for what has the weight's size, kernels for what has a rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from prelora.kernels.lora_col import lora_col
from prelora.kernels.lora_dy import lora_dy, worth_it
from prelora.kernels.lora_merge import lora_merge_backward
from prelora.kernels.lora_row import lora_row
from torch import Tensor


def lora_linear(
    x: Tensor,
    w_eff: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
) -> Tensor:
    """Return x·W_effᵀ + b; see ``prelora.ops.lora_linear``."""
    return F.linear(x, w_eff, None if bias is None else bias.to(x.dtype))


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
) -> list[Tensor]:
    """Return the needed ones of dx, dW, db, dA, dB; see ``prelora.ops.lora_linear``."""
    need_x, need_weight, need_bias, need_a, need_b = need
    grads = []
    dy2 = dy.reshape(-1, dy.shape[-1])
    x2 = None if x is None else x.reshape(-1, x.shape[-1])
    if need_x:
        assert w_eff is not None
        grads.append(torch.mm(dy2, w_eff).view(*dy.shape[:-1], w_eff.shape[1]))
    if need_weight:
        assert x2 is not None
        dw = torch.mm(dy2.t(), x2)
        grads.append(dw)
    if need_bias:
        grads.append(dy2.sum(0))
    if not (need_a or need_b):
        return grads
    if need_weight:
        da, db = lora_merge_backward([dw], [lora_a], [lora_b], [len(rows)], list(rows), list(ranks), list(scaling))
        return grads + [grad for grad, needed in ((da, need_a), (db, need_b)) if needed]
    layout = (rows, ranks, scaling)
    if need_a and need_b and worth_it(dy2.shape[0], rows, ranks, dy.dtype):
        made, _ = lora_row(x2, None, lora_a, lora_b, *layout)
        ds, db = lora_dy(dy2, made, lora_b, *layout, lora_b.dtype)
        da, _ = lora_col(x2, None, None, ds, *layout, lora_a.dtype)
    else:
        wants_s = need_b and s is None
        made, ds = lora_row(x2 if wants_s else None, dy2 if need_a else None, lora_a, lora_b, *layout)
        if s is not None:
            made = s.reshape(-1, s.shape[-1])
        da, db = lora_col(x2 if need_a else None, dy2 if need_b else None, made, ds, *layout, lora_a.dtype)
    return grads + [grad for grad in (da, None if db is None else db.view(lora_b.shape)) if grad is not None]
