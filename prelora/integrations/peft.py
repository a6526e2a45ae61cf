"""PEFT's LoRA layers as ``LoRALinear`` and back, in place: the same parameters and function, faster kernels.

::

    model = from_peft(PeftModel.from_pretrained(base, folder, is_trainable=True))
    ...                                   # train: every LoRA Linear is a LoRALinear; an optimizer stays valid
    peft_model = to_peft(model)           # the same PeftModel again
    peft_model.save_pretrained(folder)

LoRA that did not come from PEFT is written for it by ``prelora.integrations.peft_adapter.save_adapter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from prelora import distributed, sharding
from prelora.nn import LoRALinear
from prelora.nn.merging import group_merges, ungroup_merges
from prelora.targets import tied_modules

ORIGIN = "_peft_origin"
MERGE = "fold it into the base with merge_and_unload() and go on from there"


@dataclass
class _Origin:
    """What ``from_peft`` took out of a model, for ``to_peft`` to put back; no submodule of it."""

    adapter: str
    layers: dict[str, PeftLinear]
    shell: tuple[PeftModel, nn.Module] | None = None
    """The PeftModel around it, and what that had inside."""
    marks: dict[str, Any] = field(default_factory=dict)
    """By which PEFT and transformers know a model that carries adapters."""


class _TakenApart(nn.Module):
    """In place of a PeftModel's inside while its layers are ``LoRALinear``: nothing of PEFT's would find its layers."""

    def __init__(self) -> None:
        """Nothing is set up: nothing will be read."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        raise RuntimeError(
            "from_peft took this PeftModel apart: go on with the model that it returned, "
            "and to_peft(model) makes it a PeftModel again"
        )

    def __repr__(self) -> str:
        return "TakenApart()"


def from_peft(model: nn.Module) -> nn.Module:
    """Turn every LoRA Linear of the active adapter into a ``LoRALinear``, in place.

    A and B, the base weight and the bias are the very parameters that PEFT's layers held, so an optimizer over them,
    and what is frozen, stay as they are. A module in ``modules_to_save`` stays in its wrapper, other adapters are kept
    aside. Dropout keeps its probability; its draws are ``LoRALinear``'s own.

    Args:
        model: a ``PeftModel``, or a model into which adapters were injected (``inject_adapter_in_model``,
            transformers' ``add_adapter``); not in DDP, compiled or sharded: do that afterwards.

    Returns:
        The model without the PeftModel around it (``get_base_model()``). The PeftModel raises when it is used, until
        ``to_peft`` puts it back.

    Raises:
        ValueError: a layer does what a ``LoRALinear`` does not (DoRA, rsLoRA, a quantised base, a convolution, a bias
            of LoRA's own, several active adapters, …), tied weights, a wrapper; the message says what to do instead,
            and nothing is changed.
    """
    shell = model if isinstance(model, PeftModel) else None
    base = model if shell is None else shell.get_base_model()
    if shell is not None and type(shell.base_model) is not LoraModel:
        raise ValueError(f"a PeftModel of {type(shell.base_model).__name__} is not of LoRA: {MERGE}")
    _check_whole(base)
    layers = {path: layer for path, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    if not layers:
        raise ValueError("from_peft: the model carries no layers of PEFT; accepted is a PeftModel with LoRA")
    adapter = _active_adapter(layers)
    for path, layer in layers.items():
        if (reason := _refusal(layer, adapter)) is not None:
            raise ValueError(f"{path}: {reason}")
    # A layer that only another adapter has computes its base alone, and stays.
    chosen = {p: layer for p, layer in layers.items() if isinstance(layer, PeftLinear) and adapter in layer.lora_A}
    if not chosen:
        raise ValueError(f"no layer has the active adapter {adapter!r}: call set_adapter with one that has LoRA layers")
    _check_untied(base, list(chosen))
    origin = _Origin(adapter, chosen)
    ours = {path: _lora_linear(layer, adapter) for path, layer in chosen.items()}  # all, before any takes its place
    for path, linear in ours.items():
        base.set_submodule(path, linear)
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        if mark in vars(base):
            origin.marks[mark] = vars(base).pop(mark)
    if shell is not None:
        origin.shell = shell, shell.base_model
        shell.base_model = _TakenApart()
    setattr(base, ORIGIN, origin)
    group_merges(base)
    return base


def to_peft(model: nn.Module) -> nn.Module:
    """Undo ``from_peft``: PEFT's own layers again, in place, with the parameters as they are now.

    Args:
        model: what ``from_peft`` returned.

    Returns:
        The PeftModel that was given to ``from_peft``, or the model itself if there was none.

    Raises:
        ValueError: the model did not come from ``from_peft``, is sharded, or its LoRA layers are not those any more;
            nothing is changed then.
    """
    origin = getattr(model, ORIGIN, None)
    if not isinstance(origin, _Origin):
        raise ValueError(
            "to_peft undoes from_peft, and this model is not one that it returned; "
            "prelora.integrations.peft_adapter.save_adapter writes any model's LoRA for PEFT"
        )
    _check_whole(model)
    here = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    if here.keys() != origin.layers.keys():
        different = sorted(here.keys() ^ origin.layers.keys())
        raise ValueError(f"LoRA layers came or went since from_peft: {', '.join(different[:4])}")
    for path, layer in here.items():
        if layer.merged:
            raise ValueError(f"{path} is merged: call its unmerge() first")
        theirs = origin.layers[path]
        rank, scaling = (theirs.r[origin.adapter],), (theirs.scaling[origin.adapter],)
        if (layer.rank, layer.scaling) != (rank, scaling):
            raise ValueError(
                f"{path} has ranks {layer.rank} and scalings {layer.scaling}, PEFT's layer {rank} and {scaling}: "
                f"put a layer of the same back, or write this one with save_adapter"
            )
    for path, layer in here.items():
        model.set_submodule(path, _peft_linear(layer, origin.layers[path], origin.adapter))
    ungroup_merges(model)
    delattr(model, ORIGIN)
    for mark, value in origin.marks.items():
        setattr(model, mark, value)
    if origin.shell is None:
        return model
    shell, inside = origin.shell
    shell.base_model = inside
    return shell


def _lora_linear(layer: PeftLinear, adapter: str) -> LoRALinear:
    """A ``LoRALinear`` over the parameters of PEFT's layer, with its base's hooks."""
    linear = LoRALinear.from_linear(
        cast(nn.Linear, layer.base_layer),
        layer.r[adapter],
        alpha=layer.lora_alpha[adapter],
        dropout=getattr(layer.lora_dropout[adapter], "p", 0.0),
        device=torch.device("meta"),
    )
    linear.lora_A = cast(nn.Parameter, layer.lora_A[adapter].weight)
    linear.lora_B = cast(nn.Parameter, layer.lora_B[adapter].weight)
    return linear.train(layer.training)


def _peft_linear(layer: LoRALinear, peft: PeftLinear, adapter: str) -> PeftLinear:
    """PEFT's layer again, over the parameters of ours, which a ``to`` or an assigning load may have replaced."""
    peft.base_layer.weight, peft.base_layer.bias = layer.weight, layer.bias
    peft.lora_A[adapter].weight, peft.lora_B[adapter].weight = layer.lora_A, layer.lora_B
    # What was kept aside did not follow the model from device to device.
    return peft.to(layer.weight.device).train(layer.training)


def _check_whole(model: nn.Module) -> None:
    """Refuse wrappers and sharded parameters: their insides cannot be exchanged."""
    inside = distributed.unwrap(model)
    if inside is not model or any(isinstance(module, BaseTuner) for module in model.modules()):
        raise ValueError(f"a model in {type(model).__name__}: give the plain model or the PeftModel, and wrap it after")
    if sharding.holds_parts(model):
        raise ValueError(
            "the model is sharded over ranks, and each holds a part: convert it before fully_shard, "
            "or on what PreLoRA.merged_state_dict() gathered"
        )


def _check_untied(model: nn.Module, paths: Sequence[str]) -> None:
    """Refuse to convert a layer that shares a parameter: it would train and save under two names."""
    for path, names in tied_modules(model, paths):
        raise ValueError(f"{path} shares a parameter ({', '.join(names)}): untie it, or leave it out of target_modules")


def _active_adapter(layers: dict[str, BaseTunerLayer]) -> str:
    active = {adapter for layer in layers.values() for adapter in layer.active_adapters}
    if len(active) != 1:
        raise ValueError(
            f"active adapters {sorted(active)}: a LoRALinear carries one; call set_adapter with one of them, or "
            f"add_weighted_adapter for one that is their sum"
        )
    return active.pop()


def _refusal(layer: BaseTunerLayer, adapter: str) -> str | None:
    """Why a ``LoRALinear`` cannot stand for PEFT's layer, and what to do instead; None if it can.

    It is asked what the layer computes, not how it was configured: an option of PEFT's that is younger than this
    code shows there too.
    """
    if not isinstance(layer, LoraLayer):
        return f"{_full_name(layer)} is not LoRA: {MERGE}"
    base = layer.get_base_layer()
    if _is_quantised(layer, base):
        return f"its base {_full_name(base)} is quantised: load the base in a floating-point dtype, the adapter fits it"
    if type(layer) is not PeftLinear or type(base) is not nn.Linear or layer.base_layer is not base:
        return (
            f"{_full_name(layer)} on {_full_name(base)}: accepted is lora.Linear on torch.nn.Linear; leave it out of "
            f"target_modules, or {MERGE}"
        )
    if type(base.weight) is not nn.Parameter or layer.fan_in_fan_out:
        return "its base computes or transposes its weight: accepted is a plain weight [out, in]"
    if "forward" in vars(base) or "forward" in vars(layer):
        return "its forward was replaced, as by accelerate's device_map: load it whole onto one device first"
    if layer.disable_adapters:
        return "its adapters are disabled: call enable_adapter_layers() first"
    if layer.merged:
        return f"{', '.join(layer.merged_adapters)} is merged: call unmerge_adapter() first"
    return _adapter_refusal(layer, adapter) if adapter in layer.lora_A else None


def _adapter_refusal(layer: PeftLinear, adapter: str) -> str | None:
    """Why x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ, s = alpha / rank, is not what the adapter computes."""
    if (variant := layer.lora_variant.get(adapter)) is not None:
        name = "DoRA" if layer.use_dora.get(adapter) else type(variant).__name__
        return f"{name} is more than the sum of base and low-rank path: {MERGE}, or train it as plain LoRA"
    rank, alpha = layer.r[adapter], layer.lora_alpha[adapter]
    if layer.use_rslora.get(adapter):
        return (
            f"rsLoRA scales by alpha/√rank, a LoRALinear by alpha/rank: with use_rslora=False and alpha "
            f"{alpha * rank**0.5:g} for it in alpha_pattern it is the same function"
        )
    if layer.scaling[adapter] != alpha / rank:
        return (
            f"its scaling is {layer.scaling[adapter]:g}, not alpha/rank = {alpha / rank:g}: undo scale_layer or "
            f"set_scale, or give it alpha {layer.scaling[adapter] * rank:g} in alpha_pattern"
        )
    if layer.lora_B[adapter].bias is not None:
        return f"lora_bias=True gives LoRA a bias of its own: {MERGE}, or train with lora_bias=False"
    if type(layer.lora_dropout[adapter]) not in (nn.Dropout, nn.Identity):
        return f"its dropout is {_full_name(layer.lora_dropout[adapter])}: accepted is torch.nn.Dropout"
    return None


def _is_quantised(layer: LoraLayer, base: nn.Module) -> bool:
    """Whether the base keeps integers, or PEFT knows a backend that turns its weight into numbers."""
    tensors = [*base.parameters(recurse=False), *base.buffers(recurse=False)]
    backend = getattr(layer, "quantization_backend", None)  # PEFT has it from 0.20 on
    return backend is not None or not all(tensor.is_floating_point() for tensor in tensors)


def _full_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
