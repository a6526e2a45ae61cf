"""LoRA's gradients of the joint phase once per optimizer step, for all layers, from those of the weights.

dA = s·Bᵀ·dW and dB = s·dW·Aᵀ are linear in dW: made from the accumulated and reduced W.grad they are what backward
would have given, without its work in every micro-batch and without communication of their own.
"""

from __future__ import annotations

import torch
from torch import nn

from prelora.nn.linear import LoRALinear, lora_arguments
from prelora.ops import lora_merge_backward


def defer_lora_grads(model: nn.Module, defer: bool = True) -> list[str]:
    """Leave A and B out of backward while their weight trains; ``lora_grads_from_weights`` then makes theirs.

    Returns:
        The qualified names of those A and B. Not of layers with dropout, whose gradients do not follow from W's.
    """
    names = []
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.defer_lora_grads = defer and module.dropout == 0
            names += [f"{path}.{part}".removeprefix(".") for part in ("lora_A", "lora_B") if module.defer_lora_grads]
    return names


def lora_grads_pending(model: nn.Module) -> bool:
    """Whether a deferred A or B is without the gradient that its weight has."""
    return any(layer.lora_A.grad is None or layer.lora_B.grad is None for layer in _due(model))


@torch.no_grad()
def lora_grads_from_weights(model: nn.Module) -> None:
    """Set the gradients of every deferred A and B from W.grad, in one call for all layers."""
    layers = _due(model)
    if not layers:
        return
    grads = lora_merge_backward([layer.weight.grad for layer in layers], *lora_arguments(layers))
    for layer, grad_a, grad_b in zip(layers, grads[::2], grads[1::2], strict=True):
        layer.lora_A.grad, layer.lora_B.grad = grad_a, grad_b


def _due(model: nn.Module) -> list[LoRALinear]:
    layers = [module for module in model.modules() if isinstance(module, LoRALinear) and module.defer_lora_grads]
    return [layer for layer in layers if layer.weight.requires_grad and layer.weight.grad is not None]
