"""Read what a run wrote into its folder: ``run.json`` and ``metrics.jsonl``, one line for each finished epoch.

Numbers that were not finite are null in the files and NaN here. A line cut off by a killed process is left out and
noted; an epoch written twice, as by a resume from an older checkpoint, counts as written last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from prelora.units import PHASES

T = TypeVar("T")


@dataclass(frozen=True)
class TargetInfo:
    """One target of the run."""

    name: str
    path: str
    rows: tuple[int, int] | None
    group: str
    layer: int
    in_features: int
    out_features: int
    """Outputs of the target: of its row slice, where it is one."""

    def lora_parameters(self, rank: int) -> int:
        """Parameters of A [rank, in] and B [out, rank]."""
        return rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class RunInfo:
    """``run.json``: what was run, on what."""

    recipe: str
    model: str
    device: str
    world_size: int
    parameters: int
    """Parameters of the model, without LoRA."""
    classes: int
    channels: int
    """Of the images."""
    targets: tuple[TargetInfo, ...]
    epochs: int
    """Planned."""
    global_batch: int
    """Images per optimizer step, over all ranks."""
    config: Mapping[str, Any]
    full_flops: float
    """FLOPs per image in FULL, forward and backward; NaN if not counted."""
    peak: float
    """FLOP/s of one large matrix product on the same ranks; NaN if not measured."""
    environment: Mapping[str, Any]
    versions: Mapping[str, str]

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Group names, in the order of the targets."""
        return tuple(dict.fromkeys(target.group for target in self.targets))


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: mean loss, accuracies in percent."""

    loss: float
    top1: float
    top5: float
    images: int


@dataclass(frozen=True)
class Event:
    """What ``PreLoRA.end_epoch`` decided after an epoch."""

    phase: str
    """The phase after it."""
    action: str
    reason: str
    norm_changes: Mapping[str, tuple[float, ...]]
    """Percent, by group, between consecutive windows; empty when no test was made."""
    loss_changes: tuple[float, ...]
    ranks: Mapping[str, int]
    released: Mapping[str, int]
    """Bytes, by item."""
    plan_flops: Mapping[str, float] | None
    """FLOPs per image by phase, with these ranks; None until every target has one."""
    update_ranks: Mapping[str, float]
    """Stable rank by target of the change over the window that ended here; empty when not measured."""
    switched_groups: tuple[str, ...] = ()
    """Groups that got LoRA after this epoch; empty in older logs, where all did at once."""
    frozen_groups: tuple[str, ...] = ()
    """Groups whose base was frozen after this epoch; empty in older logs."""

    @property
    def switched(self) -> bool:
        """Whether LoRA was injected after this epoch."""
        return "switch" in self.action

    @property
    def froze(self) -> bool:
        """Whether the base was frozen after this epoch."""
        return "freeze" in self.action


@dataclass(frozen=True)
class Epoch:
    """One line of ``metrics.jsonl``."""

    epoch: int
    """Finished epochs, from 1."""
    step: int
    phase: str
    """The phase in which this epoch was trained."""
    loss: float
    lr: float
    images: int
    seconds: float
    parts: Mapping[str, float]
    """Seconds by part of the step."""
    img_per_s: float
    img_per_s_computing: float
    """The same without the time that was spent waiting for images."""
    flop_per_s: float
    """FLOPs of the phase over the time not spent waiting for images."""
    communication: Mapping[str, int]
    """Bytes that one rank hands to each kind of collective in an optimizer step."""
    peak_memory: int
    """Bytes; 0 if not measured."""
    memory: Mapping[str, int]
    """Bytes, by item."""
    trainable: int
    norms: Mapping[str, float]
    base_norms: Mapping[str, float]
    lora_norms: Mapping[str, float]
    updates: Mapping[str, float]
    """Relative update norm of the epoch, by target."""
    evaluation: Evaluation | None
    ema_evaluation: Evaluation | None
    skipped_steps: int
    event: Event
    flops_per_image: float = math.nan
    """As the epoch was trained; NaN in older logs."""


@dataclass(frozen=True)
class Run:
    """A run as far as it got."""

    name: str
    info: RunInfo
    epochs: tuple[Epoch, ...]
    notes: tuple[str, ...] = ()
    """What was odd about the files, a sentence each."""

    @property
    def switch(self) -> Epoch | None:
        """The first epoch after which LoRA was injected."""
        return next((epoch for epoch in self.epochs if epoch.event.switched), None)

    @property
    def freeze(self) -> Epoch | None:
        """The epoch after which the base of every target was frozen."""
        return next((epoch for epoch in self.epochs if epoch.event.froze and epoch.event.phase == "lora"), None)

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank by target; empty before the switch."""
        return self.epochs[-1].event.ranks if self.epochs else {}

    @property
    def flops(self) -> Mapping[str, float]:
        """FLOPs per image by phase, of the epochs trained in it their mean; what was not counted is missing."""
        planned = next((epoch.event.plan_flops for epoch in reversed(self.epochs) if epoch.event.plan_flops), None)
        full = {"full": self.info.full_flops} if math.isfinite(self.info.full_flops) else {}
        trained: dict[str, list[float]] = {
            phase: [epoch.flops_per_image for epoch in self.in_phase(phase)] for phase in PHASES
        }
        means = {
            phase: fmean(counts) for phase, counts in trained.items() if counts and all(map(math.isfinite, counts))
        }
        return {**(planned or full), **means}

    def in_phase(self, phase: str) -> list[Epoch]:
        """The epochs trained in ``phase``."""
        return [epoch for epoch in self.epochs if epoch.phase == phase]


def load_run(run_dir: Path) -> Run:
    """Read a run's folder.

    Raises:
        FileNotFoundError: no ``run.json``.
        ValueError: ``run.json`` is not JSON, or a field is missing or of the wrong kind; the message says where.
    """
    info, metrics = run_dir / "run.json", run_dir / "metrics.jsonl"
    run_info = _located(str(info), lambda: _run_info(json.loads(info.read_text(encoding="utf-8"))))
    epochs, notes = _read_metrics(metrics) if metrics.exists() else ([], [f"{metrics.name} does not exist."])
    return Run(run_dir.resolve().name, run_info, tuple(epochs), tuple(notes))


def _read_metrics(path: Path) -> tuple[list[Epoch], list[str]]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    filled = {number: line for number, line in enumerate(lines, start=1) if line.strip()}
    epochs: dict[int, Epoch] = {}
    notes, again = [], set()
    for number, line in filled.items():
        try:
            raw = json.loads(line)
        except json.JSONDecodeError:
            which = "The last line" if number == max(filled) else "A line"
            notes.append(f"{which} of {path.name} (line {number}) is cut off and was left out.")
            continue
        epoch = _located(f"{path}, line {number}", partial(_epoch, raw))
        for known in [known for known in epochs if known >= epoch.epoch]:
            again.add(known)
            del epochs[known]
        epochs[epoch.epoch] = epoch
    if again:
        notes.append(f"{len(again)} epochs were trained again after a resume; what was written last counts.")
    missing = sorted(set(range(1, max(epochs, default=0) + 1)) - epochs.keys())
    if missing:
        notes.append(f"No record of {len(missing)} epochs, the first of them epoch {missing[0]}.")
    return list(epochs.values()), notes


def _located(where: str, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except KeyError as error:
        raise ValueError(f"{where}: no field {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: _number(value) for name, value in values.items()}


def _run_info(raw: Mapping[str, Any]) -> RunInfo:
    return RunInfo(
        recipe=raw["recipe"],
        model=raw["model"],
        device=raw["device"],
        world_size=raw["world_size"],
        parameters=raw["parameters"],
        classes=raw["classes"],
        channels=raw["channels"],
        targets=tuple(_target(target) for target in raw["targets"]),
        epochs=raw["epochs"],
        global_batch=raw["global_batch"],
        config=raw["config"],
        full_flops=_number((raw.get("flops") or {}).get("full")),
        peak=_number(raw["peak_flop_per_s"]),
        environment=raw["environment"],
        versions={name: raw[name] for name in ("prelora", "torch")},
    )


def _target(raw: Mapping[str, Any]) -> TargetInfo:
    rows = tuple(raw["rows"]) if raw["rows"] is not None else None
    return TargetInfo(
        name=raw["name"],
        path=raw["path"],
        rows=rows,
        group=raw["group"],
        layer=raw["layer"],
        in_features=raw["in_features"],
        out_features=rows[1] - rows[0] if rows is not None else raw["out_features"],
    )


def _evaluation(raw: Mapping[str, Any] | None) -> Evaluation | None:
    if raw is None:
        return None
    return Evaluation(_number(raw["loss"]), _number(raw["top1"]), _number(raw["top5"]), raw["images"])


def _event(raw: Mapping[str, Any]) -> Event:
    return Event(
        phase=raw["phase"],
        action=raw["action"],
        reason=raw["reason"],
        norm_changes={group: tuple(map(_number, changes)) for group, changes in raw["norm_changes"].items()},
        loss_changes=tuple(map(_number, raw["loss_changes"])),
        ranks=raw["ranks"],
        released=raw["released"],
        plan_flops=_numbers(raw["plan_flops"]) if raw.get("plan_flops") else None,
        update_ranks=_numbers(raw.get("update_ranks", {})),
        switched_groups=tuple(raw.get("switched_groups", ())),
        frozen_groups=tuple(raw.get("frozen_groups", ())),
    )


def _epoch(raw: Mapping[str, Any]) -> Epoch:
    if raw["phase"] not in PHASES:
        raise ValueError(f"phase {raw['phase']!r}: known are {', '.join(PHASES)}")
    return Epoch(
        epoch=raw["epoch"],
        step=raw["step"],
        phase=raw["phase"],
        loss=_number(raw["loss"]),
        lr=_number(raw["lr"]),
        images=raw["images"],
        seconds=_number(raw["seconds"]),
        parts=_numbers(raw["parts"]),
        img_per_s=_number(raw["img_per_s"]),
        img_per_s_computing=_number(raw["img_per_s_computing"]),
        flop_per_s=_number(raw["flop_per_s"]),
        communication=raw["communication"],
        peak_memory=raw["peak_memory_bytes"] or 0,
        memory=raw["memory"],
        trainable=raw["trainable"],
        norms=_numbers(raw["norms"]),
        base_norms=_numbers(raw["base_norms"]),
        lora_norms=_numbers(raw["lora_norms"]),
        updates=_numbers(raw["update"]),
        evaluation=_evaluation(raw["eval"]),
        ema_evaluation=_evaluation(raw["ema_eval"]),
        skipped_steps=raw["skipped_steps"],
        event=_event(raw["event"]),
        flops_per_image=_number(raw.get("flops_per_image")),
    )
