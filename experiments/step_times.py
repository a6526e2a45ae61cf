"""What an optimizer step takes in each phase: full, WARMUP and LORA in turns in one process, on the run's own ranks.

The epochs' own seconds in a run's log are of a machine that may have had other things to do; ratios within a round of
these are not. ``python -m experiments.step_times`` measures every finished run anew.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from bench.interleave import Interleaved
from bench.interleave import Variant as Timed
from experiments.declaration import ROOT, Dataset, Variant, add_choices, chosen
from prelora.analysis.phases import in_phases
from prelora.data.sampler import train_batches
from prelora.nn import merge_once
from prelora.nn.deferred_grads import lora_grads_from_weights
from prelora.train.build import build_parts
from prelora.train.config import OptimConfig

TIMED = ("exp1", "exp2", "exp3", "freeze_only", "uniform", "wide_ranks")
"""Variants whose steps are measured; the others' layers are of the sizes of one of these."""
ROUNDS, FIRST = 20, 2
"""Rounds that count, and rounds before them, with one more, that do not."""
COLUMNS = ("variant", "seed", "phase", "round", "seconds", "batch")


def measure(dataset: Dataset, variant: Variant, seed: int) -> None:
    """Measure a finished run's steps in a process of their own, as its training was, and keep them beside the runs."""
    chosen_run = ["--dataset", dataset.name, "--variant", variant.name, "--seed", str(seed)]
    command = [sys.executable, "-m", "experiments.step_times", *chosen_run]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(dataset.threads)}, cwd=ROOT, check=True)


def read_times(dataset: Dataset) -> list[dict[str, str]]:
    """All rows that were measured, variants and seeds in their declared order."""
    files = [_file(dataset, variant, seed) for variant, seed in dataset.runs]
    return [row for path in files if path.exists() for row in csv.DictReader(path.read_text().splitlines())]


def main() -> int:
    """Run the command line; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_choices(parser)
    for dataset, variant, seed in chosen(parser.parse_args()):
        if variant.name in TIMED:
            measure_here(dataset, variant, seed)
    return 0


def measure_here(dataset: Dataset, variant: Variant, seed: int) -> None:
    """Measure a finished run's steps in this process; of one that is not, or has not switched, there are none."""
    run = dataset.finished(variant, seed)
    if run is None or not run.ranks:
        return
    config = dataset.config(variant, seed)
    parts, _ = build_parts(config, torch.device("cpu"))
    batch = config.data.batch_size
    indices = train_batches(
        parts.source.train_samples, seed, 0, batch_size=batch, rank=0, world_size=1, first=0, count=1
    )
    images, labels = next(parts.source.train(list(indices), 0))
    execution = config.prelora.execution
    models = in_phases(parts.pre.base_model.train(), parts.pre.targets, run.ranks, config.prelora, execution)
    steps = {
        phase: functools.partial(_stepping(each.model, phase, config.optim, parts.criterion), images, labels)
        for phase, each in models.items()
    }
    timed = Interleaved([Timed(phase, {"step": step}) for phase, step in steps.items()], torch.device("cpu"))
    timed.warm_up(FIRST)
    for _ in range(ROUNDS):
        timed.round()
    seconds = {phase: timed.samples[phase]["step"] for phase in models}
    rows = [
        (variant.name, seed, phase, turn, f"{seconds[phase][turn]:.6f}", batch)
        for turn in range(ROUNDS)
        for phase in models
    ]
    path = _file(dataset, variant, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    told = ", ".join(f"{phase} {1e3 * statistics.median(taken):.0f} ms" for phase, taken in seconds.items())
    print(f"{dataset.name} {variant.name} seed {seed}: {told}")


def _stepping(
    model: nn.Module, phase: str, optim: OptimConfig, criterion: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], None]:
    """The trainer's step in a phase."""
    optimizer = create_optimizer_v2(model, opt=optim.name, lr=optim.lr, weight_decay=optim.weight_decay)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(images: Tensor, labels: Tensor) -> None:
        with merge_once(model):
            criterion(model(images), labels).backward()
        if phase == "warmup":
            lora_grads_from_weights(model)
        if optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(trained, optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _file(dataset: Dataset, variant: Variant, seed: int) -> Path:
    return dataset.folder(variant, seed).parents[1] / "step_times" / f"{variant.name}-seed{seed}.csv"


if __name__ == "__main__":
    sys.exit(main())
