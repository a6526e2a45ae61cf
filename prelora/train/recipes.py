"""Recipes: functions that return a complete config. Add one by adding a function to ``RECIPES``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from prelora.config import PreLoRAConfig
from prelora.train.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig

LR_WARMUP = 32
"""Epochs of 312 steps in which AugReg's 10,000 steps of warm-up are over; the norms move with the rate until then."""


def digits() -> TrainConfig:
    """A small ViT on scikit-learn's digits: all three phases in about two minutes on two cores.

    The thresholds are wider than the paper's: 60 short epochs stand for its 300.
    """
    return TrainConfig(
        recipe="digits",
        output=Path("runs/digits"),
        epochs=60,
        ema_decay=0.99,
        prelora=PreLoRAConfig(k=3, m=2, tau=1.5, zeta=10.0, r_min=2, r_max=16, warmup_epochs=5, monitor_from=4),
        model=ModelConfig(name="vit_tiny_patch16_224", image_size=16, patch_size=4, embed_dim=96, depth=6, num_heads=3),
        data=DataConfig(name="digits", batch_size=32, mixup=0.2, label_smoothing=0.1),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, warmup_epochs=4, clip_grad=1.0),
    )


def vit_large_imagenet() -> TrainConfig:
    """ViT-L/16 on ImageNet-1k from scratch as in the paper: AugReg, 300 epochs, 64 GPUs × 64 images, Exp2, w = 10.

    AugReg's ``medium2``: RandAugment(2, 15) on its own scale and Mixup with one λ ~ Beta(0.5, 0.5) a batch; Adam with
    decoupled weight decay on matrices, 1e-4 free of the learning rate, which is AdamW's 0.1 at 1e-3; 10,000 steps of
    warm-up, then cosine to 0; gradients clipped at 1. PreLoRA as in Table 1: k = m = 3, ranks 8 to 64.
    """
    return TrainConfig(
        recipe="vit_large_imagenet",
        output=Path("runs/vit_large_imagenet"),
        epochs=300,
        precision="bf16",
        deterministic=False,
        compile=True,
        prelora=PreLoRAConfig.paper("exp2", monitor_from=LR_WARMUP),
        model=ModelConfig(name="vit_large_patch16_224", image_size=224),
        data=DataConfig(
            name="images", path=Path("imagenet"), batch_size=64, workers=12, rand_augment=(2, 15), mixup=0.5
        ),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_epochs=LR_WARMUP, clip_grad=1.0),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


def vit_large_imagenet_exp1() -> TrainConfig:
    """The paper's Exp1: τ = 1 %, ζ = 5 %, the earliest switch."""
    return _variant(vit_large_imagenet_exp1, prelora=PreLoRAConfig.paper("exp1", monitor_from=LR_WARMUP))


def vit_large_imagenet_exp2() -> TrainConfig:
    """The paper's Exp2: τ = 0.5 %, ζ = 2.5 %; what vit_large_imagenet is."""
    return _variant(vit_large_imagenet_exp2, prelora=PreLoRAConfig.paper("exp2", monitor_from=LR_WARMUP))


def vit_large_imagenet_exp3() -> TrainConfig:
    """The paper's Exp3: τ = 0.25 %, ζ = 1 %, the latest switch."""
    return _variant(vit_large_imagenet_exp3, prelora=PreLoRAConfig.paper("exp3", monitor_from=LR_WARMUP))


def vit_large_imagenet_w5() -> TrainConfig:
    """The paper's ablation of the joint warm-up: Exp2 with w = 5."""
    return _variant(vit_large_imagenet_w5, prelora=_warmup(5))


def vit_large_imagenet_w10() -> TrainConfig:
    """The paper's ablation of the joint warm-up: Exp2 with w = 10; what vit_large_imagenet is."""
    return _variant(vit_large_imagenet_w10, prelora=_warmup(10))


def vit_large_imagenet_w15() -> TrainConfig:
    """The paper's ablation of the joint warm-up: Exp2 with w = 15."""
    return _variant(vit_large_imagenet_w15, prelora=_warmup(15))


def vit_large_imagenet_full() -> TrainConfig:
    """The paper's baseline: the same training, monitored alike, never switched."""
    return _variant(vit_large_imagenet_full, method="full")


def vit_small_imagenet_90ep() -> TrainConfig:
    """ViT-S/16 on ImageNet-1k from scratch, 90 epochs, 8 GPUs × 128 images, as in "Better plain ViT baselines".

    RandAugment(2, 10), Mixup 0.2, Adam at 1e-3 with decoupled weight decay 1e-4 free of the rate (AdamW's 0.1), 10,000
    steps of warm-up. The model is timm's: a class token and learned positions where that text pools and has fixed ones.

    Scaled by 300 / 90: a window of 3 epochs is as much of this schedule as 10 are of the paper's, so norms and loss
    move as much more in it (τ 0.5 → 1.67 %, ζ 2.5 → 8.33 %), and w 10 → 3. LoRA's rate is the default, not the paper's.
    """
    lr_warmup = 8  # epochs of 1251 steps
    return TrainConfig(
        recipe="vit_small_imagenet_90ep",
        output=Path("runs/vit_small_imagenet_90ep"),
        epochs=90,
        precision="bf16",
        deterministic=False,
        compile=True,
        prelora=PreLoRAConfig(tau=1.67, zeta=8.33, warmup_epochs=3, monitor_from=lr_warmup),
        model=ModelConfig(name="vit_small_patch16_224", image_size=224),
        data=DataConfig(
            name="images", path=Path("imagenet"), batch_size=128, workers=12, rand_augment=(2, 10), mixup=0.2
        ),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_epochs=lr_warmup, clip_grad=1.0),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


def _warmup(epochs: int) -> PreLoRAConfig:
    return dataclasses.replace(vit_large_imagenet().prelora, warmup_epochs=epochs)


def _variant(recipe: Callable[[], TrainConfig], **changes: object) -> TrainConfig:
    """``vit_large_imagenet`` under another recipe's name, in a folder of its own."""
    name = recipe.__name__
    return dataclasses.replace(vit_large_imagenet(), recipe=name, output=Path("runs") / name, **changes)  # type: ignore[arg-type]


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        vit_large_imagenet,
        vit_large_imagenet_exp1,
        vit_large_imagenet_exp2,
        vit_large_imagenet_exp3,
        vit_large_imagenet_w5,
        vit_large_imagenet_w10,
        vit_large_imagenet_w15,
        vit_large_imagenet_full,
        vit_small_imagenet_90ep,
    )
}

PLANNED_GPUS: dict[str, int] = {
    **{name: 64 for name in RECIPES if name.startswith(vit_large_imagenet.__name__)},
    vit_small_imagenet_90ep.__name__: 8,
}
"""GPUs that a recipe's batch is meant for; 1 for those that are not here."""


def planned_gpus(config: TrainConfig, asked: int | None) -> int:
    """As many as asked for; else as torchrun has started, or else as the recipe is meant for.

    Raises:
        ValueError: fewer than one asked for.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"--gpus {asked}: must be at least 1")
    started = os.environ.get("WORLD_SIZE")
    return asked or (int(started) if started is not None else PLANNED_GPUS.get(config.recipe, 1))
