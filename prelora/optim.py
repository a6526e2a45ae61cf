"""One optimizer through all phases: named groups, moments carried by name, schedulers carried along.

The library names an optimizer's parameters by the model's qualified names, because indices change at the switch.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from prelora.errors import CheckpointError, OptimizerError
from prelora.shards import laid_out_like, local

LR_KEYS = ("lr", "initial_lr", "max_lr", "min_lr")
LR_LISTS = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_values", "warmup_steps")
OTHER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")
HOOK_TABLES = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
LORA_SUFFIX = "/lora"


def is_lora_group(name: str) -> bool:
    """Whether a group's name is one that ``rebuild_optimizer`` gives to LoRA's."""
    return name.rstrip("0123456789").endswith(LORA_SUFFIX)


def parameter_names(optimizer: Optimizer, model: nn.Module) -> dict[Tensor, str]:
    """The qualified name of every parameter in the optimizer; ``extra.<group>.<index>`` for one outside the model."""
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {
        parameter: known.get(parameter, f"extra.{g}.{i}")
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
    }


def check_rebuildable(optimizer: Optimizer) -> None:
    """Refuse an optimizer that cannot be rebuilt around a changed set of parameters.

    Raises:
        OptimizerError: with the reason and what is accepted.
    """
    name = type(optimizer).__name__
    accepted = "accepted is any torch.optim.Optimizer whose state is kept per parameter, such as AdamW or SGD"
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(f"{name} is not a torch.optim.Optimizer; {accepted}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError(f"LBFGS keeps one flat history over all parameters; {accepted}")
    parameters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for key, state in optimizer.state.items():
        if key not in parameters or not isinstance(state, dict):
            raise OptimizerError(f"{name} keeps state under {key!r:.60}, not one of its parameters; {accepted}")
        bad = next((k for k, v in state.items() if not isinstance(v, (Tensor, int, float, type(None)))), None)
        if bad is not None:
            raise OptimizerError(f"{name} keeps {type(state[bad]).__name__} {bad!r} per parameter; {accepted}")
    _construct(optimizer, [{**group, "params": list(group["params"])} for group in optimizer.param_groups])


def rebuild_optimizer(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    added: Mapping[str, str] | None = None,
    dropped: Collection[str] = (),
    lr_mult: float = 1.0,
) -> tuple[Optimizer, list[int]]:
    """A new optimizer of the same class without ``dropped`` and with ``added``; surviving state is carried as it is.

    Added parameters enter a group ``<name>/lora`` beside the group of the weight they adapt: same options, weight
    decay 0, learning rates times ``lr_mult``, fresh state. What is added later to the same group's weights enters a
    ``<name>/lora2`` and so on. The given optimizer is retired: using it raises.

    Args:
        added: name of each new parameter → name of the weight that it adapts.
        dropped: names of the parameters that leave.

    Returns:
        The optimizer, and for each of its groups the index of the old group that it stems from.
    """
    names = parameter_names(optimizer, model)
    by_name = dict(model.named_parameters())
    taken = {group.get("name") for group in optimizer.param_groups}
    groups: list[dict[str, Any]] = []
    parents: list[int] = []
    for index, old in enumerate(optimizer.param_groups):
        label = old.get("name", f"group{index}")
        options = {key: value for key, value in old.items() if key not in ("params", "param_names", "name")}
        kept = [parameter for parameter in old["params"] if names[parameter] not in dropped]
        adapted = {names[parameter] for parameter in old["params"]}
        new = [by_name[name] for name, weight in (added or {}).items() if weight in adapted]
        if kept:
            groups.append({**options, "params": kept, "name": label})
            parents.append(index)
        if new:
            options.pop("step", None)  # timm's LAMB and Adan count for the group: LoRA's moments start at 0
            scaled = {key: options[key] * lr_mult for key in LR_KEYS if options.get(key) is not None}
            decay = {"weight_decay": 0.0} if "weight_decay" in options else {}
            groups.append({**options, **scaled, **decay, "params": new, "name": _lora_name(label, taken)})
            parents.append(index)
    kept_parameters = {parameter for group in groups for parameter in group["params"]}
    homeless = [name for name in added or {} if by_name[name] not in kept_parameters]
    if homeless:
        raise OptimizerError(f"{homeless[0]} would not train: the optimizer does not hold the weight that it adapts")
    rebuilt = _construct(optimizer, groups)
    for parameter, state in optimizer.state.items():
        if parameter in kept_parameters:
            rebuilt.state[parameter] = state
    for table in HOOK_TABLES:
        # The table itself, so that a handle given out before still removes its hook.
        setattr(rebuilt, table, getattr(optimizer, table))
    _retire(optimizer)
    return rebuilt, parents


def _lora_name(label: str, taken: Collection[str | None]) -> str:
    """The first of ``<label>/lora``, ``<label>/lora2``, … that no group has."""
    names = itertools.chain([label + LORA_SUFFIX], (f"{label}{LORA_SUFFIX}{n}" for n in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _construct(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """A fresh optimizer of the same class; the groups carry every option, defaults only satisfy the signature."""
    cls = type(optimizer)
    signature = inspect.signature(cls.__init__).parameters
    arguments = {key: value for key, value in optimizer.defaults.items() if key in signature}
    try:
        rebuilt = cls(groups, **arguments)
    except (AttributeError, TypeError, ValueError) as error:
        raise OptimizerError(f"{cls.__name__} cannot be rebuilt from its defaults: {error}") from error
    rebuilt.defaults = dict(optimizer.defaults)
    return rebuilt


class _RetiredGroups(list):
    """Groups of a replaced optimizer: a stale loop or scheduler must fail loudly, not train or schedule nothing."""

    def _refuse(self, *_: object) -> NoReturn:
        raise RuntimeError(
            "this optimizer was replaced at the switch: use pre.optimizer (and pre.scheduler: "
            "pass scheduler= to PreLoRA) from now on"
        )

    __iter__ = __getitem__ = __len__ = _refuse


def _retire(optimizer: Optimizer) -> None:
    optimizer.state.clear()
    optimizer.param_groups = _RetiredGroups()


def check_schedulable(scheduler: Any, optimizer: Optimizer) -> None:
    """Refuse a scheduler that ``rebuild_scheduler`` cannot carry over.

    Raises:
        OptimizerError: with the reason and what is accepted.
    """
    name = type(scheduler).__name__
    # timm's PlateauLRScheduler keeps its state in a second scheduler, and does not save it.
    torch_or_timm = isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)) or hasattr(scheduler, "base_values")
    if not torch_or_timm or hasattr(scheduler, "lr_scheduler"):
        raise OptimizerError(
            f"{name} cannot be carried over; accepted are torch's LR schedulers and timm's but PlateauLRScheduler"
        )
    if scheduler.optimizer is not optimizer:
        raise OptimizerError(f"{name} schedules another optimizer than the one given")


def rebuild_scheduler(scheduler: Any, optimizer: Optimizer, parents: list[int]) -> Any:
    """The same schedule for the rebuilt optimizer: every group follows the group that it stems from.

    Args:
        scheduler: one that ``check_schedulable`` lets pass: a torch or timm scheduler, with its values for each
            group in the lists that theirs have.
        parents: as ``rebuild_optimizer`` returns it.
    """
    rebuilt = copy.copy(scheduler)
    rebuilt.optimizer = optimizer
    if getattr(scheduler, "_step_count", None) == 1:
        rebuilt._step_count = 2  # at 1, torch's first step warns that optimizer.step is not the one that it wrapped
    ratios = [_ratio(group, scheduler, parent) for group, parent in zip(optimizer.param_groups, parents, strict=True)]
    for attribute in (*LR_LISTS, *OTHER_LISTS):
        old = getattr(scheduler, attribute, None)
        if isinstance(old, list):
            values = [old[parent] for parent in parents]
            if attribute in LR_LISTS:
                values = [value * ratio for value, ratio in zip(values, ratios, strict=True)]
            setattr(rebuilt, attribute, values)
    if hasattr(scheduler, "_schedulers"):  # SequentialLR, ChainedScheduler
        rebuilt._schedulers = [rebuild_scheduler(inner, optimizer, parents) for inner in scheduler._schedulers]
    return rebuilt


def _ratio(group: Mapping[str, Any], scheduler: Any, parent: int) -> float:
    """A group's learning rate over its parent's."""
    if not is_lora_group(group["name"]):
        return 1.0
    bases = getattr(scheduler, "base_lrs", None) or getattr(scheduler, "base_values", None)
    # ReduceLROnPlateau knows no initial rates, only the last ones.
    mine, base = (group["initial_lr"], bases[parent]) if bases else (group["lr"], scheduler._last_lr[parent])
    return float(mine / base) if base else 1.0


def named_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's groups and state by parameter name: nested dicts of tensors and plain values."""
    names = parameter_names(optimizer, model)
    groups = [
        {key: [names[p] for p in value] if key == "params" else value for key, value in group.items()}
        for group in optimizer.param_groups
    ]
    return {
        "class": type(optimizer).__name__,
        "groups": groups,
        "state": {names[parameter]: dict(state) for parameter, state in optimizer.state.items()},
    }


def load_named_state(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Load what ``named_state`` gave into an optimizer over the same names; order of groups and names may differ.

    Raises:
        CheckpointError: another optimizer class, other parameters or grouped otherwise; nothing is changed then.
    """
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint's optimizer is {saved['class']}, the one given is {type(optimizer).__name__}"
        )
    names = parameter_names(optimizer, model)
    options = {name: group for group in saved["groups"] for name in group["params"]}
    if set(options) != set(names.values()):
        different = sorted(set(options) ^ set(names.values()))
        raise CheckpointError(
            f"the checkpoint's optimizer holds {len(options)} parameters, the one given {len(names)}; "
            f"they differ in {', '.join(different[:4])}"
        )
    groups = [group for group in optimizer.param_groups if group["params"]]
    for group in groups:
        members = [names[parameter] for parameter in group["params"]]
        if set(members) != set(options[members[0]]["params"]):
            raise CheckpointError(f"the checkpoint's optimizer groups {members[0]} with other parameters than this one")
    for group in groups:
        source = options[names[group["params"][0]]]
        for key, value in source.items():
            if key not in ("params", "param_names"):
                group[key] = _like(group.get(key), value)
        on_device = bool(group.get("capturable") or group.get("fused"))
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
            if names[parameter] in saved["state"]:
                optimizer.state[parameter] = {
                    key: _placed(key, value, parameter, on_device)
                    for key, value in saved["state"][names[parameter]].items()
                }


def _placed(key: str, value: Any, parameter: Tensor, on_device: bool) -> Any:
    """A copy of a state value where the optimizer expects it: torch keeps ``step`` on the CPU unless capturable."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and not on_device:
        return value.to("cpu", copy=True)
    return laid_out_like(value, parameter).clone()


def _like(current: Any, value: Any) -> Any:
    """A copy of ``value``, of the type of what stands there: JSON knows no tuples."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(value) if isinstance(current, tuple) else value


def state_bytes(optimizer: Optimizer) -> dict[Tensor, int]:
    """Bytes of state tensors per parameter, on this rank."""
    return {
        parameter: sum(local(value).nbytes for value in state.values() if isinstance(value, Tensor))
        for parameter, state in optimizer.state.items()
    }
