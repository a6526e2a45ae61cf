"""What a replayed switch would cost and save: trainable share, FLOPs, time and memory, from the run's own figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch

from prelora.analysis.plan import Execution, ModelFlops, PhaseFlops, planned_execution
from prelora.analysis.records import Run
from prelora.analysis.replay import ranks_without_shapes
from prelora.analysis.replay_log import NormLog
from prelora.analysis.run_time import Schedule
from prelora.config import PreLoRAConfig
from prelora.controller import parameter_counts
from prelora.ranks import LayerShape, assign_ranks
from prelora.targets import base_parameters
from prelora.train.build import config_flops, config_targets
from prelora.train.config import load_yaml
from prelora.train.model import build_model


@dataclass(frozen=True)
class Sizes:
    """The run's model, built again on the meta device from its ``config.yaml``."""

    parameters: int
    """Of the model without LoRA."""
    replaced: int
    """Of them, the targets' weights and biases, which LoRA stands in for."""
    flops: ModelFlops
    execution: Execution


@dataclass(frozen=True)
class Costs:
    """Of a whole run that switches where the replay does."""

    epochs: dict[str, int]
    """By phase."""
    flops: PhaseFlops
    trainable: int
    """Parameters that train in LORA."""
    share: float
    """The same over the parameters of the model without LoRA."""
    seconds: dict[str, float]
    """By phase: FULL as the run measured it, the others by their FLOPs, the least that they can take."""
    freed: int
    """Bytes of gradients and optimizer state of what is frozen, as a rank held them in FULL."""

    @property
    def flops_saved(self) -> float:
        """Share of the FLOPs of as many epochs in FULL."""
        spent = sum(getattr(self.flops, phase) * epochs for phase, epochs in self.epochs.items())
        return 1 - spent / (self.flops.full * sum(self.epochs.values()))

    @property
    def baseline(self) -> float:
        """Seconds of as many epochs in FULL."""
        return self.seconds["full"] / self.epochs["full"] * sum(self.epochs.values())


def count_sizes(log: NormLog, config: PreLoRAConfig) -> Sizes | None:
    """Parameters and FLOPs of the log's model; None for a CSV, and for a run without ``config.yaml``.

    Raises:
        ValueError: the model that ``config.yaml`` builds is not the one that ``run.json`` counted.
    """
    if log.run is None or log.folder is None or not (log.folder / "config.yaml").exists():
        return None
    asked = dataclasses.replace(load_yaml(log.folder / "config.yaml"), prelora=config)
    channels = log.run.info.channels
    with torch.device("meta"):
        model = build_model(asked.model, classes=log.run.info.classes, channels=channels)
    parameters = parameter_counts(model)[1]
    if parameters != log.run.info.parameters:
        raise ValueError(
            f"{log.folder}: config.yaml builds a model of {parameters} parameters, "
            f"and run.json has {log.run.info.parameters}"
        )
    targets = config_targets(asked, model)
    base = base_parameters(targets)
    replaced = sum(parameter.numel() for name, parameter in model.named_parameters() if name in base)
    return Sizes(parameters, replaced, config_flops(asked, model, targets, channels), planned_execution(config))


def replayed_ranks(
    log: NormLog, config: PreLoRAConfig, changes: Mapping[str, Mapping[str, float]], sizes: Sizes | None
) -> dict[str, int]:
    """Algorithm 2 on ``changes``, with the shapes and counts that a live run has.

    Raises:
        ValueError: a budget that cannot be kept, or one of a model whose parameters nobody counted.
    """
    if log.run is None:
        return ranks_without_shapes(changes, config)
    shapes = {target.name: LayerShape(target.in_features, target.out_features) for target in log.run.info.targets}
    if sizes is None:
        return assign_ranks(changes, shapes, config)
    return assign_ranks(
        changes,
        shapes,
        config,
        total_parameters=sizes.parameters,
        other_trainable=sizes.parameters - sizes.replaced if config.freeze == "targets" else 0,
    )


def predict(run: Run, config: PreLoRAConfig, sizes: Sizes, switch_epoch: int, ranks: Mapping[str, int]) -> Costs:
    """Costs of the run's planned epochs with a switch after ``switch_epoch`` to ``ranks``."""
    flops = sizes.flops.phases(ranks, sizes.execution, config.train_lora_a)
    planned = max(run.info.epochs, switch_epoch)
    epochs = Schedule(epochs=planned, switch=switch_epoch, warmup=config.warmup_epochs).in_phase
    full = run.in_phase("full")
    second = median(epoch.images / epoch.img_per_s for epoch in full)
    lora = sum(
        ranks[target.name] * (target.out_features + target.in_features * config.train_lora_a)
        for target in run.info.targets
    )
    frozen = sizes.replaced if config.freeze == "targets" else sizes.parameters
    trainable = sizes.parameters - frozen + lora
    held = full[-1].memory.get("gradients", 0) + full[-1].memory.get("optimizer", 0)
    return Costs(
        epochs=epochs,
        flops=flops,
        trainable=trainable,
        share=trainable / sizes.parameters,
        seconds={phase: count * second * getattr(flops, phase) / flops.full for phase, count in epochs.items()},
        freed=round(held * frozen / sizes.parameters),
    )
