"""``lora_two_path``: a Linear plus low-rank updates of unequal rank on slices of its rows, beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prelora.ops.dropout import drop
from prelora.ops.lora_linear import adapter_gradients
from prelora.ops.slices import split_b
from prelora.ops.support import cpu_refusal, triton_refusal, triton_slices_refusal
from prelora.registry import autocast, autograd, define, lower


@define
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
    """Return x·Wᵀ + b + [s_i · (drop(x)·A_iᵀ)·B_iᵀ for each row slice i], and drop(x)·Aᵀ.

    Args:
        x: [*, in].
        weight: [out, in], in x's dtype.
        bias: [out] or None.
        lora_a: every slice's A, [sum of ranks, in].
        lora_b: every slice's B, as in ``split_lora``.
        rows: of each slice, n_i, summing to out.
        ranks: of each slice, r_i.
        scaling: s_i = alpha / rank_i of each slice.
        dropout: probability of dropping an element of x on the low-rank path.
        seed: one int64 element that fixes the mask (``keep_mask``); None without dropout.

    Returns:
        [*, out] and [*, sum of ranks], in x's dtype. Saved for backward: x,
        unless neither W nor A trains; the second result; W for x's own gradient; of the dropout only the seed.
    """
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    x2 = drop(x.reshape(-1, x.shape[-1]), seed, dropout)
    h = x2 @ lora_a.to(x.dtype).t()
    slices = zip(h.split(list(ranks), 1), split_b(lora_b.to(x.dtype), rows, ranks), scaling, strict=True)
    update = torch.cat([s_i * (h_i @ b_i.t()) for h_i, b_i, s_i in slices], 1)
    return y + update.view(y.shape), h.view(*x.shape[:-1], h.shape[-1])


@define
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
    """Return the needed ones of dx, dW, db, dA, dB, in this order.

    With dS_i = s_i · dy_i · B_i and one mask for both: dx = dy·W + drop(dS·A), dW = dyᵀ·x, dA = dSᵀ·drop(x) and
    dB_i = s_i · dy_iᵀ · h_i.

    Args:
        dy: [*, out].
        x: [*, in]; None if neither dW nor dA is needed.
        h: drop(x)·Aᵀ, [*, sum of ranks], from forward.
        weight: None if dx is not needed.
        need: which of the five.

    Returns:
        dx, dW and db in dy's dtype, dA and dB in A's and B's.
    """
    need_x, need_weight, need_bias, need_a, need_b = need
    grads = []
    dy2 = dy.reshape(-1, dy.shape[-1])
    x2 = None if x is None else x.reshape(-1, x.shape[-1])
    if need_x:
        assert weight is not None
        shares = zip(dy2.split(list(rows), 1), split_b(lora_b.to(dy.dtype), rows, ranks), scaling, strict=True)
        ds = torch.cat([s_i * (dy_i @ b_i) for dy_i, b_i, s_i in shares], 1)
        dx = dy2 @ weight + drop(ds @ lora_a.to(dy.dtype), seed, dropout)
        grads.append(dx.view(*dy.shape[:-1], weight.shape[1]))
    if need_weight:
        assert x2 is not None
        grads.append(dy2.t() @ x2)
    if need_bias:
        grads.append(dy2.sum(0))
    if need_a or need_b:
        dropped = None if x2 is None else drop(x2, seed, dropout)
        grads += adapter_gradients(dy2, dropped, h, lora_a, lora_b, rows, ranks, scaling, need_a, need_b)
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, lora_a, lora_b, rows, ranks, scaling, dropout, seed = inputs
    need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    ctx.need = [need_x, need_weight, bias is not None and need_bias, need_a, need_b]
    ctx.layout = (rows, ranks, scaling, dropout)
    ctx.save_for_backward(
        x if need_weight or need_a else None, output[1], weight if need_x else None, lora_a, lora_b, seed
    )
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    x, h, weight, lora_a, lora_b, seed = ctx.saved_tensors
    if dy is None:
        dy = h.new_zeros(*h.shape[:-1], sum(ctx.layout[0]))
    grads = iter(lora_two_path_backward(dy, x, h, weight, lora_a, lora_b, *ctx.layout, seed, ctx.need))
    dx, dw, dbias, da, db = (next(grads) if needed else None for needed in ctx.need)
    if dh is not None:
        # Only where someone differentiates drop(x)·Aᵀ itself: a layer does not.
        dropout, dh2 = ctx.layout[3], dh.reshape(-1, dh.shape[-1])
        dx = dx if dx is None else dx + drop(dh2 @ lora_a.to(dh.dtype), seed, dropout).view(dx.shape)
        da = da if da is None else da + dh2.t() @ drop(x.reshape(-1, x.shape[-1]), seed, dropout)
    return dx, dw, dbias, da, db, None, None, None, None, None


def _cast(dtype: torch.dtype, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Any, ...]:
    # A, B and b stay as they are: small, and cast inside.
    return lower(x, dtype), lower(weight, dtype), *rest


def _triton_refusal(*args: Any) -> str | None:
    # Forward has rows and ranks after five arguments, backward after six.
    layout = [arg for arg in args if isinstance(arg, (list, tuple))]
    return triton_refusal(*args) or (triton_slices_refusal(*layout[:2]) if layout else None)


autograd(lora_two_path, _backward, _setup_context)
autocast(lora_two_path, _cast)
autocast(lora_two_path_backward, lambda dtype, *args: args)
for _operator in (lora_two_path, lora_two_path_backward):
    _operator.provider("cpu", "prelora.ops.cpu", cpu_refusal)
    _operator.provider("triton", "prelora.kernels.lora_two_path", _triton_refusal)
