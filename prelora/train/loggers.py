"""Where a run's metrics go beside ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow, as ``TrainConfig.loggers``.

Each mirrors that file: what one lacks of it is filled in when it is opened, and an epoch that it holds is not written
again. A library is imported only if it is chosen.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import yaml

from prelora.files import replace_text
from prelora.train.config import LoggerName, TrainConfig, to_dict
from prelora.train.resume import flat

STATE = "loggers.json"
"""In a run's folder: by logger, its id of the run and how many epochs it holds."""
TENSORBOARD = "tensorboard"
RATES = ("img_per_s", "img_per_s_computing", "flop_per_s", "peak_share")
NEEDED: dict[LoggerName, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}
"""Modules without which a logger cannot be opened; MLflow's local database is read by the last two."""
EXTRAS: dict[LoggerName, str] = {"tensorboard": "train", "wandb": "wandb", "mlflow": "mlflow"}


class Logger(Protocol):
    """One open run of one library; only rank 0 has any."""

    id: str
    """What finds this run again after a resume."""

    def log(self, epoch: int, scalars: Mapping[str, float], event: str | None) -> None:
        """Write an epoch, 1-based, which is the step; event: what PreLoRA did at its end and why, None: nothing."""

    def close(self, done: bool) -> None:
        """Flush and close; done: the run trained to its last epoch."""


def check_installed(names: Sequence[LoggerName]) -> None:
    """Refuse what cannot be opened, before anything is trained.

    Raises:
        ValueError: a chosen logger's library is not installed; the message says how to.
    """
    for name in names:
        missing = [module for module in NEEDED[name] if importlib.util.find_spec(module) is None]
        if missing:
            raise ValueError(
                f"loggers = {name}: {', '.join(missing)} not installed; pip install 'prelora[{EXTRAS[name]}]' "
                f"brings it, or leave {name} out of --loggers"
            )


class Mirrors:
    """All chosen loggers of a run."""

    def __init__(self, config: TrainConfig, facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        """Open them and fill in what they lack.

        Args:
            config: the run's.
            facts: ``run.json``'s.
            records: what ``metrics.jsonl`` holds; none: nothing to go on from, so each starts a run of its own.
        """
        self._facts = facts
        self._path = config.output / STATE
        self._held: dict[str, dict[str, Any]] = {}
        if records and self._path.exists():
            self._held = json.loads(self._path.read_text())
        self._loggers: dict[str, Logger] = {}
        for name in config.loggers:
            held = self._held.setdefault(name, {"id": None, "epochs": 0})
            if name == "tensorboard":  # which takes back what it holds of a lost future; the others cannot
                held["epochs"] = min(held["epochs"], len(records))
            logger = LOGGERS[name](config, held["id"], held["epochs"])
            self._loggers[name] = logger
            held["id"] = logger.id
        self._save()
        for record in records:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Give an epoch's record to every logger that does not hold it yet."""
        epoch = record["epoch"]
        behind = [name for name in self._loggers if self._held[name]["epochs"] < epoch]
        if not behind:
            return
        values, event = scalars(record, self._facts), event_text(record["event"])
        for name in behind:
            self._loggers[name].log(epoch, values, event)
            self._held[name]["epochs"] = epoch
            self._save()

    def close(self, done: bool) -> None:
        """Close them all; done: the run trained to its last epoch."""
        for logger in self._loggers.values():
            logger.close(done)

    def _save(self) -> None:
        replace_text(self._path, json.dumps(self._held, indent=1))


def scalars(record: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, float]:
    """An epoch's numbers by tag; what the record lacks, or has as null, is left out.

    Args:
        record: a line of ``metrics.jsonl``.
        facts: ``run.json``'s.
    """
    norms: dict[str, list[float]] = {}
    for target in facts["targets"]:
        if (norm := record["norms"].get(target["name"])) is not None:
            norms.setdefault(target["group"], []).append(norm)
    values = {
        "train/loss": record["loss"],
        "train/lr": record["lr"],
        **{f"train/{name}": record[name] for name in RATES},
        **{f"step/{part}": seconds for part, seconds in record["parts"].items()},
        **{f"communication/{kind}": size for kind, size in record["communication"].items()},
        "train/trainable": record["trainable"],
        "train/trainable_share": record["trainable"] / facts["parameters"],
        "memory/peak_bytes": record["peak_memory_bytes"],
        **{f"memory/{item}": size for item, size in record["memory"].items()},
        **{f"eval/{name}": value for name, value in (record["eval"] or {}).items()},
        **{f"eval_ema/{name}": value for name, value in (record["ema_eval"] or {}).items()},
        **{f"norm_by_group/{group}": sum(of_group) / len(of_group) for group, of_group in norms.items()},
        **{f"norm/{target}": value for target, value in record["norms"].items()},
        **{f"update/{target}": value for target, value in record["update"].items()},
    }
    return {tag: value for tag, value in values.items() if value is not None}


def event_text(event: Mapping[str, Any]) -> str | None:
    """What PreLoRA did at the epoch's end and why; None: nothing."""
    return None if event["action"] == "none" else f"{event['action']}, now {event['phase']}: {event['reason']}"


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, config: TrainConfig, _: str | None, epochs: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = TENSORBOARD
        self._board = SummaryWriter(str(config.output / TENSORBOARD), purge_step=epochs + 1)
        if not epochs:
            lines = yaml.safe_dump(to_dict(config), sort_keys=False).splitlines()
            self._board.add_text("config", "\n".join(f"    {line}" for line in lines), 0)  # Markdown's code block

    def log(self, epoch: int, scalars: Mapping[str, float], event: str | None) -> None:
        """As ``Logger.log``."""
        for tag, value in scalars.items():
            self._board.add_scalar(tag, value, epoch)
        if event is not None:
            self._board.add_text("event", event, epoch)
        self._board.flush()

    def close(self, done: bool) -> None:
        """As ``Logger.close``."""
        self._board.close()


class WandB:
    """A run of Weights & Biases, whose mode, project and entity are set by its own environment variables."""

    def __init__(self, config: TrainConfig, run_id: str | None, _: int) -> None:
        import wandb

        self.id = run_id or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "prelora"),
            id=self.id,
            resume="allow",
            name=config.output.name,
            dir=str(config.output),
            config=to_dict(config),
            allow_val_change=True,  # of what a resume may change
        )

    def log(self, epoch: int, scalars: Mapping[str, float], event: str | None) -> None:
        """As ``Logger.log``."""
        self._run.log({**scalars, **({"event": event} if event else {})}, step=epoch, commit=True)
        if event:
            self._run.summary[f"event/epoch {epoch}"] = event

    def close(self, done: bool) -> None:
        """As ``Logger.close``."""
        self._run.finish(exit_code=0 if done else 1)


class MLflow:
    """A run of MLflow, at ``MLFLOW_TRACKING_URI`` or else in a database in the run's folder."""

    def __init__(self, config: TrainConfig, run_id: str | None, _: int) -> None:
        import mlflow
        from mlflow.entities import Param

        folder = config.output.resolve()
        ours = not mlflow.is_tracking_uri_set()
        self._client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}" if ours else None)
        if run_id is not None:
            self.id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "prelora")
        found = self._client.get_experiment_by_name(name)
        artifacts = (folder / "mlartifacts").as_uri() if ours else None
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifacts)
        self.id = self._client.create_run(experiment, run_name=folder.name).info.run_id
        params = [Param(key, str(value)) for key, value in flat(to_dict(config)).items()]
        for first in range(0, len(params), 100):  # MLflow's limit of a batch
            self._client.log_batch(self.id, params=params[first : first + 100])

    def log(self, epoch: int, scalars: Mapping[str, float], event: str | None) -> None:
        """As ``Logger.log``."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_mlflow_key(tag), value, now, epoch) for tag, value in scalars.items()]
        for first in range(0, len(metrics), 1000):  # MLflow's limit of a batch
            self._client.log_batch(self.id, metrics=metrics[first : first + 1000])
        if event is not None:
            self._client.set_tag(self.id, f"event.epoch_{epoch:04d}", event)

    def close(self, done: bool) -> None:
        """As ``Logger.close``."""
        self._client.set_terminated(self.id, "FINISHED" if done else "KILLED")


def _mlflow_key(tag: str) -> str:
    """MLflow takes no brackets: ``attn.qkv[q]`` becomes ``attn.qkv/q``."""
    return re.sub(r"\[(.*?)\]", r"/\1", tag)


LOGGERS: dict[LoggerName, Callable[[TrainConfig, str | None, int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
"""Each is given the config, its id of the run (None: a new one), and how many epochs it holds."""
