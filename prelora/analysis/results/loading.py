"""Collected results of an experiment: the CSV files of one data set's folder, joined and checked.

A run that was forked from ``full`` trains only what follows the epochs that they share; its rows begin there. Here each
run has all of its epochs: ``full``'s rows of the same seed up to ``prefix_epochs``, then its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from prelora.analysis.results.cells import read_rows
from prelora.analysis.results.rows import EpochRow, LayerRow, NormRow, RankRow, RunRow, TimingRow

Identity = tuple[str, int]
"""Variant and seed."""
BASELINE, PRELORA = "full", "exp2"
"""Full training, and the variant that stands for PreLoRA; its timing serves those without their own."""


class MissingDataError(ValueError):
    """The results lack what a figure shows; the message says what."""


class _Epoch(Protocol):
    """A row of one epoch of one run."""

    @property
    def variant(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def epoch(self) -> int: ...


Row = TypeVar("Row", bound=_Epoch)


@dataclass(frozen=True)
class Results:
    """A data set's folder."""

    name: str
    runs: tuple[RunRow, ...]
    epochs: Mapping[Identity, tuple[EpochRow, ...]]
    """All epochs of each run, from 1 to its last, those shared with ``full`` included."""
    norms: Mapping[Identity, tuple[NormRow, ...]]
    layers: tuple[LayerRow, ...]
    ranks: tuple[RankRow, ...]
    timing: tuple[TimingRow, ...]
    environment: Mapping[str, Any]
    """``environment.json``; empty without it."""

    @property
    def variants(self) -> list[str]:
        """In the order of ``runs.csv``."""
        return list(dict.fromkeys(run.variant for run in self.runs))

    def of(self, variant: str) -> list[RunRow]:
        """The variant's runs, by seed.

        Raises:
            MissingDataError: there are none.
        """
        found = sorted((run for run in self.runs if run.variant == variant), key=lambda run: run.seed)
        if not found:
            raise MissingDataError(f"no run of {variant}")
        return found

    def title(self, variant: str) -> str:
        """What a figure calls the variant."""
        return self.of(variant)[0].title

    def epochs_of(self, run: RunRow) -> tuple[EpochRow, ...]:
        """All epochs of a run.

        Raises:
            MissingDataError: it has none.
        """
        return _rows_of(self.epochs, run, "epochs")

    def norms_of(self, run: RunRow) -> tuple[NormRow, ...]:
        """All epochs and groups of a run.

        Raises:
            MissingDataError: it has none.
        """
        return _rows_of(self.norms, run, "norms")


def load_results(folder: Path) -> Results:
    """Read a data set's folder; only ``runs.csv`` must be there, a file that is not leaves its part empty.

    Raises:
        ValueError: a file does not say what it should; names file, line and column.
        OSError: ``runs.csv`` cannot be read.
    """
    run_key = ("variant", "seed")
    runs = tuple(read_rows(folder / "runs.csv", RunRow, run_key))
    if not runs:
        raise ValueError(f"{folder / 'runs.csv'}: line 2: no run: accepted is at least one")

    def optional(name: str, kind: type[Any], *key: str) -> list[Any]:
        path = folder / name
        return read_rows(path, kind, key) if path.exists() else []

    epochs = join_prefixes(runs, optional("epochs.csv", EpochRow, *run_key, "epoch"), folder / "epochs.csv")
    _check_whole(runs, epochs, folder / "epochs.csv")
    return Results(
        name=folder.name,
        runs=runs,
        epochs=epochs,
        norms=join_prefixes(runs, optional("norms.csv", NormRow, *run_key, "epoch", "group"), folder / "norms.csv"),
        layers=tuple(optional("layers.csv", LayerRow, "seed", "epoch", "group", "layer")),
        ranks=tuple(optional("ranks.csv", RankRow, *run_key, "group", "layer")),
        timing=tuple(optional("timing.csv", TimingRow, *run_key, "phase", "round")),
        environment=_environment(folder / "environment.json"),
    )


def join_prefixes(runs: Sequence[RunRow], rows: Sequence[Row], path: Path) -> dict[Identity, tuple[Row, ...]]:
    """Rows by run and in order of epochs: those of ``full`` up to the run's prefix, then its own.

    Runs without rows of their own are left out.

    Raises:
        ValueError: a row's run is unknown, a run has a row of its own within the prefix, or ``full`` lacks the prefix;
            names ``path``.
    """
    own: dict[Identity, list[Row]] = {(run.variant, run.seed): [] for run in runs}
    for row in rows:
        if (row.variant, row.seed) not in own:
            raise ValueError(f"{path}: {row.variant}, seed {row.seed}: accepted are the runs of runs.csv")
        own[row.variant, row.seed].append(row)
    joined: dict[Identity, tuple[Row, ...]] = {}
    for run in runs:
        mine = own[run.variant, run.seed]
        if not mine:
            continue
        prefix = 0 if run.variant == BASELINE else run.prefix_epochs
        who = f"{path}: {run.variant}, seed {run.seed}"
        if any(row.epoch <= prefix for row in mine):
            first = min(row.epoch for row in mine)
            raise ValueError(f"{who}: a row for epoch {first}: accepted are those after its prefix of {prefix}")
        shared = [row for row in own.get((BASELINE, run.seed), []) if row.epoch <= prefix]
        if len({row.epoch for row in shared}) < prefix:
            raise ValueError(f"{who}: shares {prefix} epochs with {BASELINE} of that seed, which has not all of them")
        joined[run.variant, run.seed] = tuple(sorted([*shared, *mine], key=lambda row: row.epoch))
    return joined


def machine_line(environment: Mapping[str, Any]) -> str:
    """CPU and cores on which the results were made; empty if they are not said."""
    said = [str(environment[key]) + unit for key, unit in (("cpu", ""), ("cores", " cores")) if environment.get(key)]
    return ", ".join(said)


def _check_whole(runs: Sequence[RunRow], epochs: Mapping[Identity, Sequence[EpochRow]], path: Path) -> None:
    for run in runs:
        rows = epochs.get((run.variant, run.seed))
        lacking = set(range(1, run.epochs + 1)) ^ {row.epoch for row in rows} if rows else set()
        if lacking:
            wanted = f"accepted are all from 1 to {run.epochs}, once"
            raise ValueError(f"{path}: {run.variant}, seed {run.seed}: epoch {min(lacking)}: {wanted}")


def _rows_of(rows: Mapping[Identity, tuple[Row, ...]], run: RunRow, what: str) -> tuple[Row, ...]:
    found = rows.get((run.variant, run.seed))
    if not found:
        raise MissingDataError(f"no {what} of {run.variant}, seed {run.seed}")
    return found


def _environment(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a {type(found).__name__}: accepted is an object")
    return found
