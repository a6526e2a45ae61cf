"""LoRA's gradients of the joint phase once per optimizer step, for all layers, from those of the weights.

dA = s·Bᵀ·dW and dB = s·dW·Aᵀ are linear in dW: made from the accumulated and reduced W.grad they are what backward
would have given, without its work in every micro-batch and without communication of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from prelora.nn.linear import LoRALinear, lora_arguments
from prelora.ops import lora_merge_backward
from prelora.ops.slices import split_lora
from prelora.shards import full_together, is_shard, laid_out_like, local, local_rows, rows_here, sum_over_shards


def defer_lora_grads(model: nn.Module, defer: bool = True) -> list[str]:
    """Leave A and B out of backward where their weight trains; ``lora_grads_from_weights`` then makes theirs.

    Returns:
        The qualified names of those A and B. Not of layers whose weight is frozen, and not of layers with dropout,
        whose gradients do not follow from W's.
    """
    names = []
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.defer_lora_grads = defer and module.dropout == 0 and module.weight.requires_grad
            names += [f"{path}.{part}".removeprefix(".") for part in ("lora_A", "lora_B") if module.defer_lora_grads]
    return names


def lora_grads_pending(model: nn.Module) -> bool:
    """Whether a deferred A or B is without the gradient that its weight has."""
    return any(layer.lora_A.grad is None or layer.lora_B.grad is None for layer in _due(model))


@torch.no_grad()
def lora_grads_from_weights(model: nn.Module) -> None:
    """Set the gradients of every deferred A and B from W.grad, in one call for all layers.

    Of a model sharded by FSDP2 each rank takes the rows of W.grad that it holds, and one all-reduce adds up what they
    give, after one all-gather of every A and B: a collective.
    """
    layers = _due(model)
    if not layers:
        return
    if is_shard(layers[0].weight):
        _grads_from_shards(layers)
        return
    grads = lora_merge_backward([layer.weight.grad for layer in layers], *lora_arguments(layers))
    for layer, grad_a, grad_b in zip(layers, grads[::2], grads[1::2], strict=True):
        layer.lora_A.grad, layer.lora_B.grad = grad_a, grad_b


def _grads_from_shards(layers: Sequence[LoRALinear]) -> None:
    sums = []
    whole = iter(full_together([part for layer in layers for part in (layer.lora_A, layer.lora_B)]))
    for layer in layers:
        first, _ = local_rows(layer.weight)
        grad, lora_a, lora_b = local(layer.weight.grad), next(whole), next(whole)  # type: ignore[arg-type]
        grad_a, grad_b = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
        sums += [grad_a, grad_b]
        pairs = split_lora(lora_a, lora_b, layer.rows, layer.rank)
        outs = split_lora(grad_a, grad_b, layer.rows, layer.rank)
        slices = list(zip(accumulate(layer.rows, initial=0), accumulate(layer.rows), strict=False))
        own = rows_here(layer.weight, slices)
        for (a, b), out, (start, _), (begin, end), s in zip(pairs, outs, slices, own, layer.scaling, strict=True):
            if begin < end:
                here = slice(begin - start, end - start)
                part, rank = grad[begin - first : end - first], a.shape[0]
                da, db = lora_merge_backward([part], [a], [b[here]], [1], [end - begin], [rank], [s])
                out[0].copy_(da)
                out[1][here].copy_(db)
    flat = sum_over_shards(torch.cat([part.flatten() for part in sums]), layers[0].weight)
    grads = [part.view_as(like) for part, like in zip(flat.split([p.numel() for p in sums]), sums, strict=True)]
    for layer, grad_a, grad_b in zip(layers, grads[::2], grads[1::2], strict=True):
        layer.lora_A.grad = laid_out_like(grad_a, layer.lora_A)
        layer.lora_B.grad = laid_out_like(grad_b, layer.lora_B)


def _due(model: nn.Module) -> list[LoRALinear]:
    layers = [module for module in model.modules() if isinstance(module, LoRALinear) and module.defer_lora_grads]
    return [layer for layer in layers if layer.weight.requires_grad and layer.weight.grad is not None]
