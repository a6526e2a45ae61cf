"""A run's folder: config.yaml, run.json, metrics.jsonl, checkpoints/, tensorboard/; written by rank 0 alone."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from prelora.checkpoint import checkpoints, sweep
from prelora.files import replace_text
from prelora.train.config import TrainConfig

CONFIG, RUN, METRICS, CHECKPOINTS, TENSORBOARD = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "checkpoints",
    "tensorboard",
)
RATES = ("img_per_s", "img_per_s_computing", "flop_per_s", "peak_share")


def claim(config: TrainConfig) -> None:
    """Make the run's folder this run's own.

    Raises:
        ValueError: it holds a run already and ``resume`` is ``"never"``.
        OSError: it cannot be written.
    """
    folder = config.output
    if config.resume == "never" and ((folder / METRICS).exists() or checkpoints(folder / CHECKPOINTS)):
        raise ValueError(f"output = {folder} already holds a run: give another, or --resume auto to go on with it")
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    sweep(folder / CHECKPOINTS)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by complete JSON, or leave it as it was; what is not finite becomes null."""
    replace_text(path, json.dumps(_finite(value), indent=1))


class MetricsLog:
    """``metrics.jsonl``, one line an epoch, and TensorBoard beside it."""

    def __init__(self, folder: Path, epochs: int) -> None:
        """Args: folder: the run's; epochs: lines to keep of what stands there, the rest is of a lost future."""
        self._path = folder / METRICS
        lines = self._path.read_text().splitlines(keepends=True)[:epochs] if self._path.exists() else []
        replace_text(self._path, "".join(lines))
        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=epochs + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append an epoch's record; it is on disk when this returns."""
        with self._path.open("a") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        epoch = record["epoch"]
        scalars = {
            "train/loss": record["loss"],
            "train/lr": record["lr"],
            **{f"train/{name}": record[name] for name in RATES},
            **{f"step/{part}": seconds for part, seconds in record["parts"].items()},
            **{f"communication/{kind}": size for kind, size in record["communication"].items()},
            "train/trainable": record["trainable"],
            "memory/peak_bytes": record["peak_memory_bytes"],
            **{f"memory/{item}": size for item, size in record["memory"].items()},
            **{f"eval/{name}": value for name, value in (record["eval"] or {}).items()},
            **{f"eval_ema/{name}": value for name, value in (record["ema_eval"] or {}).items()},
            **{f"norm/{target}": value for target, value in record["norms"].items()},
            **{f"update/{target}": value for target, value in record["update"].items()},
        }
        for tag, value in scalars.items():
            if value is not None:
                self._board.add_scalar(tag, value, epoch)
        self._board.flush()

    def close(self) -> None:
        """Flush and close TensorBoard's file."""
        self._board.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
