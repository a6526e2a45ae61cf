"""``memory``: the peak of a training step in every phase, and what it is made of; each way in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import memory
from bench.models import FROZEN, OURS, WAYS, StepCell
from bench.precision import PRECISIONS
from bench.rows import Row, Spread

OPERATORS = ("lora_linear", "lora_merge", "lora_two_path")
ROOT = Path(__file__).resolve().parents[1]
BATCHES = {"ViT-S": 8, "ViT-B": 8, "ViT-L": 4}
RANK = 16
MEASURED = tuple(way for way in WAYS if way != FROZEN)


def cells() -> Iterator[Any]:
    """Every model in both precisions, with an adapter for each of q, k and v."""
    for model, batch in BATCHES.items():
        for precision in PRECISIONS:
            cell = StepCell(model, batch, RANK, precision, "sliced")
            marks = [pytest.mark.default_cell] if model == "ViT-S" else []
            yield pytest.param(cell, id=f"memory-{cell.name}", marks=marks)


@pytest.mark.parametrize("cell", list(cells()))
def bench_memory(cell: StepCell, record: Any) -> None:
    """Every way to train, one process after another."""
    record("memory", lambda: memory_rows(cell, {way: in_own_process(way, cell) for way in MEASURED}))


def in_own_process(way: str, cell: StepCell) -> dict[str, Any]:
    """What ``bench.memory`` prints."""
    command = [sys.executable, "-m", "bench.memory", memory.arguments(way, cell)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.fail(f"{way}: {result.stderr[-2000:]}", pytrace=False)
    return json.loads(result.stdout.splitlines()[-1])


def memory_rows(cell: StepCell, measured: dict[str, dict[str, Any]]) -> list[Row]:
    """One row for each way: the process's peak, against that of every peer."""
    peers = {way: found["peak"] for way, found in measured.items() if way not in OURS}
    rows = []
    for way, found in measured.items():
        rows.append(
            Row(
                suite="memory",
                cell=cell.name,
                part="peak",
                variant=way,
                role="ours" if way in OURS else "peer",
                unit="MiB",
                value=Spread.of([found["peak"]]),
                rounds=1,
                peers={name: Spread.of([found["peak"] / peak]) for name, peak in peers.items() if name != way},
                items=found["items"],
                note=found["plans"],
            )
        )
    return rows
