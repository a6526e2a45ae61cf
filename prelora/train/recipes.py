"""Recipes: functions that return a complete config. Add one by adding a function to ``RECIPES``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prelora.config import PreLoRAConfig
from prelora.train.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig


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
    """ViT-L/16 on ImageNet-1k from scratch as in the paper: AugReg, 300 epochs, 64 GPUs × 64 images, Exp2."""
    return TrainConfig(
        recipe="vit_large_imagenet",
        output=Path("runs/vit_large_imagenet"),
        epochs=300,
        precision="bf16",
        deterministic=False,
        compile=True,
        prelora=PreLoRAConfig.paper("exp2", monitor_from=32),
        model=ModelConfig(name="vit_large_patch16_224", image_size=224),
        data=DataConfig(
            name="images", path=Path("imagenet"), batch_size=64, workers=12, rand_augment=(2, 15), mixup=0.5
        ),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_epochs=32, clip_grad=1.0),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {"digits": digits, "vit_large_imagenet": vit_large_imagenet}
