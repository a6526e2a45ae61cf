"""Tiny runs of the trainer in this process, on real digits: all three phases in about a second."""

import dataclasses
import json
import shutil

import torch

from prelora import PreLoRAConfig
from prelora.checkpoint import checkpoints, load_checkpoint
from prelora.train import __main__ as command
from prelora.train.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

torch.set_num_threads(1)

STEPS = 8
"""Optimizer steps an epoch: 1,437 images in batches of 160."""
# Thresholds that always pass: switch after epoch 2, freeze after epoch 4.
TINY = TrainConfig(
    epochs=6,
    prelora=PreLoRAConfig(k=2, m=1, tau=1e4, zeta=1e4, warmup_epochs=2, r_min=1, r_max=4),
    model=ModelConfig(image_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2),
    data=DataConfig(batch_size=160),
    optim=OptimConfig(warmup_epochs=1),
)
PHASES = ["full", "full", "warmup", "warmup", "lora", "lora"]
MEASURED = (
    "seconds", "parts", "img_per_s", "img_per_s_computing", "flop_per_s", "peak_share", "peak_memory_bytes",
)  # fmt: skip
"""Fields of a record that differ between equal runs."""


def tiny(output, **changes):
    """``TINY`` into ``output``; a part's changes as a dict, as in ``optim={"lr": 0.1}``."""
    parts = {
        name: dataclasses.replace(getattr(TINY, name), **change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return dataclasses.replace(TINY, output=output, **parts)


def train(config):
    """The exit code of a run in this process, whose switches are put back for what comes after."""
    try:
        return command.train(config)
    finally:
        torch.use_deterministic_algorithms(False)


def finished(output, **changes):
    """``output``, after a run into it."""
    assert train(tiny(output, **changes)) == 0
    return output


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def outcome(output):
    """The metrics without what differs between equal runs."""
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in metrics(output)]


def names(output):
    """The checkpoints that stand, newest first."""
    return [path.name for path in checkpoints(output / "checkpoints")]


def newest(output):
    """What the newest checkpoint holds."""
    return load_checkpoint(checkpoints(output / "checkpoints")[0])


def damage(checkpoint):
    """Flip the last bit of its weights."""
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def copied(run, output):
    """A copy of a run, to be harmed."""
    shutil.copytree(run, output)
    return output


def drop_newest(run):
    """Take the newest checkpoint away, so that a resumed run has an epoch to do."""
    shutil.rmtree(checkpoints(run / "checkpoints")[0])
