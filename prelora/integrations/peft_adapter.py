"""A model's ``LoRALinear`` layers as a PEFT adapter: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from prelora import sharding
from prelora.nn import LoRALinear
from prelora.ops.slices import split_b
from prelora.surgery import is_lora
from prelora.targets import tied_modules

CONFIG, TENSORS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.safetensors"
FILES = (CONFIG, TENSORS, BASE)
PREFIX = "base_model.model."
"""By which PEFT names an adapter's tensors, before the stock model's own names."""


@dataclass(frozen=True)
class Adapter:
    """What PEFT is to load, and onto what."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    """By the names in PEFT's file: A [rank, in] and B [out, rank] of each layer, and the modules to save."""
    base: dict[str, Tensor]
    """State dict of the stock model: the base weights, and whatever else it has."""
    ranks: dict[str, int]
    """Rank by module path: of a fused Linear the sum over its slices."""
    base_only: tuple[str, ...]
    """Parameters beside LoRA's layers that trained and for which PEFT has no place: they stand in ``base`` alone."""


def make_adapter(model: nn.Module, trained: Collection[str] | None = None) -> Adapter:
    """A model's LoRA as PEFT has it, each layer under its exact path.

    A Linear of several row slices becomes one adapter of their ranks' sum, with a block of B for each slice and
    zeros beside the blocks; scalings that differ between the slices are folded into B.

    Args:
        model: the plain model with ``LoRALinear`` layers; not changed, tensors are shared with it where they can be.
        trained: names of the parameters that train or trained beside the frozen base, of which modules to save are
            made; None: those that require a gradient.

    Raises:
        ValueError: there is no LoRA, it is sharded, a target's weight is tied to another, or layers differ in dropout.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA layers, so there is no adapter to write: save its state dict")
    if sharding.holds_parts(model):
        raise ValueError(
            "the model is sharded over ranks, and each holds a part: export the run's checkpoint (prelora export), "
            "which is whole, or take PreLoRA.merged_state_dict()"
        )
    for path, names in tied_modules(model, layers):
        raise ValueError(f"{path} shares a parameter ({', '.join(names)}): untie it, as by a copy of its own")
    dropouts = {layer.dropout for layer in layers.values()}
    if len(dropouts) > 1:
        raise ValueError(f"layers of dropout {sorted(dropouts)}: a LoraConfig has one for all; set the layers' alike")
    if trained is None:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = model.state_dict()
    modules, base_only = modules_to_save(model, trained)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = _one_b(layer)
    for path in modules:
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in state.items() if name.startswith(f"{path}.")}
    ranks = {path: sum(layer.rank) for path, layer in layers.items()}
    return Adapter(
        config=_config(layers, modules, dropouts.pop()),
        tensors=tensors,
        base={name: tensor for name, tensor in state.items() if not is_lora(name)},
        ranks=ranks,
        base_only=base_only,
    )


def save_adapter(
    model: nn.Module, folder: Path, trained: Collection[str] | None = None, metadata: Mapping[str, str] | None = None
) -> Adapter:
    """Write a model's LoRA for PEFT, and the stock model's weights that it belongs to beside it.

    ``PeftModel.from_pretrained(stock, folder)``, with ``base.safetensors`` loaded into the stock model, computes what
    ``model`` does.

    Args:
        model: as for ``make_adapter``.
        trained: as for ``make_adapter``.
        folder: made if it is not there; files of these three names are overwritten.
        metadata: for the header of ``base.safetensors``.

    Raises:
        ValueError: as ``make_adapter``.
        OSError, SafetensorError: a file cannot be written.
    """
    adapter = make_adapter(model, trained)
    folder.mkdir(parents=True, exist_ok=True)
    adapter.config.save_pretrained(str(folder))
    save_file(_contiguous(adapter.tensors), folder / TENSORS, metadata={"format": "pt"})
    save_file(_contiguous(adapter.base), folder / BASE, metadata={"format": "pt", **(metadata or {})})
    return adapter


def check_loaded(model: PeftModel, adapter: Adapter) -> None:
    """Hold what PEFT made of an adapter against what was meant.

    Raises:
        ValueError: another layer was adapted, a rank differs, or a tensor is not, bit for bit, where it belongs.
    """
    layers = {path: layer for path, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    ranks = {path: layer.r[name] for path, layer in layers.items() for name in layer.active_adapters}
    if ranks != adapter.ranks:
        wrong = sorted(ranks.items() ^ adapter.ranks.items())[0][0]
        raise ValueError(f"PEFT realised rank {ranks.get(wrong, 0)} at {wrong}, planned {adapter.ranks.get(wrong, 0)}")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    if different := sorted(loaded.keys() ^ adapter.tensors.keys()):
        raise ValueError(f"PEFT's tensors are others than the adapter's: they differ in {', '.join(different[:4])}")
    for name, tensor in adapter.tensors.items():
        if not torch.equal(loaded[name].to(tensor), tensor):
            raise ValueError(f"PEFT loaded other numbers into {name}")


def modules_to_save(model: nn.Module, trained: Collection[str]) -> tuple[list[str], tuple[str, ...]]:
    """The modules that hold what trained beside LoRA, and the names of the parameters that no such module can hold.

    PEFT saves, and trains on, whole modules: one is listed if all of it trained and LoRA is not in it. It finds them
    by the end of their path, so one whose path others end in, too, is left out, unless those are listed themselves
    or hold nothing.

    Returns:
        Exact paths, and names in the model's order.
    """
    lora = [path for path, module in model.named_modules() if isinstance(module, LoRALinear)]
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in lora]
    trained = set(trained)
    kept = [name for name in names if name in trained]
    state = model.state_dict()
    owners = [path for path in dict.fromkeys(name.rpartition(".")[0] for name in kept) if path]
    whole = {
        path
        for path in owners
        if trained.issuperset(_under(path, names))
        and not _under(path, lora)
        and not isinstance(
            model.get_submodule(path), (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
        )
    }
    chosen = [path for path in owners if path in whole and not any(_under(other, [path]) for other in whole)]
    while ambiguous := [path for path in chosen if _takes_more(path, model, chosen, lora, state)]:
        chosen = [path for path in chosen if path not in ambiguous]
    return chosen, tuple(name for name in kept if not any(name.startswith(f"{path}.") for path in chosen))


def _takes_more(
    path: str, model: nn.Module, chosen: Collection[str], lora: Collection[str], state: Mapping[str, Tensor]
) -> bool:
    """Whether PEFT, given ``path`` as a module to save, would take another with it or pass over a LoRA layer."""
    others = [name for name, _ in model.named_modules() if name.endswith(path) and name not in chosen]
    # As PEFT's check_target_module_exists matches it: not escaped.
    excludes = re.compile(rf"(^|.*\.){path}($|\..*)")
    return any(_under(name, state) for name in others) or any(map(excludes.match, lora))


def _under(path: str, names: Collection[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{path}.")]


def _config(layers: Mapping[str, LoRALinear], modules: list[str], dropout: float) -> LoraConfig:
    """Every layer by its exact path: PEFT would take a bare name for the end of any path."""
    ranks = {path: sum(layer.rank) for path, layer in layers.items()}
    alphas = {path: _alpha(layer) for path, layer in layers.items()}
    largest = max(ranks, key=lambda path: ranks[path])
    return LoraConfig(
        r=ranks[largest],
        lora_alpha=alphas[largest],  # type: ignore[arg-type]  # PEFT only ever divides it
        lora_dropout=dropout,
        target_modules="|".join(map(re.escape, layers)),
        rank_pattern={f"^{re.escape(path)}": rank for path, rank in ranks.items()},
        alpha_pattern={f"^{re.escape(path)}": alpha for path, alpha in alphas.items()},
        modules_to_save=modules or None,
        inference_mode=True,
    )


def _alpha(layer: LoRALinear) -> int | float:
    """PEFT's alpha, from which alpha / (sum of ranks) is the largest of the slices' scalings."""
    if len(layer.rank) == 1 and layer.alpha is not None:
        alpha = float(layer.alpha)
    else:
        alpha = float(max(layer.scaling) * sum(layer.rank))
    return int(alpha) if alpha.is_integer() else alpha


@torch.no_grad()
def _one_b(layer: LoRALinear) -> Tensor:
    """B [out, sum of ranks]: each slice's block, times its scaling over the one that PEFT applies to all."""
    if len(layer.rows) == 1:
        return layer.lora_B.detach()
    common = max(layer.scaling)
    blocks = split_b(layer.lora_B.detach(), layer.rows, layer.rank)
    scaled = [
        b if s == common else (b.double() * (s / common)).to(b) for b, s in zip(blocks, layer.scaling, strict=True)
    ]
    return torch.block_diag(*scaled)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
