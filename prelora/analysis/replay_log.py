"""What of a run Algorithms 1 and 2 read: FULL's losses and norms, from a run's folder or from anyone's CSV."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from prelora.analysis.records import Run, load_run
from prelora.config import PreLoRAConfig
from prelora.targets import Target
from prelora.train.config import load_yaml

LEADING = ("epoch", "loss")


@dataclass(frozen=True)
class NormLog:
    """Losses and norms of the epochs in FULL, from epoch 1 without a gap."""

    name: str
    targets: tuple[Target, ...]
    """Named as in ``norms``; of a CSV, without what a model would say of them."""
    losses: tuple[float, ...]
    """Mean training loss of each epoch; NaN where it was not finite."""
    norms: tuple[dict[str, float], ...]
    """Frobenius norm by target name, of each epoch."""
    config: PreLoRAConfig
    """What the run itself was configured with; the defaults for a CSV."""
    stopped_by: str
    """Why there is no FULL epoch after the last one, in words."""
    update_ranks: tuple[dict[str, float], ...] = ()
    """Stable rank by target of the change over the window that ended with each epoch; empty where there is none."""
    run: Run | None = None
    """None for a CSV."""
    folder: Path | None = None


def load_log(path: Path) -> NormLog:
    """Read a run's folder, its ``metrics.jsonl``, or a CSV of norms and losses.

    Raises:
        FileNotFoundError: nothing there, or a folder without ``run.json``.
        ValueError: a record is missing or malformed; the message says where.
    """
    if path.suffix == ".csv":
        return _from_csv(path)
    return _from_run(path.parent if path.name == "metrics.jsonl" else path)


def _from_run(folder: Path) -> NormLog:
    run = load_run(folder)
    full = run.in_phase("full")
    for expected, epoch in enumerate(full, start=1):
        if epoch.epoch != expected:
            raise ValueError(f"{folder}: no record of epoch {expected}; windows are counted over every FULL epoch")
    if not full:
        raise ValueError(f"{folder}: no finished epoch")
    # config.yaml is what was asked for; a full-rank baseline's run.json holds a min_epoch that it cannot reach.
    asked = folder / "config.yaml"
    config = load_yaml(asked).prelora if asked.exists() else PreLoRAConfig(**run.info.config)
    ends = f"the log ends after epoch {len(full)} of {run.info.epochs}"
    if run.switch is not None:
        ends = f"the run itself switched after epoch {run.switch.epoch}, and only epochs in FULL count"
    return NormLog(
        name=run.name,
        targets=tuple(Target(target.path, target.group, target.layer, target.rows) for target in run.info.targets),
        losses=tuple(epoch.loss for epoch in full),
        norms=tuple(dict(epoch.norms) for epoch in full),
        config=config,
        stopped_by=ends,
        update_ranks=tuple(dict(epoch.event.update_ranks) for epoch in full),
        run=run,
        folder=folder,
    )


def _from_csv(path: Path) -> NormLog:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2:
        raise ValueError(f"{path}: needs a line of column names and at least one epoch")
    columns, *lines = rows
    targets = _targets(path, columns)
    losses, norms = [], []
    for expected, line in enumerate(lines, start=1):
        if len(line) != len(columns):
            raise ValueError(f"{path}, epoch {expected}: {len(line)} values under {len(columns)} columns")
        epoch, loss, *values = (_number(path, expected, cell) for cell in line)
        if epoch != expected:
            raise ValueError(f"{path}: epoch {line[0]} where epoch {expected} is due; accepted is 1, 2, 3, …")
        losses.append(loss)
        norms.append(dict(zip((target.name for target in targets), values, strict=True)))
    stopped = f"the log ends after epoch {len(losses)}"
    return NormLog(path.stem, targets, tuple(losses), tuple(norms), PreLoRAConfig(), stopped)


def _targets(path: Path, columns: list[str]) -> tuple[Target, ...]:
    if tuple(columns[:2]) != LEADING or len(columns) < 3:
        raise ValueError(f"{path}: columns {', '.join(columns[:4])}: accepted are epoch, loss, then group/name each")
    found: dict[str, Target] = {}
    for column in columns[2:]:
        group, slash, name = column.partition("/")
        if not (group and slash and name):
            raise ValueError(f"{path}: column {column!r}: accepted is group/name, as in q/blocks.0.attn.q")
        if name in found:
            raise ValueError(f"{path}: column {column!r}: there is another column of target {name!r}")
        found[name] = Target(name, group, sum(target.group == group for target in found.values()))
    return tuple(found.values())


def _number(path: Path, epoch: int, cell: str) -> float:
    if not cell.strip():
        return math.nan
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{path}, epoch {epoch}: {cell!r} is not a number; leave out what was not finite") from None
