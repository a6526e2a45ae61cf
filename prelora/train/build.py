"""Everything that a run is made of, built from its config."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import prelora
from prelora import distributed, sharding
from prelora.analysis.plan import ModelFlops, count_model
from prelora.config import PreLoRAConfig
from prelora.controller import PreLoRA, parameter_counts
from prelora.data import Source, build_source
from prelora.data.mixing import batch_rng, mix
from prelora.targets import Target, find_targets, target_shape
from prelora.train.config import TrainConfig
from prelora.train.model import build_model
from prelora.train.rng import seed_all
from prelora.train.schedule import build_scheduler


@dataclass(frozen=True)
class Parts:
    """The live objects of a run."""

    pre: PreLoRA
    source: Source
    criterion: Callable[[Tensor, Tensor], Tensor]
    mix: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None
    """(Images, labels, optimizer step) → mixed images and soft targets."""
    device: torch.device
    steps_per_epoch: int
    global_batch: int


def build_parts(config: TrainConfig, device: torch.device) -> tuple[Parts, ModelFlops]:
    """Data, model, optimizer, schedule, EMA and PreLoRA; the same initial weights on every rank.

    Raises:
        ValueError: the config's parts do not fit each other or the data.
    """
    from timm.optim import create_optimizer_v2
    from timm.utils.model_ema import ModelEmaV3

    source = build_config_source(config, device)
    images, global_batch = epoch_images(config, source.train_samples), batch_of(config, distributed.world_size())
    steps = images // global_batch
    if steps == 0:
        raise ValueError(f"the global batch of {global_batch} is larger than the {images} images of an epoch")
    seed_all(config.seed)
    model = build_model(config.model, classes=source.classes, channels=source.channels).to(device)
    targets = config_targets(config, model)
    flops = config_flops(config, model, targets, source.channels)
    ema = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay is not None else None
    if config.distributed.strategy == "fsdp" and distributed.world_size() > 1:
        for block in sharding.blocks(model) if config.compile else ():
            block.compile()
        for whole in filter(None, (model, ema.module if ema is not None else None)):
            sharding.shard(whole, device)
    optimizer = create_optimizer_v2(
        model, opt=config.optim.name, lr=config.optim.lr, weight_decay=config.optim.weight_decay
    )
    pre = PreLoRA(
        _wrap(model, config, device),
        optimizer,
        algorithm(config),
        targets=targets,
        scheduler=build_scheduler(optimizer, config, steps),
        ema=ema,
        total_steps=config.epochs * steps,
        seed=config.seed,
        defer_lora_grads=True,
    )
    mixing, criterion = _mix_and_criterion(config, source.classes)
    return Parts(pre, source, criterion, mixing, device, steps, global_batch), flops


def batch_of(config: TrainConfig, world_size: int) -> int:
    """Images of an optimizer step over all ranks."""
    return config.data.batch_size * config.optim.accumulate * world_size


def epoch_images(config: TrainConfig, train_samples: int) -> int:
    """Images of an epoch, before they are cut down to whole steps."""
    return train_samples // config.data.epochs_per_pass


def build_config_source(config: TrainConfig, device: torch.device) -> Source:
    """The configured images, their batches on ``device`` where the source puts them on any."""
    data = config.data
    return build_source(
        data.name,
        path=data.path,
        image_size=config.model.image_size,
        seed=config.seed,
        workers=data.workers,
        rand_augment=data.rand_augment,
        loader=data.loader,
        max_quarantined=data.max_quarantined,
        classes=data.classes,
        train_samples=data.train_samples,
        eval_samples=data.eval_samples,
        device=device,
    )


def algorithm(config: TrainConfig) -> PreLoRAConfig:
    """PreLoRA's part of the config; the full-rank baseline is one that may only switch after its last epoch."""
    if config.method == "prelora":
        return config.prelora
    return dataclasses.replace(config.prelora, min_epoch=config.epochs + 1, deadline=None)


def config_targets(config: TrainConfig, model: nn.Module) -> tuple[Target, ...]:
    """The model's targets, in the configured groups."""
    return find_targets(model, None if config.targets == "family" else config.targets)


def config_flops(config: TrainConfig, model: nn.Module, targets: Sequence[Target], channels: int) -> ModelFlops:
    """FLOPs per image, counted on the meta device."""
    image = torch.empty(1, channels, config.model.image_size, config.model.image_size, device="meta")
    return count_model(model, targets, image, freeze=config.prelora.freeze)


def run_facts(config: TrainConfig, parts: Parts, flops: ModelFlops, peak: float) -> dict[str, Any]:
    """What ``run.json`` says of a run: nothing that changes while it goes on.

    Args:
        peak: FLOP/s of one large matrix product, over all ranks.
    """
    model = parts.pre.base_model
    targets = []
    for target in parts.pre.targets:
        shape = target_shape(model, target)
        targets.append({"name": target.name, **dataclasses.asdict(target), **dataclasses.asdict(shape)})
    gpu = torch.cuda.get_device_name() if parts.device.type == "cuda" else None
    return {
        "prelora": prelora.__version__,
        "torch": str(torch.__version__),
        "recipe": config.recipe,
        "model": config.model.name if config.model.library == "timm" else "transformers ViT",
        "device": str(parts.device),
        "world_size": distributed.world_size(),
        "parameters": parameter_counts(model)[1],
        "classes": parts.source.classes,
        "channels": parts.source.channels,
        "targets": targets,
        "epochs": config.epochs,
        "global_batch": parts.global_batch,
        "loader": parts.source.loader,
        "config": dataclasses.asdict(parts.pre.config),
        "flops": {"full": flops.full},
        "peak_flop_per_s": peak,
        "environment": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "gpu": gpu,
            "precision": config.precision,
        },
    }


def _wrap(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    if sharding.is_sharded(model):
        return model
    wrapped: Any = torch.compile(model) if config.compile else model
    if distributed.world_size() == 1:
        return wrapped
    ids = [device.index] if device.type == "cuda" else None
    # Gloo sums three and more ranks in an order that depends on the place in the bucket, and DDP sorts its buckets anew
    # after the first step, also the first one after a resume. Where it looks for unused parameters, it never does.
    fixed_buckets = config.deterministic and device.type == "cpu" and distributed.world_size() > 2
    replicated = DistributedDataParallel(
        wrapped, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=fixed_buckets
    )
    if config.distributed.compress == "bf16":
        distributed.compress_gradients(replicated)
    return replicated


def _mix_and_criterion(config: TrainConfig, classes: int) -> tuple[Any, nn.Module]:
    from timm.loss import SoftTargetCrossEntropy

    data = config.data
    if not (data.mixup or data.cutmix):
        return None, nn.CrossEntropyLoss(label_smoothing=data.label_smoothing)

    def mixing(images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return mix(
            images,
            labels,
            classes=classes,
            mixup=data.mixup,
            cutmix=data.cutmix,
            label_smoothing=data.label_smoothing,
            rng=batch_rng(config.seed, step),
        )

    return mixing, SoftTargetCrossEntropy()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except FileNotFoundError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
