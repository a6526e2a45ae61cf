"""Merge all layers of a model in one call, and for how long the result may be used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prelora.nn.linear import LoRALinear, merged_weights
from prelora.nn.shared_weight import SharedWeight

GROUPED_DEVICES = ("cuda",)
"""Where every forward of a model merges its layers in one launch, because one for each layer would show."""


@contextlib.contextmanager
def merge_once(model: nn.Module) -> Iterator[None]:
    """Build W_eff once for every forward inside, as the micro-batches of one optimizer step; then let go of it.

    Outside, every forward merges anew: nothing that is done to a parameter between two forwards can go unseen. Inside,
    a write that autograd counts is seen and the layer merges anew; one through ``.data`` is not. A layer that FSDP2
    shards is left out: its parameters are there only while its own forward or backward runs.
    """
    layers = _open(model, forward_only=False)
    try:
        yield
    finally:
        _close(layers)


def merged_bytes(model: nn.Module) -> int:
    """Bytes of the W_eff that a step holds: of every layer whose last input was computed by merging.

    Of a layer that FSDP2 shards none: it merges again in backward.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear) and not module.sharded]
    merging = [layer for layer in layers if layer.last_plan is not None and layer.last_plan.execution == "merged"]
    return sum(layer.weight.numel() * layer.compute_dtype.itemsize for layer in merging)


def group_merges(model: nn.Module) -> None:
    """Have each forward of ``model`` merge its layers in one launch on devices where launches are dear.

    Called again, as at each of several switches, it changes nothing.
    """
    ungroup_merges(model)
    model.register_forward_pre_hook(_before_forward)
    model.register_forward_hook(_after_forward, always_call=True)


def ungroup_merges(model: nn.Module) -> None:
    """Undo ``group_merges``."""
    for hooks, ours in ((model._forward_pre_hooks, _before_forward), (model._forward_hooks, _after_forward)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def _open(model: nn.Module, *, forward_only: bool) -> list[LoRALinear]:
    """Give every layer that has none a ``SharedWeight``; merge, in one call, those that merge at any size."""
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    layers = [layer for layer in adapted if layer._shared is None and not layer.sharded]
    due: dict[tuple[torch.dtype, torch.device], list[LoRALinear]] = {}
    for layer in layers:
        layer._shared = SharedWeight(forward_only)
        if layer.merges_always:
            due.setdefault((layer.compute_dtype, layer.weight.device), []).append(layer)
    for (dtype, _), group in due.items():
        for layer, w_eff in zip(group, merged_weights(group, dtype), strict=True):
            layer._shared.keep(w_eff, layer.weight, layer.lora_A, layer.lora_B)  # type: ignore[union-attr]
    return layers


def _close(layers: Sequence[LoRALinear]) -> None:
    for layer in layers:
        layer._shared = None


def _groups(model: nn.Module) -> bool:
    """Whether this forward merges all layers at once; on a CPU no forward walks the model for nothing."""
    if torch.compiler.is_compiling():
        return False
    first = next(model.parameters(), None)
    return first is not None and first.device.type in GROUPED_DEVICES


def _before_forward(model: nn.Module, _: Any) -> None:
    if _groups(model):
        _open(model, forward_only=True)


def _after_forward(model: nn.Module, _: Any, __: Any) -> None:
    if not _groups(model):
        return
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    _close([layer for layer in layers if layer._shared is not None and layer._shared.forward_only])
