"""Build the configured model, plain and untrained."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

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
        near = ", ".join(difflib.get_close_matches(config.name, timm.list_models(), n=4)) or "see timm.list_models()"
        raise ValueError(f"model.name = {config.name!r}: timm knows no such model; like it: {near}")
    try:
        model = timm.create_model(
            config.name,
            img_size=config.image_size,
            in_chans=channels,
            num_classes=classes,
            drop_rate=config.drop_rate,
            drop_path_rate=config.drop_path_rate,
            **given,
        )
    except (TypeError, AssertionError) as error:  # sizes that the model does not take, or that do not fit
        asked = ", ".join(f"{name} = {size}" for name, size in {"image_size": config.image_size, **given}.items())
        raise ValueError(f"model.name = {config.name!r}: timm cannot build it with {asked}: {error}") from error
    _check_patches(config.image_size, getattr(getattr(model, "patch_embed", None), "patch_size", None))
    return model


def _build_transformers(config: ModelConfig, given: dict[str, Any], classes: int, channels: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    if config.drop_path_rate:
        raise ValueError(f"model.drop_path_rate = {config.drop_path_rate}: transformers' ViT has none, must be 0")
    hidden, patch = given.get("embed_dim", 192), given.get("patch_size", 16)
    heads = given.get("num_heads", 3)
    _check_patches(config.image_size, (patch, patch))
    if hidden % heads:  # transformers takes it, and leaves features out
        raise ValueError(f"model.embed_dim = {hidden}: must be a multiple of model.num_heads = {heads}")
    return ViTForImageClassification(
        ViTConfig(
            image_size=config.image_size,
            patch_size=patch,
            num_channels=channels,
            num_labels=classes,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=given.get("depth", 12),
            num_attention_heads=heads,
            hidden_dropout_prob=config.drop_rate,
        )
    )


def _check_patches(image_size: int, patches: tuple[int, int] | None) -> None:
    """Patches that do not cover the image would leave out its edge without a word."""
    if patches is not None and any(image_size % side for side in patches):
        raise ValueError(f"model.image_size = {image_size}: must be a multiple of the patch size {patches[0]}")
