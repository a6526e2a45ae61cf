"""One epoch's norms and loss → the history that Algorithms 1 and 2 read.

``measure`` turns a live model into numbers with a single device-to-host copy; ``Monitor`` keeps the windows, and
its state is a plain dict.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prelora.config import PreLoRAConfig
from prelora.convergence import Verdict, layer_changes, partial_convergence_test
from prelora.nn import LoRALinear
from prelora.nn.linear import lora_arguments
from prelora.ops import merged_norms, weight_norms
from prelora.sharded_norms import sharded_effective_weight, sharded_norms
from prelora.shards import is_shard
from prelora.targets import Target, by_group, by_module, target_linear


@dataclass(frozen=True)
class Norms:
    """Frobenius norms by target name, accumulated in at least fp32, biases excluded."""

    effective: dict[str, float]
    """‖W + s·B·A‖, the norm that Algorithm 1 watches; ‖W‖ before the switch."""
    base: dict[str, float]
    """‖W‖."""
    lora: dict[str, float]
    """‖s·B·A‖; empty before the switch."""
    update: dict[str, float]
    """‖W_t − W_{t−1}‖ / ‖W_t‖ of the effective weight since the snapshot; empty without one."""


@torch.no_grad()
def measure(model: nn.Module, targets: Sequence[Target], snapshot: Mapping[str, Tensor] | None = None) -> Norms:
    """Norms of every target.

    Of a sharded model each rank adds up the rows that it holds: a collective, with one sum over ranks for them all.

    Args:
        model: the plain model, or one in FSDP2 that holds its shards (``sharding.reshard``).
        snapshot: what ``take_snapshot`` gave earlier; None: no update norms.
    """
    modules = by_module(targets)
    layers = {path: target_linear(model, slices[0]) for path, slices in modules.items()}
    if any(is_shard(layer.weight) for layer in layers.values()):
        values = sharded_norms(layers, modules, snapshot or {})
    else:
        values = _whole_norms(layers, modules, snapshot or {})
    effective = values["base"] | values["effective"]
    updates = {name: value / effective[name] for name, value in values["update"].items() if effective[name]}
    order = [target.name for target in targets]
    kinds_kept = (effective, values["base"], values["lora"], updates)
    return Norms(*({name: norms[name] for name in order if name in norms} for norms in kinds_kept))


def _whole_norms(
    layers: Mapping[str, nn.Linear], modules: Mapping[str, Sequence[Target]], snapshot: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    names = [("base", target.name) for slices in modules.values() for target in slices]
    weights = [part for path, slices in modules.items() for part in _row_slices(layers[path].weight, slices)]
    parts = [weight_norms(weights, False)]
    adapted = {path: layer for path, layer in layers.items() if isinstance(layer, LoRALinear)}
    if adapted:
        of_all = list(adapted.values())
        names += [("lora", target.name) for path in adapted for target in modules[path]]
        parts.append(torch.cat([layer.delta_norms() for layer in of_all]))
    if unmerged := {path: layer for path, layer in adapted.items() if not layer.merged}:
        of_all = list(unmerged.values())
        names += [("effective", target.name) for path in unmerged for target in modules[path]]
        parts.append(merged_norms([layer.weight for layer in of_all], *lora_arguments(of_all), False))
    for path, before in snapshot.items():
        # The temporaries of one module at a time, not of the whole model.
        update = _effective_weight(layers[path]) - before
        names += [("update", target.name) for target in modules[path]]
        parts.append(weight_norms(_row_slices(update, modules[path]), False))
    values: dict[str, dict[str, float]] = {"base": {}, "lora": {}, "effective": {}, "update": {}}
    for (kind, name), value in zip(names, torch.cat(parts).tolist(), strict=True):
        values[kind][name] = value
    return values


@torch.no_grad()
def take_snapshot(model: nn.Module, targets: Sequence[Target]) -> dict[str, Tensor]:
    """A copy of the effective weight of every target module, by path, on the model's device; sharded where it is."""
    modules = by_module(targets)
    layers = {path: target_linear(model, slices[0]) for path, slices in modules.items()}
    if any(is_shard(layer.weight) for layer in layers.values()):
        return {path: sharded_effective_weight(layer, modules[path]) for path, layer in layers.items()}
    own = {path: layer.weight.detach().clone() for path, layer in layers.items() if not isinstance(layer, LoRALinear)}
    return {path: own[path] if path in own else _effective_weight(layer) for path, layer in layers.items()}


def _effective_weight(layer: nn.Linear) -> Tensor:
    return layer.merged_weight() if isinstance(layer, LoRALinear) else layer.weight.detach()


def _row_slices(tensor: Tensor, slices: Sequence[Target]) -> list[Tensor]:
    return [tensor if target.rows is None else tensor[slice(*target.rows)] for target in slices]


class Monitor:
    """The monitored epochs' norms and losses, as many as the test's windows need."""

    def __init__(self, targets: Sequence[Target], config: PreLoRAConfig) -> None:
        """Args: targets: whose norms are recorded; config: k, m and the thresholds."""
        self.config = config
        self.groups = {group: [t.name for t in members] for group, members in by_group(targets).items()}
        self.epochs = 0
        """Epochs recorded so far."""
        self.losses: list[float] = []
        self.norms: list[dict[str, float]] = []
        self.update_ranks: list[dict[str, float]] = []
        """Stable rank of every target's change over a window, of the last k − 1 windows; empty if not measured."""

    def record(self, loss: float, norms: Mapping[str, float]) -> None:
        """Add one epoch: its mean training loss and every target's norm (a value may be NaN or infinite)."""
        self.epochs += 1
        self.losses.append(float(loss))
        self.norms.append(dict(norms))
        # Windows are counted from the first monitored epoch: whole ones leave, so that they stay aligned.
        while len(self.losses) >= (self.config.k + 1) * self.config.m:
            del self.losses[: self.config.m], self.norms[: self.config.m]

    def record_update(self, ranks: Mapping[str, float]) -> None:
        """Add the stable rank of every target's change over the window that the last recorded epoch completed."""
        self.update_ranks = [*self.update_ranks, dict(ranks)][1 - self.config.k :]

    @property
    def window_complete(self) -> bool:
        """Whether the last recorded epoch completed a window."""
        return self.epochs > 0 and self.epochs % self.config.m == 0

    def test(self, groups: Collection[str] | None = None) -> Verdict:
        """Algorithm 1 on the windows recorded, over ``groups``; None: over all."""
        chosen = self._chosen(groups)
        history = {group: self._epochs(names) for group, names in chosen.items()}
        updates = {group: _by_layer(self.update_ranks, names) for group, names in chosen.items()}
        return partial_convergence_test(history, self.losses, self.config, updates)

    def decide(self, epoch: int, groups: Collection[str] | None = None) -> tuple[Verdict, bool]:
        """Whether to switch ``groups`` (None: all) once ``epoch`` epochs are finished.

        The last of them is recorded already, if it is monitored.
        """
        config = self.config
        if epoch <= config.monitor_from:
            verdict = Verdict(False, f"monitoring starts after epoch {config.monitor_from}", {}, ())
        elif self.window_complete:
            verdict = self.test(groups)
            if verdict.passed and epoch < config.min_epoch:
                reason = f"passed, but epoch {epoch} is before min_epoch = {config.min_epoch}"
                verdict = dataclasses.replace(verdict, passed=False, reason=reason)
        else:
            verdict = Verdict(False, f"window of {config.m} epochs not complete", {}, ())
        if not verdict.passed and config.deadline is not None and epoch >= config.deadline:
            reason = f"forced by deadline = {config.deadline}; {verdict.reason}"
            return dataclasses.replace(verdict, reason=reason), True
        return verdict, verdict.passed

    def changes(self, groups: Collection[str] | None = None) -> dict[str, dict[str, float]]:
        """Algorithm 2's input: each target's norm change between the last two windows, in percent, by group."""
        return {
            group: dict(zip(names, layer_changes(self._epochs(names), self.config), strict=True))
            for group, names in self._chosen(groups).items()
        }

    def _chosen(self, groups: Collection[str] | None) -> dict[str, list[str]]:
        return {group: names for group, names in self.groups.items() if groups is None or group in groups}

    def _epochs(self, names: Sequence[str]) -> list[list[float]]:
        return _by_layer(self.norms, names)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; a NaN is a float NaN."""
        return {
            "epochs": self.epochs,
            "losses": list(self.losses),
            "norms": [dict(epoch) for epoch in self.norms],
            "update_ranks": [dict(window) for window in self.update_ranks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.epochs = state["epochs"]
        self.losses = list(state["losses"])
        self.norms = [dict(epoch) for epoch in state["norms"]]
        self.update_ranks = [dict(window) for window in state.get("update_ranks", ())]


def _by_layer(records: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[list[float]]:
    return [[record.get(name, math.nan) for name in names] for record in records]
