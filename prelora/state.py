"""Whether a saved state fits what it is to be loaded into; what of a scheduler and of an average is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from prelora import optim, surgery
from prelora.config import PreLoRAConfig
from prelora.errors import CheckpointError
from prelora.ramp import Ramp
from prelora.targets import Target, base_parameters, from_dicts

STATE_VERSION = 1


def check_state(
    state: Mapping[str, Any],
    *,
    config: PreLoRAConfig,
    targets: Sequence[Target],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    ema: Any,
) -> None:
    """Hold ``PreLoRA.state_dict()`` against what it is to be loaded into, before anything is changed.

    Args:
        model: the plain model, still without LoRA.

    Raises:
        CheckpointError: naming the first difference.
    """
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(f"state of version {state.get('version')}; this prelora reads version {STATE_VERSION}")
    _check_targets(from_dicts(state["targets"]), targets)
    # A field that is younger than the state was at its default.
    saved = dataclasses.asdict(PreLoRAConfig()) | dict(state["config"])
    for name, value in dataclasses.asdict(config).items():
        if saved[name] != value:
            raise CheckpointError(
                f"the state was saved with {name} = {saved[name]}, the config says {value}: "
                f"resume with the config that it was saved with"
            )
    _check_model(state["model"], model)
    if (ema is None) != (state["ema"] is None):
        raise CheckpointError(f"the state holds {'no' if state['ema'] is None else 'an'} EMA, unlike this run")
    if (scheduler is None) != (state["scheduler"] is None):
        held = "no" if state["scheduler"] is None else "a"
        raise CheckpointError(f"the state holds {held} scheduler, unlike this run")
    _check_optimizer(state, optimizer, model)


def _check_targets(saved: Sequence[Target], targets: Sequence[Target]) -> None:
    here = {target.name: (target.path, target.group, target.rows) for target in targets}
    there = {target.name: (target.path, target.group, target.rows) for target in saved}
    if here != there:
        different = sorted(set(here) ^ set(there)) or [name for name in here if here[name] != there[name]]
        raise CheckpointError(f"the state is of another model or targets: they differ in {', '.join(different[:4])}")


def _check_model(saved: Mapping[str, Tensor], model: nn.Module) -> None:
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in saved.items() if not surgery.is_lora(name)}
    if here != there:
        name = next(name for name in [*here, *there] if here.get(name) != there.get(name))
        raise CheckpointError(
            f"the state is of another model: {name} is {there.get(name)} there and {here.get(name)} here"
        )


def _check_optimizer(state: Mapping[str, Any], optimizer: Optimizer, model: nn.Module) -> None:
    saved = state["optimizer"]
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(f"the state's optimizer is {saved['class']}, not {type(optimizer).__name__}")
    known = {name for name, _ in model.named_parameters()}
    here = known & set(optim.parameter_names(optimizer, model).values())
    there = known & {name for group in saved["groups"] for name in group["params"]}
    # Parameters leave as targets are frozen, and none but LoRA's ever come.
    frozen = saved_clocks(state)[1]
    left = base_parameters([target for target in from_dicts(state["targets"]) if target.group in frozen])
    different = sorted(there - here if state["phase"] == "lora" else (there ^ here) - left)
    if different:
        raise CheckpointError(f"the state's optimizer holds other parameters: they differ in {different[:4]}")


def saved_clocks(state: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """After which epoch each group switched and was frozen; in older states all groups did at once."""
    if "switch_epochs" in state:
        return dict(state["switch_epochs"]), dict(state["freeze_epochs"])
    groups = dict.fromkeys(target.group for target in from_dicts(state["targets"]))
    switched = {} if state["phase"] == "full" else dict.fromkeys(groups, state["switch_epoch"])
    frozen = {group: epoch + state["config"]["warmup_epochs"] for group, epoch in switched.items()}
    return switched, frozen if state["phase"] == "lora" else {}


def saved_ramps(state: Mapping[str, Any], names: Iterable[str]) -> dict[str, Ramp]:
    """The ramp of each of LoRA's groups in the optimizer; in older states one for all, whose ``names`` are given."""
    saved = state["ramps"] if "ramps" in state else dict.fromkeys(names, state["ramp"])
    return {name: Ramp(**ramp) for name, ramp in saved.items()}


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """The part of a scheduler's state that is plain data; the rest is what its constructor was given."""
    return _plain(scheduler.state_dict())


def own_buffers(ema: Any) -> dict[str, Tensor]:
    """What an average keeps beside its model: torch's ``AveragedModel`` counts its updates in one."""
    buffers = ema.named_buffers() if isinstance(ema, nn.Module) else ()
    return {name: buffer for name, buffer in buffers if not name.startswith("module.")}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if isinstance(k, str) and _is_plain(v)}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return type(value) in (int, float, bool, str, dict, type(None))
