"""Merged execution that keeps no W_eff: it is merged in forward, and again in backward from W, A and B.

For FSDP2, which gathers a layer's parameters for its forward, lets go of them, and gathers them again for its
backward: what autograd saves are the parameters themselves, whose memory comes and goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prelora.ops.lora_linear import gradients, kept_for_backward
from prelora.ops.lora_merge import lora_merge


def lora_linear_merged_again(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """``lora_linear`` of the W_eff that ``lora_merge`` makes in ``dtype``; for the arguments see those two.

    Args:
        dtype: autocast's, to which x is cast as well, or W's, which x must have.
    """
    x = x if dtype == weight.dtype else x.to(dtype)
    return _MergedAgain.apply(x, weight, bias, lora_a, lora_b, (rows, ranks, scaling), dtype)


class _MergedAgain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, layout: Any, dtype: torch.dtype
    ) -> Tensor:
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        ctx.need = [need_x, need_weight, bias is not None and need_bias, need_a, need_b]
        ctx.layout, ctx.dtype = layout, dtype
        ctx.save_for_backward(*kept_for_backward(x, a, ctx.need), weight if need_x else None, a, b)
        return F.linear(x, _merge(weight, a, b, layout, dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, weight, lora_a, lora_b = ctx.saved_tensors
        w_eff = None if weight is None else _merge(weight, lora_a, lora_b, ctx.layout, ctx.dtype)
        return *gradients(dy, (x, s, w_eff, lora_a, lora_b), ctx.layout, ctx.need), None, None


def _merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, layout: Any, dtype: torch.dtype) -> Tensor:
    rows, ranks, scaling = layout
    return lora_merge([weight], [lora_a], [lora_b], [len(rows)], rows, ranks, scaling, dtype)[0]
