"""``python -m prelora.train`` or ``torchrun -m prelora.train``: train a recipe, with a few overrides."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # here, for it keeps the process group that it finds as its functions' default for good
import tyro

from prelora import distributed
from prelora.errors import CheckpointError, DataError, OptimizerError
from prelora.exits import (
    EXIT_BAD_INPUT,
    EXIT_CHECKPOINT,
    EXIT_CODES,
    EXIT_DATA,
    EXIT_NOT_FINITE,
    EXIT_OTHER_RANK,
    EXIT_STOPPED,
    fail,
)
from prelora.train import run_dir
from prelora.train.build import build_parts
from prelora.train.config import TrainConfig, load_yaml
from prelora.train.display import plain_warnings
from prelora.train.failure import FailureWatch
from prelora.train.loop import NonFiniteLossError, Trainer
from prelora.train.process_group import start
from prelora.train.recipes import RECIPES, planned_gpus
from prelora.train.stop import Stopper, StopRequested


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, int | None]:
    """The config that the command line asks for, and for how many GPUs it is only to be planned; None: to be trained.

    Raises:
        ValueError, TypeError: an unknown recipe, or values out of range.
        SystemExit: on help, or on arguments that do not parse.
    """
    first = argparse.ArgumentParser(prog="prelora train", add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", metavar="NAME")
    first.add_argument("--config", metavar="FILE", type=Path)
    first.add_argument("--dry-run", action="store_true")
    first.add_argument("--gpus", metavar="N", type=int)
    chosen, rest = first.parse_known_args(arguments)
    if chosen.recipe is not None and chosen.config is not None:
        raise ValueError("--recipe and --config: give one of them")
    if chosen.gpus is not None and not chosen.dry_run:
        raise ValueError(f"--gpus {chosen.gpus}: only with --dry-run; torchrun starts what a run trains on")
    if chosen.config is not None:
        default = load_yaml(chosen.config)
    else:
        name = chosen.recipe if chosen.recipe is not None else "digits"
        if name not in RECIPES:
            raise ValueError(f"--recipe {name!r}: accepted are {', '.join(RECIPES)}")
        default = RECIPES[name]()
    listed = "\n".join(f"  {name}: {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items())
    description = (
        f"Train a model through FULL, WARMUP and LORA.\n\n--recipe NAME starts from one of\n{listed}\n"
        f"--config FILE from a YAML file, as a run saves it; --dry-run prints the plan and trains nothing\n"
        f"(--gpus N: for as many; else for those that the recipe is meant for).\n"
        f"Everything below overrides what that gives.\n\n{EXIT_CODES}"
    )
    config = tyro.cli(TrainConfig, default=default, args=rest, prog="prelora train", description=description)
    config = dataclasses.replace(config, recipe=default.recipe)
    return config, planned_gpus(config, chosen.gpus) if chosen.dry_run else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        config, gpus = parse(sys.argv[1:] if arguments is None else arguments)
        if gpus is not None:
            from prelora.train.dry_run import describe

            print(describe(config, gpus), flush=True)
            return 0
    except BrokenPipeError:  # `| head` has seen enough of the help or the plan
        return 0
    except (ValueError, TypeError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    with plain_warnings():
        return train(config)


def train(config: TrainConfig) -> int:
    """Train ``config`` in this process, which may be one of several started by torchrun; returns the exit code."""
    stopper = Stopper()
    try:
        return _run(config, stopper)
    finally:
        stopper.restore()
        if dist.is_initialized():
            # The trainer, a reference cycle, holds the process group, whose threads must have ended before Python does:
            # one that lets go of a tensor later aborts the process.
            gc.collect()
            dist.destroy_process_group()


def _run(config: TrainConfig, stopper: Stopper) -> int:
    try:
        device, store = start(config)
    except (ValueError, TimeoutError) as error:
        return fail(error, EXIT_BAD_INPUT)
    watch = FailureWatch(store, distributed.rank()) if store is not None else None
    trainer = None
    try:
        with watch or contextlib.nullcontext():
            trainer = _prepare(config, device, stopper)
            trainer.run()
    except StopRequested as stop:
        if distributed.rank() == 0:
            print(f"stopped by {stop}; go on with --resume auto", flush=True)
        return EXIT_STOPPED
    except DataError as error:
        return fail(f"rank {distributed.rank()}: {error}", EXIT_DATA)
    except CheckpointError as error:
        return fail(error, EXIT_CHECKPOINT)
    except NonFiniteLossError as error:
        return fail(error, EXIT_NOT_FINITE)
    except (ValueError, OptimizerError, OSError) as error:
        if trainer is None:
            return fail(error, EXIT_BAD_INPUT)
        if isinstance(error, OSError):
            return fail(error, EXIT_CHECKPOINT)
        raise
    except RuntimeError:  # as of a collective that another rank left
        failure = watch.failure() if watch is not None else None
        if failure is None or failure.startswith(f"rank {distributed.rank()}:"):
            raise
        return fail(f"rank {distributed.rank()} ends with {failure}", EXIT_OTHER_RANK)
    return 0


def _prepare(config: TrainConfig, device: torch.device, stopper: Stopper) -> Trainer:
    if distributed.rank() == 0:
        run_dir.claim(config)
    if distributed.world_size() > 1:
        dist.barrier()
    return Trainer(config, *build_parts(config, device), stopper)


if __name__ == "__main__":
    sys.exit(main())
