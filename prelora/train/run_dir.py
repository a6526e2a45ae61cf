"""A run's folder: config.yaml, run.json, metrics.jsonl, checkpoints/, what loggers write; by rank 0 alone."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from prelora.checkpoint import checkpoints, sweep
from prelora.files import replace_text
from prelora.train.config import TrainConfig
from prelora.train.loggers import Mirrors, check_installed

CONFIG, RUN, METRICS, CHECKPOINTS = "config.yaml", "run.json", "metrics.jsonl", "checkpoints"


def claim(config: TrainConfig) -> None:
    """Make the run's folder this run's own.

    Raises:
        ValueError: it holds a run already and ``resume`` is ``"never"``, or a logger's library is not installed.
        OSError: it cannot be written.
    """
    check_installed(config.loggers)
    folder = config.output
    if config.resume == "never" and ((folder / METRICS).exists() or checkpoints(folder / CHECKPOINTS)):
        raise ValueError(f"output = {folder} already holds a run: give another, or --resume auto to go on with it")
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    sweep(folder / CHECKPOINTS)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by complete JSON, or leave it as it was; what is not finite becomes null."""
    replace_text(path, json.dumps(_finite(value), indent=1))


class MetricsLog:
    """``metrics.jsonl``, one line an epoch, and the loggers that mirror it."""

    def __init__(self, config: TrainConfig, facts: dict[str, Any], epochs: int) -> None:
        """Open it.

        Args:
            config: the run's.
            facts: ``run.json``'s.
            epochs: lines to keep of what stands there, the rest is of a lost future.
        """
        self._path = config.output / METRICS
        lines = self._path.read_text().splitlines(keepends=True)[:epochs] if self._path.exists() else []
        replace_text(self._path, "".join(lines))
        self._mirrors = Mirrors(config, facts, [json.loads(line) for line in lines])

    def write(self, record: dict[str, Any]) -> None:
        """Append an epoch's record; it is on disk when this returns."""
        record = _finite(record)
        with self._path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._mirrors.write(record)

    def close(self, done: bool) -> None:
        """Close the loggers; done: the run trained to its last epoch."""
        self._mirrors.close(done)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
