"""``grouped_gemm``: matrix products of many different shapes in one call; ``grouped_gemm_`` writes where it is told."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prelora.ops.group_checks import check_groups, check_overlaps
from prelora.ops.support import extension_cpu_refusal, extension_cuda_refusal
from prelora.registry import autocast, autograd, define


@define
def grouped_gemm(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    alpha: Sequence[float],
    beta: Sequence[float],
    trans_a: Sequence[bool],
    trans_b: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return C_i = beta_i · D_i + alpha_i · op(A_i) · op(B_i) of every group, summed in at least fp32.

    Args:
        a: each group's A [m, k], or [k, m] where ``trans_a``; all of one dtype. Any distance between rows will do.
        b: each group's B [k, n], or [n, k] where ``trans_b``; all of one dtype.
        d: each group's D [m, n], all of one dtype; or empty: none. Not read where beta is 0.
        alpha: of each group.
        beta: of each group; empty where ``d`` is.
        trans_a: whether A is stored transposed, for each group.
        trans_b: whether B is, for each group.
        dtype: of the results.

    Returns:
        [m, n] of each group, contiguous. Saved for backward: A and B. alpha and beta have no gradient.

    Raises:
        ValueError: lists of other lengths, other shapes, devices or dtypes, k = 0, or a NaN: names the group.
    """
    check_groups(a, b, d, alpha, beta, trans_a, trans_b)
    return [product.to(dtype) for product in _products(a, b, d, alpha, beta, trans_a, trans_b)]


@functools.partial(define, mutates=("out",))
def grouped_gemm_(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    out: Sequence[Tensor],
    alpha: Sequence[float],
    beta: Sequence[float],
    trans_a: Sequence[bool],
    trans_b: Sequence[bool],
) -> None:
    """Write what ``grouped_gemm`` returns into ``out``. No gradient.

    Args:
        out: each group's C [m, n], all of one dtype; D_i may be C_i itself.

    Raises:
        ValueError: as ``grouped_gemm``; or an output overlaps itself, another one or an input. Nothing is written then.
    """
    check_groups(a, b, d, alpha, beta, trans_a, trans_b, out)
    check_overlaps(a, b, d, out)
    for c, product in zip(out, _products(a, b, d, alpha, beta, trans_a, trans_b), strict=True):
        c.copy_(product)


def _products(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    alpha: Sequence[float],
    beta: Sequence[float],
    trans_a: Sequence[bool],
    trans_b: Sequence[bool],
) -> Iterator[Tensor]:
    """Each group's result, wide."""
    for i, (a_i, b_i, alpha_i, ta, tb) in enumerate(zip(a, b, alpha, trans_a, trans_b, strict=True)):
        wide = functools.reduce(torch.promote_types, [x.dtype for x in (a_i, b_i, *d[i : i + 1])], torch.float32)
        left, right = a_i.to(wide), b_i.to(wide)
        product = alpha_i * ((left.t() if ta else left) @ (right.t() if tb else right))
        yield product + beta[i] * d[i].to(wide) if d and beta[i] != 0 else product


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    a, b, d, ctx.alpha, ctx.beta, ctx.trans_a, ctx.trans_b, _ = inputs
    ctx.count, ctx.d_dtypes = len(a), [tensor.dtype for tensor in d]
    ctx.save_for_backward(*a, *b)


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    dc = [grad.contiguous() for grad in grads]
    no, yes = [False] * ctx.count, [True] * ctx.count
    flipped_a, flipped_b = [not t for t in ctx.trans_a], [not t for t in ctx.trans_b]
    need_a, need_b, need_d = ctx.needs_input_grad[:3]
    # dA = dC·op(B)ᵀ, or transposed op(B)·dCᵀ; dB = op(A)ᵀ·dC, or transposed dCᵀ·op(A).
    da = _gradients(ctx, need_a, ctx.trans_a, a, (dc, no, b, flipped_b), (b, ctx.trans_b, dc, yes))
    db = _gradients(ctx, need_b, ctx.trans_b, b, (a, flipped_a, dc, no), (dc, yes, a, ctx.trans_a))
    dd = [(ctx.beta[i] * dc[i]).to(dtype) if need_d[i] else None for i, dtype in enumerate(ctx.d_dtypes)]
    # To autograd an empty list is one of tensors, whose gradient is an empty list.
    rest: list[list[Tensor] | None] = [
        None if values else [] for values in (ctx.alpha, ctx.beta, ctx.trans_a, ctx.trans_b)
    ]
    return da, db, dd, *rest, None


Factors = tuple[Sequence[Tensor], Sequence[bool], Sequence[Tensor], Sequence[bool]]


def _gradients(
    ctx: Any,
    need: Sequence[bool],
    trans: Sequence[bool],
    operands: Sequence[Tensor],
    plain: Factors,
    transposed: Factors,
) -> list[Tensor | None]:
    """The needed gradients of A or B: of the groups that store it plain in one call, of the others in another."""
    result: list[Tensor | None] = [None] * len(operands)
    for stored, (left, trans_left, right, trans_right) in ((False, plain), (True, transposed)):
        of = [i for i, needed in enumerate(need) if needed and trans[i] == stored]
        for i in [i for i in of if left[i].numel() == 0 or right[i].numel() == 0]:
            result[i] = torch.zeros_like(operands[i])  # a sum over nothing
            of.remove(i)
        products = (
            grouped_gemm(
                [left[i] for i in of],
                [right[i] for i in of],
                [],
                [ctx.alpha[i] for i in of],
                [],
                [trans_left[i] for i in of],
                [trans_right[i] for i in of],
                operands[0].dtype,
            )
            if of
            else []
        )
        for i, product in zip(of, products, strict=True):
            result[i] = product
    return result


autograd(grouped_gemm, _backward, _setup_context)
for _operator in (grouped_gemm, grouped_gemm_):
    autocast(_operator, lambda dtype, *args: args)  # each call says its dtypes itself
    _operator.provider("cpu", "prelora.ops.grouped", extension_cpu_refusal)
    _operator.provider("cuda", "prelora.ops.grouped", extension_cuda_refusal)
