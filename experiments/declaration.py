"""What ``grid.yaml`` declares: each run's config, its folder, and what stands there."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prelora.analysis.records import Run, load_run
from prelora.train import run_dir
from prelora.train.config import TrainConfig, from_dict

GRID = Path(__file__).with_name("grid.yaml")
ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
KEPT_FOR_FORKS = 10_000
"""Checkpoints of a full-rank run: all."""


@dataclass(frozen=True)
class Variant:
    """One kind of run, for every seed."""

    name: str
    title: str
    overrides: dict[str, Any]
    fork: bool = False
    """Whether it takes over the full-rank run of its seed until a window before its switch."""
    equal_wall_clock: str | None = None
    """The variant whose time by the clock its epochs are to fill."""
    stop_at_switch_of: str | None = None
    """The variant at whose switch it stops, after ``cooldown_epochs``."""
    cooldown_epochs: int = 0


@dataclass(frozen=True)
class Dataset:
    """One data set's runs."""

    name: str
    overrides: dict[str, Any]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    threads: int

    @property
    def runs(self) -> list[tuple[Variant, int]]:
        """Variant and seed of every run, in the declared order."""
        return [(variant, seed) for variant in self.variants for seed in self.seeds]

    def variant(self, name: str) -> Variant:
        """By name."""
        return next(variant for variant in self.variants if variant.name == name)

    def config(self, variant: Variant, seed: int) -> TrainConfig:
        """The variant's config, but for epochs that other runs decide."""
        values = merged(self.overrides, variant.overrides)
        keep = KEPT_FOR_FORKS if variant.name == "full" else 1
        values = merged(values, {"seed": seed, "output": str(self.folder(variant, seed)), "resume": "auto"})
        return from_dict(merged(values, {"recipe": "grid", "checkpoint": {"keep_last": keep}}))

    def folder(self, variant: Variant, seed: int) -> Path:
        """The run's."""
        return RUNS / self.name / variant.name / f"seed{seed}"

    def finished(self, variant: Variant, seed: int) -> Run | None:
        """The run, if it has trained its last epoch."""
        folder = self.folder(variant, seed)
        run = load_run(folder) if (folder / run_dir.RUN).exists() else None
        return run if run is not None and len(run.epochs) == run.info.epochs else None


def load_grid(path: Path = GRID) -> list[Dataset]:
    """All data sets, their runs in the order in which they are declared.

    Raises:
        ValueError: a name that nothing declares.
    """
    grid = yaml.safe_load(path.read_text())
    datasets = []
    for name, declared in grid["datasets"].items():
        variants = tuple(_variant(variant, grid["variants"]) for variant in declared["variants"])
        seeds, threads = tuple(declared.get("seeds", grid["seeds"])), grid["threads"]
        datasets.append(Dataset(name, declared["config"], variants, seeds, threads))
    return datasets


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Options that choose among the declared runs."""
    parser.add_argument("--dataset", action="append", help="only this one (may be repeated; default: all)")
    parser.add_argument("--variant", action="append", help="only this one (may be repeated; default: all)")
    parser.add_argument("--seed", type=int, action="append", help="only this one (may be repeated; default: all)")


def chosen(options: argparse.Namespace) -> Iterator[tuple[Dataset, Variant, int]]:
    """The runs that ``add_choices``' options leave."""
    asked = (options.dataset, options.variant, options.seed)
    for dataset in load_grid():
        for variant, seed in dataset.runs:
            named = (dataset.name, variant.name, seed)
            if all(wanted is None or name in wanted for wanted, name in zip(asked, named, strict=True)):
                yield dataset, variant, seed


def merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``values`` with ``overrides``, which may go into nested mappings."""
    result = copy.deepcopy(values)
    for key, value in overrides.items():
        deeper = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if deeper else copy.deepcopy(value)
    return result


def _variant(name: str, declared: dict[str, Any]) -> Variant:
    if name not in declared:
        raise ValueError(f"variant {name!r} is not declared; known are {', '.join(declared)}")
    entry = dict(declared[name])
    like, overrides = entry.pop("like", None), entry.pop("config")
    base = declared[like]["config"] if like is not None else {}
    return Variant(name=name, overrides=merged(base, overrides), **entry)
