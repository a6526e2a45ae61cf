"""``--dry-run``: what a config would do, computed on the meta device without data, weights or training."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from prelora import surgery
from prelora.analysis.hardware import GPUS, PAPERS_GPU, PAPERS_INTER, PAPERS_PER_NODE, Cluster
from prelora.analysis.plan import ModelFlops, planned_execution
from prelora.analysis.plan_table import describe_phases
from prelora.analysis.planner import Setup, make_plan
from prelora.controller import parameter_counts
from prelora.data import imagenet
from prelora.targets import Target, by_group
from prelora.train.build import batch_of, build_config_source, config_flops, config_targets, epoch_images
from prelora.train.config import TrainConfig
from prelora.train.model import build_model


def describe(config: TrainConfig, gpus: int) -> str:
    """The plan as text: model, targets, phases, steps, what trains by rank, memory and communication of a GPU.

    Args:
        gpus: ranks that are to train together.

    Raises:
        ValueError, TargetError: the config's parts do not fit each other.
    """
    samples, classes, channels, where = _data_facts(config)
    with torch.device("meta"):
        model = build_model(config.model, classes=classes, channels=channels)
    targets = config_targets(config, model)
    counted = config_flops(config, model, targets, channels)
    batch = batch_of(config, gpus)
    groups = ", ".join(f"{group} × {len(members)}" for group, members in by_group(targets).items())
    lines = [
        f"recipe        {config.recipe}",
        f"model         {config.model.name}, {parameter_counts(model)[1] / 1e6:.2f} M parameters",
        f"targets       {groups}",
        f"data          {where}: {samples:,} training images, {classes} classes",
        f"batch         {batch} = {config.data.batch_size} images × {config.optim.accumulate} accumulated "
        f"× {gpus} rank(s)",
        f"steps         {epoch_images(config, samples) // batch:,} an epoch × {config.epochs} epochs, "
        f"LR warm-up {config.optim.warmup_epochs} epochs, cosine to {config.optim.min_lr:g}",
        f"precision     {config.precision}",
        *_phases(config),
        "",
        *_by_rank(config, model, targets, counted),
        "",
        *_of_one_gpu(config, model, targets, counted, channels, gpus),
    ]
    return "\n".join(lines)


def _by_rank(config: TrainConfig, model: nn.Module, targets: Sequence[Target], counted: ModelFlops) -> list[str]:
    """What trains and what is computed in LORA, at the smallest rank, a middle one and the largest."""
    pre = config.prelora
    lines = [
        "uniform   trains in LORA       gradients     GFLOP an image,           the most that",
        "rank      M (of the base)      MB a step     FULL → LORA               LORA can gain",
    ]
    execution = planned_execution(pre)
    total = parameter_counts(model)[1]
    for rank in sorted({pre.r_min, min(pre.r_max, 4 * pre.r_min), pre.r_max}):
        adapted, ranks = copy.deepcopy(model), {target.name: rank for target in targets}
        surgery.inject(adapted, targets, ranks)
        surgery.freeze(adapted, targets, pre.freeze, train_lora_a=pre.train_lora_a)
        trainable = parameter_counts(adapted)[0]
        phases = counted.phases(ranks, execution, pre.train_lora_a)
        lines.append(
            f"{rank:<9} {trainable / 1e6:6.2f} ({100 * trainable / total:5.2f} %)     {4 * trainable / 1e6:9.2f}     "
            f"{phases.full / 1e9:7.2f} → {phases.lora / 1e9:6.2f}          {phases.ceiling:.2f}×"
        )
    return lines


def _of_one_gpu(
    config: TrainConfig, model: nn.Module, targets: Sequence[Target], counted: ModelFlops, channels: int, gpus: int
) -> list[str]:
    """Memory and communication, at the largest rank everywhere, which no plan of Algorithm 2 goes beyond."""
    setup = Setup(
        batch=config.data.batch_size,
        accumulate=config.optim.accumulate,
        precision=config.precision,
        optimizer=config.optim.name,
        ema=config.ema_decay is not None,
        strategy=config.distributed.strategy,
        compressed=config.distributed.compress == "bf16",
        gpu=PAPERS_GPU,
        cluster=Cluster(gpus=gpus, per_node=PAPERS_PER_NODE, intra=GPUS[PAPERS_GPU].link, inter=PAPERS_INTER),
    )
    ranks = {target.name: config.prelora.r_max for target in targets}
    image = (channels, config.model.image_size, config.model.image_size)
    plan = make_plan(model, targets, ranks, config.prelora, counted, setup, image=image, timed=False)
    return [
        f"one of {gpus} GPUs, held against {PAPERS_GPU}, at rank {config.prelora.r_max} everywhere:",
        *describe_phases(plan),
        "prelora plan predicts times too, for other GPUs and networks",
    ]


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
        assumed = imagenet.TRAIN_IMAGES, imagenet.CLASSES, imagenet.CHANNELS
        return *assumed, f"{config.data.path} is not here, ImageNet-1k assumed"
    source = build_config_source(config, torch.device("cpu"))
    return source.train_samples, source.classes, source.channels, config.data.name
