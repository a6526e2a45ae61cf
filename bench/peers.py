"""One layer as others compute it: plain Linears, PEFT, and the low-rank path accumulated by library GEMMs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelora.ops import lora_two_path
from prelora.ops.cases import LinearCase, LinearTensors
from prelora.ops.slices import split_lora


def linear(case: LinearCase, tensors: LinearTensors, trains: bool) -> nn.Linear:
    """An ``nn.Linear`` on the case's own weight and bias."""
    layer = nn.Linear(case.in_features, case.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(tensors.weight, requires_grad=trains)
    layer.bias = None if tensors.bias is None else nn.Parameter(tensors.bias, requires_grad=trains)
    return layer


def peft_layer(case: LinearCase, tensors: LinearTensors, base_trains: bool) -> nn.Module:
    """PEFT's ``lora.Linear`` of the same function.

    PEFT knows no slices: it takes one adapter of all ranks together, whose B is zero outside of each slice's block.
    """
    from peft import LoraConfig, inject_adapter_in_model

    rank = sum(case.ranks)
    holder = nn.Sequential(OrderedDict(linear=linear(case, tensors, base_trains)))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"]), holder)
    layer: Any = holder.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(tensors.lora_a)
        layer.lora_B["default"].weight.copy_(block_diagonal(case, tensors))
    layer.base_layer.requires_grad_(base_trains)
    return layer


def block_diagonal(case: LinearCase, tensors: LinearTensors) -> Tensor:
    """s·B of all slices as one [out, sum of ranks]."""
    pairs = split_lora(tensors.lora_a, tensors.lora_b, case.rows, case.ranks)
    return torch.block_diag(*(scaling * b for (_, b), scaling in zip(pairs, case.scalings, strict=True)))


class _Adapter(nn.Module):
    """A frozen W and b with trainable A and B, packed as prelora packs them."""

    def __init__(self, case: LinearCase, tensors: LinearTensors) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensors.weight, requires_grad=False)
        self.bias = None if tensors.bias is None else nn.Parameter(tensors.bias, requires_grad=False)
        self.lora_a = nn.Parameter(tensors.lora_a)
        self.lora_b = nn.Parameter(tensors.lora_b)
        self.layout = (case.rows, case.ranks, case.scalings)


class Accumulate(_Adapter):
    """x·Wᵀ + b with s·(x·Aᵀ)·Bᵀ accumulated into it, forward and backward: cuBLAS or oneDNN through ``addmm_``."""

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] → [tokens, out], in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        parameters = (self.weight.to(x.dtype), bias, self.lora_a.to(x.dtype), self.lora_b.to(x.dtype))
        return _Accumulated.apply(x, *parameters, *self.layout)


class Reference(_Adapter):
    """``lora_two_path``'s reference itself, not the operator: what ``torch.compile`` can see into."""

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] → [tokens, out], in x's dtype."""
        return lora_two_path.reference(
            x, self.weight.to(x.dtype), self.bias, self.lora_a, self.lora_b, *self.layout, 0.0, None
        )[0]


class _Accumulated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        rows: Sequence[int],
        ranks: Sequence[int],
        scaling: Sequence[float],
    ) -> Tensor:
        h = torch.mm(x, lora_a.t())
        y = F.linear(x, weight, bias)
        slices = zip(y.split(rows, 1), h.split(ranks, 1), split_lora(lora_a, lora_b, rows, ranks), scaling, strict=True)
        for y_i, h_i, (_, b_i), s_i in slices:
            y_i.addmm_(h_i, b_i.t(), alpha=s_i)
        ctx.save_for_backward(x, weight, lora_a, lora_b, h)
        ctx.layout = (rows, ranks, scaling)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, h = ctx.saved_tensors
        rows, ranks, scaling = ctx.layout
        ds, db = torch.empty_like(h), torch.empty_like(lora_b)
        pairs, grads = split_lora(lora_a, lora_b, rows, ranks), split_lora(lora_a, db, rows, ranks)
        parts = zip(dy.split(rows, 1), ds.split(ranks, 1), h.split(ranks, 1), pairs, grads, scaling, strict=True)
        for dy_i, ds_i, h_i, (_, b_i), (_, db_i), s_i in parts:
            ds_i.copy_(torch.mm(dy_i, b_i * s_i))
            torch.mm(dy_i.t(), h_i * s_i, out=db_i)
        dx = torch.mm(dy, weight)
        dx.addmm_(ds, lora_a)
        return dx, None, None, torch.mm(ds.t(), x), db, None, None, None
