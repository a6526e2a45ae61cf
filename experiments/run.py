"""Train what ``grid.yaml`` declares, one process at a time; run it again to go on where it was stopped."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from experiments.collect import RESULTS, collect, collected
from experiments.declaration import ROOT, Dataset, Variant, add_choices, chosen
from experiments.step_times import TIMED, measure
from prelora.analysis.replay import replay
from prelora.analysis.replay_log import load_log
from prelora.analysis.results.clock import baseline_of, wall_clock
from prelora.analysis.results.loading import load_results
from prelora.train import run_dir
from prelora.train.config import TrainConfig, save_yaml
from prelora.train.fork import fork


def main() -> int:
    """Run the command line; returns the exit code of the first run that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_choices(parser)
    parser.add_argument("--list", action="store_true", help="print each run and how far it is, and train nothing")
    options = parser.parse_args()
    for dataset, variant, seed in chosen(options):
        if options.list:
            print(f"{dataset.name} {variant.name} seed {seed}: {_progress(dataset, variant, seed)}")
        elif code := train(dataset, variant, seed):
            return code
    return 0


def train(dataset: Dataset, variant: Variant, seed: int) -> int:
    """Train a run to its end, from where it stands, measure its steps, collect it; returns the trainer's exit code."""
    folder = dataset.folder(variant, seed)
    config_file = folder / run_dir.CONFIG
    if dataset.finished(variant, seed) or not is_due(dataset, variant, seed):
        return 0
    if not config_file.exists():
        config = _config(dataset, variant, seed)
        source = dataset.folder(dataset.variant("full"), seed)
        start = _forked_from(variant, config, source)
        if start:
            fork(source, start, config)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_yaml(config, config_file)
    print(f"{dataset.name}: {variant.title}, seed {seed}", flush=True)
    code = launch(config_file, dataset.threads)
    if code == 0 and variant.name in TIMED:
        measure(dataset, variant, seed)
    if code == 0:
        collect(dataset)
    return code


def is_due(dataset: Dataset, variant: Variant, seed: int) -> bool:
    """Whether a run is not in the tables yet, or is the full-rank one that another, which is not, is forked from."""
    known = collected(dataset)
    if (variant.name, seed) not in known:
        return True
    forked = [other.name for other in dataset.variants if other.fork or other.stop_at_switch_of is not None]
    return variant.name == "full" and any((name, seed) not in known for name in forked)


def launch(config_file: Path, threads: int) -> int:
    """Train in a process of its own; returns its exit code."""
    command = [sys.executable, "-m", "prelora.train", "--config", str(config_file)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, cwd=ROOT, check=False).returncode


def _config(dataset: Dataset, variant: Variant, seed: int) -> TrainConfig:
    """The run's config, with the epochs that another run of its seed decides."""
    config = dataset.config(variant, seed)
    if variant.equal_wall_clock is not None:
        return dataclasses.replace(config, epochs=_equal_epochs(dataset, variant.equal_wall_clock, seed))
    if variant.stop_at_switch_of is not None:
        other = dataset.config(dataset.variant(variant.stop_at_switch_of), seed)
        switch = _switch(other, dataset.folder(dataset.variant("full"), seed))
        optim = dataclasses.replace(
            config.optim, schedule_epochs=config.epochs, cooldown_epochs=variant.cooldown_epochs
        )
        return dataclasses.replace(config, epochs=switch + variant.cooldown_epochs, optim=optim)
    return config


def _equal_epochs(dataset: Dataset, variant: str, seed: int) -> int:
    """Epochs at full rank that take as long as the variant's run of this seed, by the steps that were measured."""
    results = load_results(RESULTS / dataset.name)
    run = next(run for run in results.of(variant) if run.seed == seed)
    full = baseline_of(results, run)
    return round(wall_clock(results, run) / wall_clock(results, full) * full.epochs)


def _forked_from(variant: Variant, config: TrainConfig, source: Path) -> int:
    """Epochs to take over from the full-rank run: up to a window before the switch, which the run then makes itself."""
    if variant.stop_at_switch_of is not None:
        return config.epochs - variant.cooldown_epochs
    if variant.fork and config.prelora.criterion == "update_rank":  # of which the full-rank run's log has nothing
        return config.prelora.monitor_from
    return _switch(config, source) - config.prelora.m if variant.fork else 0


def _switch(config: TrainConfig, source: Path) -> int:
    """The epoch after which ``config`` switches, by the log of the full-rank run of its seed."""
    switch = replay(load_log(source), config.prelora).switch_epoch
    return config.epochs if switch is None else switch


def _progress(dataset: Dataset, variant: Variant, seed: int) -> str:
    if (variant.name, seed) in collected(dataset):
        return "in the tables"
    log = dataset.folder(variant, seed) / run_dir.METRICS
    return f"{len(log.read_text().splitlines())} epochs" if log.exists() else "not begun"


if __name__ == "__main__":
    sys.exit(main())
