"""Build the configured model, plain and untrained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prelora.train.config import ModelConfig


def build_model(config: ModelConfig, *, classes: int, channels: int) -> nn.Module:
    """The model with fresh weights, on the current default device.

    Raises:
        ValueError: timm knows no such model, or the sizes do not fit each other.
    """
    sizes = {
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
    }
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if config.library == "transformers":
        return _build_transformers(config, given, classes, channels)
    import timm

    if not timm.is_model(config.name):
        near = ", ".join(timm.list_models(f"*{config.name.split('_')[0]}*")[:4]) or "see timm.list_models()"
        raise ValueError(f"model.name = {config.name!r}: timm knows no such model; like it: {near}")
    return timm.create_model(
        config.name,
        img_size=config.image_size,
        in_chans=channels,
        num_classes=classes,
        drop_rate=config.drop_rate,
        drop_path_rate=config.drop_path_rate,
        **given,
    )


def _build_transformers(config: ModelConfig, given: dict[str, Any], classes: int, channels: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    hidden = given.get("embed_dim", 192)
    return ViTForImageClassification(
        ViTConfig(
            image_size=config.image_size,
            patch_size=given.get("patch_size", 16),
            num_channels=channels,
            num_labels=classes,  # type: ignore[call-arg]
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=given.get("depth", 12),
            num_attention_heads=given.get("num_heads", 3),
            hidden_dropout_prob=config.drop_rate,
        )
    )


def logits(output: Any) -> Tensor:
    """The logits in what a timm or transformers model returned."""
    return output if isinstance(output, torch.Tensor) else output.logits
