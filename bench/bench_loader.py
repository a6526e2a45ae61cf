"""``loader``: images per second beside the plain loader, what loading costs in training, memory over many epochs."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import gate, pictures
from bench.loading import LoadCell, epoch_variants, step_variants
from bench.models import StepCell
from bench.rows import Row, Spread

ROOT = Path(__file__).resolve().parents[1]
EPOCH_SECONDS, TRAINING_SECONDS = 60.0, 120.0
IMAGES = 512
BATCHES = (32, 128)
"""DALI divides a batch by operation, and each part among its threads: small batches leave some of them idle."""
STEPS = 6
EPOCHS = 50
SETTLED = 10
"""Epochs after which caches are filled: from there on memory may not grow."""

pytest.importorskip("nvidia.dali", reason="DALI is not installed")


@pytest.fixture
def green() -> dict[str, str]:
    """How the tests of both loaders ended; see ``bench.conftest.green``."""
    files = {name: ROOT / "tests" / f"test_{name}.py" for name in ("images", "randaugment_dali")}
    verdicts = {name: gate.verdict("", file) for name, file in files.items()}
    for name, verdict in verdicts.items():
        if not verdict.green:
            pytest.fail(f"nothing is measured: the tests of {name} are red: {verdict.summary}", pytrace=False)
    return {name: verdict.summary for name, verdict in verdicts.items()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from the kind of pictures and their number to the folder that holds them."""
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, images: int) -> Path:
        if (kind, images) not in made:
            made[kind, images] = pictures.make_tree(kind, tmp_path_factory.mktemp(kind) / "tree", images)
        return made[kind, images]

    return make


def load_cells() -> Iterator[Any]:
    """Both kinds of pictures, without and with RandAugment."""
    for kind, rand_augment, batch in itertools.product(("photos", "clipart"), (False, True), BATCHES):
        cell = LoadCell(kind, rand_augment, IMAGES, batch)
        marks = [pytest.mark.default_cell] if (kind, batch) == ("photos", BATCHES[-1]) else []
        yield pytest.param(cell, id=f"loader-{cell.name}", marks=marks)


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
@pytest.mark.parametrize("cell", list(load_cells()))
def bench_epochs(cell: LoadCell, measure: Any, tree: Any) -> None:
    """An epoch by each loader in turn."""
    refusal = pictures.refusal(cell.pictures)
    if refusal:
        pytest.skip(refusal)
    measure("loader", cell.name, epoch_variants(cell, tree(cell.pictures, cell.images)), EPOCH_SECONDS)


@pytest.mark.default_cell
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def bench_training(precision: str, measure: Any, tree: Any) -> None:
    """Steps of a ViT-S on batches that a loader makes meanwhile, and on batches that are there already."""
    cell = StepCell("ViT-S", 8, 16, precision, "sliced")
    measure("loader", f"training-{cell.name}", step_variants(cell, tree("photos", IMAGES), STEPS), TRAINING_SECONDS)


@pytest.mark.default_cell
def bench_memory(record: Any, tree: Any) -> None:
    """Each loader alone in a process, epoch after epoch."""
    record("loader", lambda: [memory_row(loader, tree("photos", 96)) for loader in ("dali", "plain")])


def memory_row(loader: str, root: Path) -> Row:
    """Resident memory over the epochs that are not the first; and its slope, by least squares."""
    command = [sys.executable, "-m", "bench.loading", str(root), loader, str(EPOCHS)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.fail(f"{loader}: {result.stderr[-2000:]}", pytrace=False)
    sizes = json.loads(result.stdout.splitlines()[-1])
    settled = sizes[SETTLED:]
    slope = np.polyfit(np.arange(len(settled)), settled, 1)[0]
    note = f"first {sizes[0]:.0f}, mean {np.mean(sizes):.0f}, largest {max(sizes):.0f}; {slope:+.3f} MiB an epoch"
    return Row(
        suite="loader",
        cell=f"memory-{EPOCHS}-epochs",
        part="resident",
        variant=loader,
        role="ours",
        unit="MiB",
        value=Spread.of(settled),
        rounds=len(settled),
        note=note,
    )
