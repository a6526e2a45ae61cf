"""What an optimizer step takes in each phase: full, WARMUP and LORA in turns in one process, on the run's own ranks.

The epochs' own seconds in a run's log are of a machine that may have had other things to do; ratios within a round of
these are not. ``python -m experiments.step_times`` measures every finished run anew.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from experiments.declaration import ROOT, Dataset, Variant, load_grid
from prelora import surgery
from prelora.analysis.records import load_run
from prelora.data.sampler import train_batches
from prelora.nn import merge_once
from prelora.nn.deferred_grads import defer_lora_grads, lora_grads_from_weights
from prelora.targets import Target
from prelora.train.build import build_parts
from prelora.train.config import TrainConfig

TIMED = ("exp1", "exp2", "exp3", "freeze_only", "uniform")
"""Variants whose steps are measured; the others' layers are of the sizes of one of these."""
PHASES = ("full", "warmup", "lora")
ROUNDS, FIRST = 20, 3
"""Rounds that count, and rounds before them that do not."""
COLUMNS = ("variant", "seed", "phase", "round", "seconds", "batch")


def measure(dataset: Dataset, variant: Variant, seed: int) -> None:
    """Measure a finished run's steps in a process of their own, as its training was, and keep them beside the runs."""
    command = [
        sys.executable,
        "-m",
        "experiments.step_times",
        "--dataset",
        dataset.name,
        "--variant",
        variant.name,
        "--seed",
        str(seed),
    ]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(dataset.threads)}, cwd=ROOT, check=True)


def read_times(dataset: Dataset) -> list[dict[str, str]]:
    """All rows that were measured, variants and seeds in their declared order."""
    rows = []
    for variant in dataset.variants:
        for seed in dataset.seeds:
            if (path := _file(dataset, variant, seed)).exists():
                with path.open(newline="") as file:
                    rows += list(csv.DictReader(file))
    return rows


def main() -> int:
    """Run the command line; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", help="only this one")
    parser.add_argument("--variant", help="only this one")
    parser.add_argument("--seed", type=int, help="only this one")
    options = parser.parse_args()
    for dataset in load_grid():
        for variant in dataset.variants:
            for seed in dataset.seeds:
                named = (dataset.name, variant.name, seed)
                asked = (options.dataset, options.variant, options.seed)
                chosen = all(wanted in (None, name) for wanted, name in zip(asked, named, strict=True))
                ends = dataset.folder(variant, seed) / "metrics.jsonl"
                if chosen and variant.name in TIMED and ends.exists() and load_run(ends.parent).ranks:
                    measure_here(dataset, variant, seed)
    return 0


def measure_here(dataset: Dataset, variant: Variant, seed: int) -> None:
    """Measure a finished run's steps in this process."""
    config = dataset.config(variant, seed)
    parts, _ = build_parts(config, torch.device("cpu"))
    batch = config.data.batch_size
    indices = train_batches(
        parts.source.train_samples, seed, 0, batch_size=batch, rank=0, world_size=1, first=0, count=1
    )
    images, labels = next(parts.source.train(list(indices), 0))
    ranks = dict(load_run(dataset.folder(variant, seed)).ranks)
    steps = {
        phase: _step(parts.pre.base_model, parts.pre.targets, ranks, phase, config, parts.criterion) for phase in PHASES
    }
    rows = []
    for turn in range(-FIRST, ROUNDS):
        for phase in PHASES:
            began = time.perf_counter()
            steps[phase](images, labels)
            if turn >= 0:
                rows.append((variant.name, seed, phase, turn, f"{time.perf_counter() - began:.6f}", batch))
    path = _file(dataset, variant, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    median = {p: statistics.median(float(row[4]) for row in rows if row[2] == p) for p in PHASES}
    print(
        f"{dataset.name} {variant.name} seed {seed}: " + ", ".join(f"{p} {1e3 * s:.0f} ms" for p, s in median.items())
    )


def _step(
    base: nn.Module,
    targets: tuple[Target, ...],
    ranks: dict[str, int],
    phase: str,
    config: TrainConfig,
    criterion: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor], None]:
    """The trainer's step in a phase, on a copy of the model."""
    model = copy.deepcopy(base).train()
    if phase != "full":
        surgery.inject(model, targets, ranks, execution=config.prelora.execution)
        plain = {name for name, rank in ranks.items() if rank == 0}
        if phase == "lora":
            surgery.freeze(model, targets, config.prelora.freeze, without_lora=plain)
        defer_lora_grads(model, phase == "warmup")
    optim = config.optim
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
