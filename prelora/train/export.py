"""A run's checkpoint to be exported: which one, the model as it was trained, and the stock model beside it."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import prelora
from prelora import surgery
from prelora.checkpoint import best, checkpoints, load_checkpoint, newest_valid
from prelora.controller import logits
from prelora.errors import CheckpointError, PreLoRAWarning
from prelora.targets import from_dicts
from prelora.train import run_dir
from prelora.train.config import TrainConfig, from_dict
from prelora.train.model import build_model

PROBE_IMAGES = 4
# fp32 W + s·B·A in one matrix against two paths: about 1e-6 of the logits' scale at these depths.
RELATIVE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Trained:
    """What a run trained, out of one of its checkpoints."""

    checkpoint: Path
    config: TrainConfig
    tree: dict[str, Any]
    """All that the checkpoint holds."""
    ema: bool
    """Whether ``model`` has the average instead of the weights."""
    model: nn.Module
    """As it was trained: base and LoRA apart."""
    classes: int
    channels: int

    def stock(self) -> nn.Module:
        """The library's own model of the same sizes, with fresh weights."""
        return build_model(self.config.model, classes=self.classes, channels=self.channels)

    def check(self, exported: nn.Module, kind: str) -> float:
        """Hold the logits of what was exported against the run's, on random images.

        Returns:
            The largest difference of the logits relative to their largest.

        Raises:
            ValueError: it is over the tolerance.
        """
        difference = logit_difference(self.model, exported, self.config.model.image_size, self.channels)
        if not difference <= RELATIVE_TOLERANCE:
            raise ValueError(
                f"{kind} logits differ by {difference:.3g} of their scale, over {RELATIVE_TOLERANCE:g}: "
                f"{self.checkpoint}"
            )
        return difference

    def about(self) -> dict[str, str]:
        """What a file's header says of where it came from."""
        facts = {
            "format": "pt",
            "prelora": prelora.__version__,
            "library": self.config.model.library,
            "model": self.config.model.name,
            "checkpoint": self.checkpoint.name,
            "phase": self.tree["phase"],
            "epoch": self.tree["epoch"],
            "ema": self.ema,
            "ranks": self.tree["ranks"],
        }
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def load_trained(run: Path, *, checkpoint: Path | None, use_best: bool, ema: bool) -> Trained:
    """The model of one of a run's checkpoints.

    Args:
        run: the run's folder.
        checkpoint: which of its checkpoints; None: the newest intact one, or the best by top-1 (``use_best``).
        ema: the average instead of the weights.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        ValueError: there is no EMA.
    """
    path = checkpoint or _choose(run / run_dir.CHECKPOINTS, use_best)
    tree = load_checkpoint(path)
    if "train" not in tree:
        raise CheckpointError(f"checkpoint {path} was not written by prelora's trainer: it holds no config")
    state = tree["ema"] if ema else tree["model"]
    if state is None:
        raise ValueError(f"{run} kept no EMA: export without --ema")
    config = from_dict(tree["train"]["config"])
    classes, channels = _sizes(state)
    model = build_model(config.model, classes=classes, channels=channels)
    if tree["ranks"]:
        targets = [target for target in from_dicts(tree["targets"]) if target.name in tree["ranks"]]
        alpha, dropout = (tree["config"][name] for name in ("alpha", "lora_dropout"))
        surgery.inject(model, targets, tree["ranks"], alpha=alpha, dropout=dropout)
    model.load_state_dict(state, strict=True)
    return Trained(path, config, tree, ema, model, classes, channels)


def _choose(root: Path, use_best: bool) -> Path:
    path, faults = (best(root), []) if use_best else newest_valid(root)
    if path is None:
        raise CheckpointError(f"no intact checkpoint under {root} ({len(checkpoints(root))} found)")
    for fault in faults:
        warnings.warn(f"passed over a damaged checkpoint for {path.name}: {fault}", PreLoRAWarning, stacklevel=4)
    return path


def _sizes(state: dict[str, Tensor]) -> tuple[int, int]:
    """Classes and channels, which come from the data and so stand in no config: from the head and the embedding."""
    head = next(t for name, t in state.items() if name in ("head.weight", "classifier.weight"))
    embedding = next(t for name, t in state.items() if t.ndim == 4)
    return head.shape[0], embedding.shape[1]


@torch.no_grad()
def logit_difference(first: nn.Module, second: nn.Module, image_size: int, channels: int) -> float:
    """The largest difference of two models' logits on random images, relative to the first's largest."""
    images = torch.rand(PROBE_IMAGES, channels, image_size, image_size) * 2 - 1
    ours, theirs = logits(first.eval()(images)), logits(second.eval()(images))
    return ((ours - theirs).abs().max() / ours.abs().max()).item()
