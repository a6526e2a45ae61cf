"""``prelora export``: a run's checkpoint as the stock model's own state dict, checked by loading and comparing it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prelora
from prelora import surgery
from prelora.checkpoint import best, checkpoints, load_checkpoint, newest_valid
from prelora.controller import logits
from prelora.errors import CheckpointError, PreLoRAWarning
from prelora.files import replacing
from prelora.targets import from_dicts
from prelora.train import run_dir
from prelora.train.config import TrainConfig, from_dict
from prelora.train.model import build_model

PROBE_IMAGES = 4
# fp32 W + s·B·A in one matrix against two paths: about 1e-6 of the logits' scale at these depths.
RELATIVE_TOLERANCE = 1e-4


def export_merged(
    run: Path, out: Path | None = None, *, checkpoint: Path | None = None, use_best: bool = False, ema: bool = False
) -> tuple[Path, float]:
    """Write the merged model as safetensors.

    The file is loaded into a stock timm or transformers model with ``strict=True``, and that model's logits are
    held against the run's on random images, before it takes its place.

    Args:
        run: the run's folder.
        out: the file; None: ``<run>/export/merged.safetensors`` (``merged_ema`` for the average).
        checkpoint: which of its checkpoints; None: the newest intact one, or the best by top-1 (``use_best``).
        ema: the average instead of the weights.

    Returns:
        The file, and the largest difference of the logits relative to their largest.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        ValueError: there is no EMA, or the merged model's logits differ.
        OSError: the file cannot be written; there is none then.
    """
    path = checkpoint or _choose(run / run_dir.CHECKPOINTS, use_best)
    tree = load_checkpoint(path)
    if "train" not in tree:
        raise CheckpointError(f"checkpoint {path} was not written by prelora's trainer: it holds no config")
    config = from_dict(tree["train"]["config"])
    state = tree["ema"] if ema else tree["model"]
    if state is None:
        raise ValueError(f"{run} kept no EMA: export without --ema")
    classes, channels = _sizes(state)
    trained = _trained(config, tree, state, classes, channels)
    merged = surgery.merged_state_dict(trained)
    out = out or run / "export" / f"merged{'_ema' if ema else ''}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(out) as part:
            save_file(
                {name: tensor.contiguous() for name, tensor in merged.items()},
                part,
                metadata=_metadata(config, tree, path, ema),
            )
            stock = build_model(config.model, classes=classes, channels=channels)
            stock.load_state_dict(load_file(part), strict=True)
            difference = _difference(trained, stock, config.model.image_size, channels)
            if not difference <= RELATIVE_TOLERANCE:
                raise ValueError(
                    f"merged logits differ by {difference:.3g} of their scale, over {RELATIVE_TOLERANCE:g}: {path}"
                )
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"cannot write {out}: {error}") from error
    return out, difference


def _choose(root: Path, use_best: bool) -> Path:
    path, faults = (best(root), []) if use_best else newest_valid(root)
    if path is None:
        raise CheckpointError(f"no intact checkpoint under {root} ({len(checkpoints(root))} found)")
    for fault in faults:
        warnings.warn(f"passed over a damaged checkpoint for {path.name}: {fault}", PreLoRAWarning, stacklevel=3)
    return path


def _sizes(state: dict[str, Tensor]) -> tuple[int, int]:
    """Classes and channels, which come from the data and so stand in no config: from the head and the embedding."""
    head = next(t for name, t in state.items() if name in ("head.weight", "classifier.weight"))
    embedding = next(t for name, t in state.items() if t.ndim == 4)
    return head.shape[0], embedding.shape[1]


def _trained(
    config: TrainConfig, tree: dict[str, Any], state: dict[str, Tensor], classes: int, channels: int
) -> nn.Module:
    """The run's model as it was trained: base and LoRA apart."""
    model = build_model(config.model, classes=classes, channels=channels)
    if tree["ranks"]:
        targets = [target for target in from_dicts(tree["targets"]) if target.name in tree["ranks"]]
        surgery.inject(model, targets, tree["ranks"], alpha=tree["config"]["alpha"])
    model.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def _difference(first: nn.Module, second: nn.Module, image_size: int, channels: int) -> float:
    images = torch.rand(PROBE_IMAGES, channels, image_size, image_size) * 2 - 1
    ours, theirs = logits(first.eval()(images)), logits(second.eval()(images))
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def _metadata(config: TrainConfig, tree: dict[str, Any], path: Path, ema: bool) -> dict[str, str]:
    facts = {
        "format": "pt",
        "prelora": prelora.__version__,
        "library": config.model.library,
        "model": config.model.name,
        "checkpoint": path.name,
        "phase": tree["phase"],
        "epoch": tree["epoch"],
        "ema": ema,
        "ranks": tree["ranks"],
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
