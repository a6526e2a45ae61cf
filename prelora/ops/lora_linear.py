"""``lora_linear``: a Linear on the effective weight W + s·B·A, whose gradients reach W, A and B (merged execution)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prelora.ops.lora_merge import lora_merge_backward
from prelora.ops.slices import split_b
from prelora.ops.support import cpu_refusal, triton_refusal, triton_slices_refusal
from prelora.registry import autocast, autograd, define, lower


@define
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
    """Return x·W_effᵀ + b, where W_eff = W + [s_i · B_i · A_i for each row slice i] was merged before.

    Args:
        x: [*, in].
        w_eff: [out, in], in x's dtype, from ``lora_merge``; carries no gradient itself.
        weight: W, [out, in]; only receives its gradient.
        bias: [out] or None.
        lora_a: every slice's A, [sum of ranks, in]; only receives its gradient.
        lora_b: every slice's B, as in ``split_lora``; only receives its gradient.
        rows: of each slice, n_i, summing to out.
        ranks: of each slice, r_i.
        scaling: s_i = alpha / rank_i of each slice.

    Returns:
        [*, out], in x's dtype. Saved for backward: x; if only B trains, x·Aᵀ instead; for x's own gradient, W_eff.
    """
    return F.linear(x, w_eff, None if bias is None else bias.to(x.dtype))


@define
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
    """Return the needed ones of dx, dW, db, dA, dB, in this order.

    dx = dy·W_eff and dW = dyᵀ·x. Where dW is needed, dA_i = s_i · B_iᵀ · dW_i and dB_i = s_i · dW_i · A_iᵀ follow
    from it; else, with S = x·Aᵀ and dS_i = s_i · dy_i · B_i, dA = dSᵀ·x and dB_i = s_i · dy_iᵀ · S_i.

    Args:
        dy: [*, out].
        x: [*, in]; None if neither dW nor dA is needed and S is given.
        s: S, [*, sum of ranks], if only dB is needed of the two; None: computed from x.
        w_eff: None if dx is not needed.
        need: which of the five.

    Returns:
        dx, dW and db in dy's dtype, dA and dB in A's and B's.
    """
    need_x, need_weight, need_bias, need_a, need_b = need
    grads = []
    dy2 = dy.reshape(-1, dy.shape[-1])
    x2 = None if x is None else x.reshape(-1, x.shape[-1])
    if need_x:
        assert w_eff is not None
        grads.append((dy2 @ w_eff).view(*dy.shape[:-1], w_eff.shape[1]))
    if need_weight:
        assert x2 is not None
        dw = dy2.t() @ x2
        grads.append(dw)
    if need_bias:
        grads.append(dy2.sum(0))
    if need_weight and (need_a or need_b):
        da, db = lora_merge_backward.reference([dw], [lora_a], [lora_b], [len(rows)], rows, ranks, scaling)
        grads += [grad for grad, needed in ((da, need_a), (db, need_b)) if needed]
    elif need_a or need_b:
        grads += adapter_gradients(dy2, x2, s, lora_a, lora_b, rows, ranks, scaling, need_a, need_b)
    return grads


def adapter_gradients(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    need_a: bool,
    need_b: bool,
) -> list[Tensor]:
    """The needed ones of dA and dB from activations [tokens, ·] alone, as ``lora_linear_backward`` says."""
    parts = list(zip(dy.split(list(rows), 1), split_b(lora_b.to(dy.dtype), rows, ranks), scaling, strict=True))
    grads = []
    if need_a:
        assert x is not None
        ds = torch.cat([s_i * (dy_i @ b_i) for dy_i, b_i, s_i in parts], 1)
        grads.append((ds.t() @ x).to(lora_a.dtype))
    if need_b:
        if s is None:
            assert x is not None
            s = x @ lora_a.to(x.dtype).t()
        shares = s.reshape(-1, lora_a.shape[0]).split(list(ranks), 1)
        products = [s_i * (dy_i.t() @ h_i) for (dy_i, _, s_i), h_i in zip(parts, shares, strict=True)]
        grads.append(torch.cat([product.reshape(-1) for product in products]).view(lora_b.shape).to(lora_b.dtype))
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w_eff, _, bias, lora_a, lora_b, rows, ranks, scaling = inputs
    need_x, need_w_eff, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:6]
    if need_w_eff:
        raise ValueError("lora_linear: w_eff must not require a gradient; it reaches W, A and B instead")
    ctx.need = [need_x, need_weight, bias is not None and need_bias, need_a, need_b]
    ctx.layout = (rows, ranks, scaling)
    ctx.save_for_backward(*kept_for_backward(x, lora_a, ctx.need), w_eff if need_x else None, lora_a, lora_b)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw, dbias, da, db = gradients(dy, ctx.saved_tensors, ctx.layout, ctx.need)
    return dx, None, dw, dbias, da, db, None, None, None


@torch.no_grad()
def kept_for_backward(x: Tensor, lora_a: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """x and S as far as ``lora_linear_backward`` takes them: x for dW and dA; S alone where only B trains."""
    _, need_weight, _, need_a, need_b = need
    if need_weight or need_a:
        return x, None
    return None, F.linear(x, lora_a.to(x.dtype)) if need_b else None


def gradients(
    dy: Tensor, saved: Sequence[Tensor | None], layout: tuple[Any, ...], need: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """dx, dW, db, dA and dB, None where not needed.

    Args:
        saved: x, S, W_eff, A and B, as ``lora_linear_backward`` takes them.
        layout: rows, ranks and scaling.
    """
    grads = iter(lora_linear_backward(dy, *saved, *layout, need))
    return tuple(next(grads) if needed else None for needed in need)


def _cast(dtype: torch.dtype, x: Tensor, w_eff: Tensor, *rest: Any) -> tuple[Any, ...]:
    # W, A, B and b stay as they are: W is not read at all, the others are small and cast inside.
    return lower(x, dtype), lower(w_eff, dtype), *rest


def _triton_backward_refusal(*args: Any) -> str | None:
    reason = triton_refusal(*args)
    if reason or not args:
        return reason
    rows, ranks, need = args[6], args[7], args[9]
    by_weight = need[1]  # then A's and B's gradients are made of dW, at any rank
    return None if by_weight else triton_slices_refusal(rows, ranks)


autograd(lora_linear, _backward, _setup_context)
autocast(lora_linear, _cast)
autocast(lora_linear_backward, lambda dtype, *args: args)
for _operator, _refusal in ((lora_linear, triton_refusal), (lora_linear_backward, _triton_backward_refusal)):
    _operator.provider("cpu", "prelora.ops.cpu", cpu_refusal)
    _operator.provider("triton", "prelora.kernels.lora_linear", _refusal)
