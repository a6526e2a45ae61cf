"""``--dry-run``: what a config would do, computed on the meta device without data, weights or training."""

from __future__ import annotations

import copy
import os

import torch

from prelora import surgery
from prelora.controller import parameter_counts
from prelora.targets import by_group, by_module, target_linear
from prelora.train.build import build_config_source, config_execution, config_flops, config_targets
from prelora.train.config import TrainConfig
from prelora.train.model import build_model

IMAGENET_1K = (1_281_167, 1000, 3)  # training images, classes, channels


def describe(config: TrainConfig) -> str:
    """The plan as text: model, targets, phases, steps, and per uniform rank what trains, weighs and costs.

    Raises:
        ValueError, TargetError: the config's parts do not fit each other.
    """
    samples, classes, channels, where = _data_facts(config)
    with torch.device("meta"):
        model = build_model(config.model, classes=classes, channels=channels)
    targets = config_targets(config, model)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    batch = config.data.batch_size * config.optim.accumulate * world_size
    pre = config.prelora
    groups = ", ".join(f"{group} × {len(members)}" for group, members in by_group(targets).items())
    lines = [
        f"recipe        {config.recipe}",
        f"model         {config.model.name}, {parameter_counts(model)[1] / 1e6:.2f} M parameters",
        f"targets       {groups}",
        f"data          {where}: {samples:,} training images, {classes} classes",
        f"batch         {batch} = {config.data.batch_size} images × {config.optim.accumulate} accumulated "
        f"× {world_size} rank(s)",
        f"steps         {samples // batch:,} an epoch × {config.epochs} epochs, "
        f"LR warm-up {config.optim.warmup_epochs} epochs, cosine to {config.optim.min_lr:g}",
        f"precision     {config.precision}",
        *_phases(config),
        "",
        "uniform   trainable            weights, W_eff, gradients, Adam moments    GFLOP an image, and the most",
        "rank      M (of the base)      GiB in FULL → LORA                         that LORA can gain on FULL",
    ]
    flops = config_flops(config, model, targets, channels)
    total = parameter_counts(model)[1]
    execution = config_execution(config)
    first_of_each = [slices[0] for slices in by_module(targets).values()]
    element = 4 if config.precision == "fp32" else 2
    w_eff = (
        element * sum(target_linear(model, target).weight.numel() for target in first_of_each)
        if execution == "merged"
        else 0
    )
    ranks = sorted({pre.r_min, min(pre.r_max, 4 * pre.r_min), pre.r_max})
    for rank in ranks:
        adapted = copy.deepcopy(model)
        surgery.inject(adapted, targets, {target.name: rank for target in targets})
        surgery.freeze(adapted, targets, pre.freeze, train_lora_a=pre.train_lora_a)
        trainable = parameter_counts(adapted)[0]
        held = sum(parameter.numel() for parameter in adapted.parameters())
        phases = flops.phases({target.name: rank for target in targets}, execution, pre.train_lora_a)
        lines.append(
            f"{rank:<9} {trainable / 1e6:6.2f} ({100 * trainable / total:5.2f} %)     "
            f"{_gib(4 * total * 4):6.2f} → {_gib(4 * (held + 3 * trainable) + w_eff):5.2f}"
            f"{'':<27}{phases.full / 1e9:7.2f} → {phases.lora / 1e9:6.2f}   {phases.ceiling:.2f}×"
        )
    lines += ["", "FLOPs and memory are counted, not measured; activations are not in them (LoRA does not free them)."]
    return "\n".join(lines)


def _phases(config: TrainConfig) -> list[str]:
    pre = config.prelora
    if config.method == "full":
        return ["FULL          to the end: the baseline never switches"]
    earliest = pre.monitor_from + pre.k * pre.m
    while earliest < pre.min_epoch:
        earliest += pre.m
    forced = f", epoch {pre.deadline} at the latest" if pre.deadline is not None else ""
    beyond = (
        f" (the run ends after epoch {config.epochs})"
        if min(earliest, pre.deadline or earliest) > config.epochs
        else ""
    )
    return [
        f"FULL          until every group's norm changes by ≤ {pre.tau} % and the loss by ≤ {pre.zeta} % over "
        f"{pre.k} windows of {pre.m} epochs: epoch {earliest} at the earliest{forced}{beyond}",
        f"WARMUP        {pre.warmup_epochs} epochs of base and LoRA together, ranks {pre.r_min} to {pre.r_max}",
        f"LORA          the rest, frozen: {pre.freeze}",
    ]


def _data_facts(config: TrainConfig) -> tuple[int, int, int, str]:
    if config.data.name == "images" and not (config.data.path and config.data.path.is_dir()):
        return *IMAGENET_1K, f"{config.data.path} is not here, ImageNet-1k assumed"
    source = build_config_source(config, torch.device("cpu"))
    return source.train_samples, source.classes, source.channels, config.data.name


def _gib(size: int) -> float:
    return size / 2**30
