"""``prelora fork``: another run out of a full-rank run's checkpoint, as if it had been the other from the start."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from torch import Tensor

from prelora.analysis.replay import replay
from prelora.analysis.replay_log import load_log
from prelora.checkpoint import checkpoint_path, checkpoints, load_checkpoint, read_manifest, save_checkpoint
from prelora.errors import CheckpointError
from prelora.targets import from_dicts
from prelora.train import run_dir
from prelora.train.build import algorithm
from prelora.train.config import TrainConfig, from_dict, load_yaml, save_yaml, to_dict
from prelora.train.resume import FREE, flat

FORK = "fork.json"
LATER = ("method", "epochs", "optim.schedule_epochs", "optim.cooldown_epochs", "targets")
"""What may differ because nothing of it bears on the epochs before; PreLoRA's settings may too, but for ``MONITOR``."""
MONITOR = ("prelora.k", "prelora.m", "prelora.monitor_from")
"""These decide which epochs' norms a checkpoint holds, and where windows begin."""


def fork(source: Path, epoch: int, config: TrainConfig) -> Path:
    """Make ``config.output`` a run that has trained as far as ``source`` had after ``epoch``; returns its folder.

    With ``--resume auto`` it goes on from there, bit for bit as if it had been trained as ``config`` from the start:
    that is what is held here, for until its switch a run does nothing with the settings that may differ. Only the log
    of the epochs taken over has no update ranks, if the source measured none.

    Args:
        source: a run's folder, with its checkpoint after ``epoch``, in FULL.
        epoch: finished epochs; under ``config`` the switch must come after them.

    Raises:
        ValueError: the configs differ in what bears on these epochs, the switch would have come already, or the
            folder exists.
        CheckpointError: there is no such checkpoint, or it is not in FULL.
    """
    path = _after(source, epoch)
    tree = load_checkpoint(path)
    if tree["phase"] != "full":
        raise CheckpointError(f"{path} is in phase {tree['phase']!r}: only a run in 'full' can become another")
    if tree["train"]["progress"]["step"]:
        raise CheckpointError(f"{path} was written within an epoch: accepted is one of an epoch's end")
    saved = from_dict(tree["train"]["config"])
    _check_same_until(epoch, saved, config)
    tree["window_snapshot"] = _window_snapshot(source, epoch, tree, saved, config)
    if config.method == "prelora" and epoch > config.prelora.monitor_from:
        _check_still_full(source, epoch, config)
    if config.output.exists():
        raise ValueError(f"output = {config.output} exists: give another")
    tree["config"] = dataclasses.asdict(algorithm(config))
    tree["train"]["config"] = to_dict(config)
    about = read_manifest(path).about
    part = config.output.with_name(f"{config.output.name}.part")  # so that the folder appears complete or not at all
    shutil.rmtree(part, ignore_errors=True)
    save_checkpoint(checkpoint_path(part / run_dir.CHECKPOINTS, about["step"]), tree, about)
    lines = (source / run_dir.METRICS).read_text().splitlines(keepends=True)[:epoch]
    (part / run_dir.METRICS).write_text("".join(lines))
    run_dir.write_json(part / FORK, {"source": str(source), "epoch": epoch})
    save_yaml(dataclasses.replace(config, resume="auto"), part / run_dir.CONFIG)
    part.rename(config.output)
    return config.output


def forked_after(run: Path) -> int:
    """Epochs that a run took over from another; 0 for one that trained them all itself."""
    return json.loads((run / FORK).read_text())["epoch"] if (run / FORK).exists() else 0


def main(arguments: Sequence[str]) -> str:
    """``prelora fork RUN --epoch N --output FOLDER …``; returns what to do next.

    Raises:
        ValueError, CheckpointError, OSError: as ``fork``.
        SystemExit: on help, or on arguments that do not parse.
    """
    first = argparse.ArgumentParser(
        prog="prelora fork",
        description="Begin a run where a full-rank run stood after some epochs, with other settings from there on. "
        "Settings follow as for prelora train: prelora fork RUN --epoch 20 --output OUT --method prelora "
        "--prelora.tau 0.8",
    )
    first.add_argument("run", type=Path, help="the full-rank run's folder")
    first.add_argument("--epoch", type=int, required=True, help="finished epochs to take over")
    chosen, rest = first.parse_known_args(arguments)
    default = load_yaml(chosen.run / run_dir.CONFIG)
    config = tyro.cli(TrainConfig, default=default, args=rest, prog="prelora fork RUN --epoch N")
    if config.output == default.output:
        raise ValueError(f"output = {config.output} is the run itself: give --output")
    folder = fork(chosen.run, chosen.epoch, dataclasses.replace(config, recipe=default.recipe))
    return f"{folder} stands after epoch {chosen.epoch}. Next: prelora train --config {folder / run_dir.CONFIG}"


def _after(source: Path, epoch: int) -> Path:
    found: dict[int, Path] = {}
    for path in sorted(checkpoints(source / run_dir.CHECKPOINTS), reverse=True):  # an epoch's first overwrites
        about = read_manifest(path).about
        if path == checkpoint_path(path.parent, about["step"]):  # and not one whose evaluation is still due
            found[about["epoch"]] = path
    if epoch not in found:
        held = ", ".join(map(str, sorted(found))) or "none"
        raise CheckpointError(
            f"{source} kept no checkpoint of the end of epoch {epoch}, but of {held}: more with checkpoint.keep-last"
        )
    return found[epoch]


def _window_snapshot(
    source: Path, epoch: int, tree: Mapping[str, Any], saved: TrainConfig, config: TrainConfig
) -> dict[str, Tensor] | None:
    """The targets' weights at the last window's end, which a run keeps only if its settings ask for them."""
    ours, theirs = config.prelora, saved.prelora
    if not ours.keeps_windows or epoch < ours.monitor_from:
        return None
    if theirs.criterion != ours.criterion and epoch > ours.monitor_from:
        raise ValueError(
            f"prelora.criterion = {ours.criterion!r}: the run to fork kept no changes of its windows; accepted are "
            f"epochs up to monitor_from = {ours.monitor_from}"
        )
    start = epoch - (epoch - ours.monitor_from) % ours.m
    model = (tree if start == epoch else load_checkpoint(_after(source, start)))["model"]
    return {target.path: model[f"{target.path}.weight"] for target in from_dicts(tree["targets"])}


def _check_same_until(epoch: int, saved: TrainConfig, config: TrainConfig) -> None:
    theirs, ours = flat(to_dict(saved)), flat(to_dict(config))
    for key, value in ours.items():
        free = key in (*FREE, *LATER) or key.partition(".")[0] in (*FREE, "prelora")
        if (not free or key in MONITOR) and theirs[key] != value:
            raise ValueError(f"{key} = {value}: the run to fork was trained with {theirs[key]}")
    before, now = (run.optim.schedule_epochs or run.epochs for run in (saved, config))
    if before != now:
        raise ValueError(
            f"the rate's schedule is over {now} epochs, that of the run to fork over {before}: accepted with "
            f"optim.schedule_epochs = {before}"
        )
    for run in (saved, config):
        if (start := run.epochs - run.optim.cooldown_epochs) < epoch:
            raise ValueError(f"epoch {epoch} lies in a cooldown, which starts after epoch {start}")


def _check_still_full(source: Path, epoch: int, config: TrainConfig) -> None:
    switch = replay(load_log(source), config.prelora).switch_epoch
    if switch is not None and switch <= epoch:
        raise ValueError(f"under this config the switch comes after epoch {switch}: fork an earlier epoch than {epoch}")
