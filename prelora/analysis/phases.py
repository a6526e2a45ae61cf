"""The model as each phase trains it, made by the surgery itself, without its numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from prelora import surgery
from prelora.analysis.hollow import hollow_copy
from prelora.analysis.plan import planned_execution
from prelora.config import Execution, PreLoRAConfig
from prelora.nn.deferred_grads import defer_lora_grads
from prelora.targets import Target


@dataclass(frozen=True)
class PhaseModel:
    """One phase's model on the meta device, and what of it is not reduced between GPUs."""

    model: nn.Module
    unreduced: frozenset[str]
    """Parameters that train and whose gradients are made from reduced ones: A and B in WARMUP."""

    def reduced(self) -> list[nn.Parameter]:
        """The parameters whose gradients go through an all-reduce, in the model's order."""
        named = self.model.named_parameters()
        return [p for name, p in named if p.requires_grad and name not in self.unreduced]

    def elements(self, *, lora: bool, trainable_only: bool = False) -> int:
        """Parameters of LoRA, or of the base without it."""
        named = self.model.named_parameters()
        chosen = (p for name, p in named if surgery.is_lora(name) == lora and (p.requires_grad or not trainable_only))
        return sum(parameter.numel() for parameter in chosen)

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return self.elements(lora=False, trainable_only=True) + self.elements(lora=True, trainable_only=True)


def phase_models(
    model: nn.Module, targets: Sequence[Target], ranks: Mapping[str, int], config: PreLoRAConfig
) -> dict[str, PhaseModel]:
    """The models of FULL, WARMUP and LORA; ``model`` is not touched.

    Args:
        model: the plain model, without LoRA, on any device.
        ranks: by target name.
        config: its ``freeze``, ``train_lora_a``, ``lora_dropout`` and ``execution`` are read.

    Raises:
        ValueError: the plan and the targets name different layers.
    """
    return in_phases(hollow_copy(model), targets, ranks, config, planned_execution(config))


def in_phases(
    model: nn.Module, targets: Sequence[Target], ranks: Mapping[str, int], config: PreLoRAConfig, execution: Execution
) -> dict[str, PhaseModel]:
    """``model`` itself as it is in FULL, and copies of it as in WARMUP and LORA; otherwise as ``phase_models``."""
    warmup = copy.deepcopy(model)
    surgery.inject(warmup, targets, ranks, dropout=config.lora_dropout, execution=execution)
    deferred = defer_lora_grads(warmup)
    lora = copy.deepcopy(warmup)
    plain = {name for name, rank in ranks.items() if rank == 0}
    surgery.freeze(lora, targets, config.freeze, train_lora_a=config.train_lora_a, without_lora=plain)
    defer_lora_grads(lora, False)
    return {
        "full": PhaseModel(model, frozenset()),
        "warmup": PhaseModel(warmup, frozenset(deferred)),
        "lora": PhaseModel(lora, frozenset()),
    }
