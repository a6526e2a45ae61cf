"""``lora_merge``: the effective weights of many layers, W + s·B·A on each row slice, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prelora.ops.slices import by_layer, lora_delta, split_lora
from prelora.ops.support import cpu_refusal, grouped_cuda_refusal, grouped_refusal, triton_refusal
from prelora.registry import autocast, autograd, define


@define
def lora_merge(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    slices: Sequence[int],
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return W + [s_i · B_i · A_i for each row slice i] of every layer, summed in at least fp32.

    Args:
        weights: each layer's W, [out, in].
        lora_a: each layer's A, as in ``split_lora``.
        lora_b: each layer's B, as in ``split_lora``.
        slices: number of slices of each layer.
        rows: of every slice, those of the first layer first.
        ranks: of every slice likewise.
        scaling: of every slice likewise.
        dtype: of the result; to a 16-bit one a provider may round s·B·A as well, as a second path would.

    Returns:
        [out, in] of each layer. Saved for backward: A and B.
    """
    merged = []
    layers = by_layer(slices, rows, ranks, scaling)
    for weight, a, b, layer in zip(weights, lora_a, lora_b, layers, strict=True):
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged.append((weight.to(wide) + lora_delta(a.to(wide), b.to(wide), *layer)).to(dtype))
    return merged


@define
def lora_merge_backward(
    grads: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    slices: Sequence[int],
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
) -> list[Tensor]:
    """Return dA_i = s_i · B_iᵀ · dW_i and dB_i = s_i · dW_i · A_iᵀ of every layer.

    Args:
        grads: the gradient of each layer's effective weight, which is that of its W, [out, in].
        lora_a: as in ``lora_merge``, and so is all that follows.
        lora_b: each layer's B.
        slices: number of slices of each layer.
        rows: of every slice.
        ranks: of every slice.
        scaling: of every slice.

    Returns:
        dA and dB of the first layer, of the second, …, shaped and of the dtype of what they are the gradient of;
        summed in at least fp32.
    """
    gradients = []
    layers = by_layer(slices, rows, ranks, scaling)
    for grad, a, b, (n, r, s) in zip(grads, lora_a, lora_b, layers, strict=True):
        wide = torch.promote_types(grad.dtype, torch.float32)
        pairs = split_lora(a.to(wide), b.to(wide), n, r)
        parts = list(zip(grad.to(wide).split(list(n)), pairs, s, strict=True))
        gradients.append(torch.cat([s_i * (b_i.t() @ dw) for dw, (_, b_i), s_i in parts]).to(a.dtype))
        flat = torch.cat([(s_i * (dw @ a_i.t())).reshape(-1) for dw, (a_i, _), s_i in parts])
        gradients.append(flat.view(b.shape).to(b.dtype))
    return gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, lora_a, lora_b, slices, rows, ranks, scaling, _ = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(*lora_a, *lora_b)
    ctx.layout = (slices, rows, ranks, scaling)


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    lora_a, lora_b = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    adapters = lora_merge_backward(grads, lora_a, lora_b, *ctx.layout)
    return list(grads), adapters[::2], adapters[1::2], None, None, None, None, None


autograd(lora_merge, _backward, _setup_context)
for _operator in (lora_merge, lora_merge_backward):
    autocast(_operator, lambda dtype, *args: args)  # the sum is in fp32 whatever autocast says
    _operator.provider("grouped", "prelora.ops.grouped", grouped_refusal)
    _operator.provider("cpu", "prelora.ops.cpu", cpu_refusal)
    _operator.provider("triton", "prelora.kernels.lora_merge", triton_refusal)
    _operator.provider("cuda", "prelora.ops.grouped", grouped_cuda_refusal)  # after Triton's: measured on no card
