"""FSDP2: apply ``fully_shard``, and take a model out of it and put it back around surgery.

Everything that leans on what ``fully_shard`` leaves inside a model, which no public name undoes, is here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from prelora.shards import is_shard
from prelora.targets import Target, target_linear

SETTINGS = (
    "reduce_grads",
    "all_reduce_grads",
    "reshard_after_backward",
    "reduce_scatter_max_input_buffers",
    "gradient_divide_factor",
    "reduce_scatter_unused_params",
    "force_sum_reduction_for_comms",
    "unshard_async_op",
    "unshard_in_backward",
    "_all_reduce_hook",
    "_all_reduce_hook_stream",
    "_all_gather_comm",
    "_reduce_scatter_comm",
)
"""What the methods of an ``FSDPModule`` set, to be set again."""
PREFETCHES = ("_states_to_forward_prefetch", "_states_to_backward_prefetch")
MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
HOOK_TABLES = tuple(name for name in vars(nn.Identity()) if name.endswith("hooks"))
ACCEPTED = "accepted is fully_shard on the blocks, then on the model, over one mesh and by rows (Shard(0))"


@dataclass(frozen=True)
class Unit:
    """One call of ``fully_shard``."""

    paths: tuple[str, ...]
    """Of the modules it was given; ``""`` is the model."""
    arguments: dict[str, Any]
    settings: dict[str, Any]
    prefetches: dict[str, list[str]]
    """Paths of the modules whose units are gathered ahead of time with this one."""


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the plain model or to a part of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def holds_parts(model: nn.Module) -> bool:
    """Whether this rank holds parts of the model's parameters between uses, by ``fully_shard`` or otherwise."""
    return is_sharded(model) or any(map(is_shard, model.parameters()))


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Apply ``fully_shard`` over all ranks to each of the model's repeated blocks, then to the model; in place.

    Build the optimizer after it; compile the blocks, by ``Module.compile``, before it.

    Args:
        device: where the parameters go; its type chooses the mesh's backend.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The children of every outermost ``ModuleList`` or ``Sequential`` of two or more modules of one class.

    So timm's ``blocks`` and transformers' ``encoder.layer`` are.
    """
    found: list[nn.Module] = []
    for module in model.children():
        children = list(module.children())
        repeated = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1
        if repeated and len({type(child) for child in children}) == 1 and any(True for _ in children[0].parameters()):
            found += children
        else:
            found += blocks(module)
    return found


def reshard(model: nn.Module) -> None:
    """Have every module hold its sharded parameters: after a forward alone FSDP2 leaves the root's gathered."""
    if is_sharded(model):
        for module in _fsdp_modules(model).values():
            module.reshard()


def traffic(model: nn.Module) -> dict[str, int]:
    """Bytes of what a forward and backward gathers, and of the gradients that a reducing backward scatters.

    A parameter is gathered for the forward and, where its unit has let go of it, again for the backward.
    """
    sent = {"all_gather": 0, "reduce_scatter": 0}
    for state in {module._get_fsdp_state() for module in _fsdp_modules(model).values()}:
        for group in state._fsdp_param_groups:
            gathers = 2 if group._reshard_after_forward else 1
            for parameter in (held.sharded_param for held in group.fsdp_params):
                gathered_in = state._mp_policy.param_dtype or parameter.dtype
                sent["all_gather"] += gathers * parameter.numel() * gathered_in.itemsize
                if parameter.requires_grad:
                    reduced_in = state._mp_policy.reduce_dtype or gathered_in
                    sent["reduce_scatter"] += parameter.numel() * reduced_in.itemsize
    return sent


def check_sharding(model: nn.Module, targets: Sequence[Target]) -> None:
    """Refuse a model whose parameters are spread over ranks in a way that cannot go through the switch.

    Raises:
        TypeError: with the reason and what is accepted.
    """
    spread = next((name for name, parameter in model.named_parameters() if is_shard(parameter)), None)
    if not is_sharded(model):
        if spread is not None:
            raise TypeError(f"parameter {spread!r} is a DTensor, but not FSDP2's; {ACCEPTED}")
        return
    if "" not in _fsdp_modules(model):
        raise TypeError(f"fully_shard was applied to parts of the model, but not to the model itself; {ACCEPTED}")
    units = _units(model)
    meshes = {unit.arguments["mesh"] for unit in units}
    if len(meshes) > 1:
        raise TypeError(f"the model is sharded over {len(meshes)} meshes; {ACCEPTED}")
    for target in targets:
        if not is_shard(target_linear(model, target).weight):
            raise TypeError(f"{target.path}.weight is one of fully_shard's ignored_params: a target must be sharded")


@contextlib.contextmanager
def taken_apart(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is plain, for surgery; after it, sharded as before, together with what was added.

    Nothing is gathered or sent: inside, each sharded parameter's place is held by one of the same shape on the meta
    device, and afterwards the very same parameter, with its gradient and the optimizer's state, stands there again.
    What is added must be a plain parameter, equal on all ranks. After an exception inside, the model is of no use.

    Raises:
        RuntimeError: ``fully_shard`` left something behind, or the model is not sharded afterwards as it was.
    """
    from torch.distributed.fsdp import fully_shard

    reshard(model)
    units = _units(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    sharded = {name: parameter for name, parameter in named.items() if is_shard(parameter)}
    ignored = {parameter for parameter in named.values() if not is_shard(parameter)}
    _take_apart(model, sharded)
    yield
    for unit in reversed(units):
        modules = [model.get_submodule(path) for path in unit.paths]
        fully_shard(modules if len(modules) > 1 else modules[0], **unit.arguments, ignored_params=ignored or None)
    for name, parameter in sharded.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = parameter
    _restore(model, units)
    now = dict(model.named_parameters(remove_duplicate=False))
    if wrong := [name for name, parameter in now.items() if is_shard(parameter) == (parameter in ignored)]:
        raise RuntimeError(f"{wrong[0]} is {'' if is_shard(now[wrong[0]]) else 'not '}sharded after the surgery")


def _fsdp_modules(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.fsdp import FSDPModule

    return {path: module for path, module in model.named_modules() if isinstance(module, FSDPModule)}


def _units(model: nn.Module) -> list[Unit]:
    """Every call of ``fully_shard`` on the model, a module's before those on modules inside it."""
    modules = _fsdp_modules(model)
    paths: dict[Any, list[str]] = {}
    for path, module in modules.items():
        paths.setdefault(module._get_fsdp_state(), []).append(path)
    mesh = next((group.mesh_info.mesh for state in paths for group in state._fsdp_param_groups), None)
    return [
        Unit(
            tuple(own),
            _arguments(state, own[0], mesh),
            {name: getattr(group, name) for group in state._fsdp_param_groups for name in SETTINGS},
            {name: [paths[other][0] for other in getattr(state, name)] for name in PREFETCHES},
        )
        for state, own in paths.items()
    ]


def _arguments(state: Any, path: str, mesh: Any) -> dict[str, Any]:
    """What ``fully_shard`` was called with; ``mesh``: what it was without parameters to tell."""
    from torch.distributed.fsdp import OffloadPolicy
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

    name = path or "the model"
    if len(state._fsdp_param_groups) > 1:
        raise TypeError(f"fully_shard of {name} spreads parameters over several meshes; {ACCEPTED}")
    arguments = {"mesh": mesh, "mp_policy": state._mp_policy, "reshard_after_forward": None}
    for group in state._fsdp_param_groups:
        info, after = group.mesh_info, group.post_forward_mesh_info
        if not isinstance(info, FSDPMeshInfo) or info.is_spmd_mesh:
            raise TypeError(f"{name} is spread by replicate() or over dp_mesh_dims; {ACCEPTED}")
        if type(group.offload_policy) is not OffloadPolicy:
            raise TypeError(f"{name} has {group.offload_policy}; accepted is no offload_policy")
        if any(parameter.fsdp_placement.dim != 0 for parameter in group.fsdp_params):
            raise TypeError(f"shard_placement_fn of {name} gave another dimension than 0; {ACCEPTED}")
        arguments["mesh"] = info.mesh
        if not state._auto_reshard_after_forward:
            whole = after is None or after.mesh == info.mesh
            arguments["reshard_after_forward"] = after is not None if whole else after.shard_mesh_size
    return arguments


def _take_apart(model: nn.Module, sharded: dict[str, nn.Parameter]) -> None:
    """Undo every ``fully_shard``: the parameters, the hooks, the state and the class; then look whether all went."""
    from torch.distributed._composable_state import _module_state_mapping

    standing_in: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in sharded.items():
        path, _, leaf = name.rpartition(".")
        shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        model.get_submodule(path)._parameters[leaf] = standing_in.setdefault(
            parameter, nn.Parameter(shape, requires_grad=parameter.requires_grad)
        )
    for module in _fsdp_modules(model).values():
        state = module._get_fsdp_state()
        handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
        for group in state._fsdp_param_groups:
            handles += [parameter._post_load_hook_handle for parameter in group.fsdp_params]
            handles += group._module_to_pre_save_state_dict_hook_handle.values()
            handles += group._module_to_pre_load_state_dict_hook_handle.values()
        for handle in handles:
            handle.remove()
        for table in [value for value in vars(module).values() if isinstance(value, dict)]:
            for key in [key for key, value in table.items() if value is state or key == "fully_shard"]:
                del table[key]
        _module_state_mapping.pop(module)
        module.__class__ = type(module).__bases__[1]
    for path, module in model.named_modules():
        for mark in MARKS:
            vars(module).pop(mark, None)
        hooks = [hook for table in HOOK_TABLES for hook in vars(module)[table].values()]
        if any(
            getattr(getattr(hook, "hook", hook), "__module__", "").startswith("torch.distributed.fsdp")
            for hook in hooks
        ):
            raise RuntimeError(f"fully_shard left a hook on {path or 'the model'}: this torch's is not known here")
    left = [name for name, parameter in model.named_parameters() if is_shard(parameter)]
    if left or is_sharded(model):
        raise RuntimeError(f"fully_shard cannot be undone: {left or list(_fsdp_modules(model))}")


def _restore(model: nn.Module, units: Sequence[Unit]) -> None:
    """Have the new units take up the parameters that stand in their modules, and set what was set on the old."""
    modules = _fsdp_modules(model)
    for unit in units:
        state = modules[unit.paths[0]]._get_fsdp_state()
        for group in state._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter.reset_sharded_param()
            for name, value in unit.settings.items():
                setattr(group, name, value)
        for name, paths in unit.prefetches.items():
            setattr(state, name, [modules[path]._get_fsdp_state() for path in paths])
    if wrong := [unit.paths for unit, found in zip(units, _units(model), strict=True) if unit != found]:
        raise RuntimeError(f"{wrong[0]} is not sharded as it was before the surgery")
