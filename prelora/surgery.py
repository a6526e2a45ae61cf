"""Inject, freeze and merge LoRA; each verifies what it did and returns what it changed.

All functions take the plain model (``prelora.distributed.unwrap``) and change it in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prelora.config import Execution, Freeze
from prelora.nn import LoRALinear
from prelora.nn.merging import group_merges, ungroup_merges
from prelora.shards import full
from prelora.targets import Target, base_parameters, by_module, target_linear


def inject(
    model: nn.Module,
    targets: Sequence[Target],
    ranks: Mapping[str, int],
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    execution: Execution = "auto",
    seed: int = 0,
    device: torch.device | None = None,
    initial_a: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Turn every target's Linear into a ``LoRALinear`` of its planned rank; the model's function is unchanged.

    A is drawn from ``seed`` and the module's path alone: the same on every rank and device, and no global random
    state moves.

    Args:
        device: where A and B go; None: where their weight is.
        initial_a: what A starts as, [sum of ranks, in], by module path, instead of the draw.

    Returns:
        The new parameters' names, each with the name of the weight that it adapts.

    Raises:
        ValueError: the plan and the targets name different layers.
        RuntimeError: LoRA is there already, or the model does not hold what was planned.
    """
    names = {target.name for target in targets}
    if names != set(ranks):
        raise ValueError(f"plan and targets differ in {', '.join(sorted(names ^ set(ranks))[:4])}")
    added: dict[str, str] = {}
    for path, slices in by_module(targets).items():
        linear = target_linear(model, slices[0])
        if isinstance(linear, LoRALinear):
            raise RuntimeError(f"{path} carries LoRA already: inject() once")
        layer = LoRALinear.from_linear(
            linear,
            [ranks[target.name] for target in slices],
            alpha=alpha,
            rows=[stop - start for start, stop in (target.rows or (0, linear.out_features) for target in slices)],
            dropout=dropout,
            execution=execution,
            generator=torch.Generator().manual_seed(stream(seed, path)),
            device=device,
        )
        if initial_a is not None:
            with torch.no_grad():
                layer.lora_A.copy_(initial_a[path])
        _replace(model, path, layer)
        added |= {f"{path}.lora_A": f"{path}.weight", f"{path}.lora_B": f"{path}.weight"}
        if layer.weight is not linear.weight or not (layer.lora_B.is_meta or bool((layer.lora_B == 0).all())):
            raise RuntimeError(f"{path}: injection changed the function")
    group_merges(model)
    realised = realised_ranks(model, targets)
    if realised != dict(ranks):
        wrong = next(name for name in ranks if realised.get(name) != ranks[name])
        raise RuntimeError(f"{wrong}: realised rank {realised.get(wrong)}, planned {ranks[wrong]}")
    return added


def realised_ranks(model: nn.Module, targets: Sequence[Target]) -> dict[str, int]:
    """Rank of every target as the model's parameters have it, by target name; empty without LoRA."""
    ranks: dict[str, int] = {}
    for path, slices in by_module(targets).items():
        layer = target_linear(model, slices[0])
        if isinstance(layer, LoRALinear):
            elements = sum(n * r for n, r in zip(layer.rows, layer.rank, strict=True))
            if layer.lora_A.shape[0] != sum(layer.rank) or layer.lora_B.numel() != elements:
                raise RuntimeError(f"{path}: A {tuple(layer.lora_A.shape)} is not of ranks {layer.rank}")
            ranks |= {target.name: rank for target, rank in zip(slices, layer.rank, strict=True)}
    return {target.name: ranks[target.name] for target in targets if target.name in ranks}


def freeze(
    model: nn.Module, targets: Sequence[Target], scope: Freeze = "targets", *, train_lora_a: bool = True
) -> list[str]:
    """Freeze the targets' weights and biases, or (``scope="all"``) everything but LoRA.

    Args:
        train_lora_a: False freezes the targets' A as well (LoRA-FA).

    Returns:
        Names of the parameters that trained until now and do not any more.

    Raises:
        RuntimeError: a target carries no LoRA, so nothing of it would train.
    """
    modules = by_module(targets)
    for path, slices in modules.items():
        if not isinstance(target_linear(model, slices[0]), LoRALinear):
            raise RuntimeError(f"{path} carries no LoRA: inject() before freeze()")
    base, lora_a = base_parameters(targets), {f"{path}.lora_A" for path in modules}
    frozen = []
    for name, parameter in model.named_parameters():
        chosen = name in base if scope == "targets" else not is_lora(name)
        chosen |= not train_lora_a and name in lora_a
        if chosen and parameter.requires_grad:
            parameter.requires_grad_(False)
            parameter.grad = None
            frozen.append(name)
    return frozen


def is_lora(name: str) -> bool:
    """Whether a qualified parameter name is that of an A or B."""
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model: W + s·B·A under the weight's name, no A, no B; tensors are detached.

    Of a sharded model it is whole on every rank, on the model's device: a collective, to be called on every rank.
    """
    state = {name: full(tensor) for name, tensor in model.state_dict().items() if not is_lora(name)}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{path}.weight".removeprefix(".")] = module.merged_weight()
    return state


def strip(model: nn.Module) -> list[str]:
    """Turn every ``LoRALinear`` back into a plain ``nn.Linear`` with the merged weight; returns their paths."""
    paths = [path for path, module in model.named_modules() if isinstance(module, LoRALinear)]
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, LoRALinear)
        _replace(model, path, layer.to_linear())
    ungroup_merges(model)
    return paths


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def stream(seed: int, path: str) -> int:
    """A 63-bit seed of its own for every (seed, path); Python's ``hash`` differs between processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "big") >> 1
