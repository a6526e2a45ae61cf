"""What a loader is timed at: epochs by itself, and training steps on its batches; its memory over many epochs.

    python -m bench.loading TREE LOADER EPOCHS

prints the resident memory after each epoch of a process that loads ``TREE``'s images and does nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.io import ImageReadMode, decode_image

from bench.interleave import Role, Variant
from bench.models import FULL, StepCell, Trained, base_model, trained
from bench.precision import DEVICE
from prelora.data.sampler import train_batches
from prelora.data.source import Source, build_source

SIZE = 224
RAND_AUGMENT = (2, 15)
WORKERS = 2
"""Threads or processes that load: the cores of the machine at hand, for every loader alike."""
AHEAD = 16
"""Batches of an epoch beyond the steps that are timed: the loader never runs out of work meanwhile."""

Loader = Literal["dali", "plain"]


@dataclass(frozen=True)
class LoadCell:
    """Which pictures, how many to an epoch and to a batch, and whether RandAugment(2, 15) is on."""

    pictures: str
    rand_augment: bool
    images: int
    batch: int

    @property
    def name(self) -> str:
        """As in the test's id."""
        return f"{self.pictures}-{'ra' if self.rand_augment else 'crop'}-b{self.batch}-{self.images}-images"


def source(tree: Path, loader: Loader, rand_augment: bool) -> Source:
    """One of ours, on the CPU's two cores."""
    chosen = RAND_AUGMENT if rand_augment else None
    return build_source(
        "images", path=tree, image_size=SIZE, seed=0, workers=WORKERS, rand_augment=chosen, loader=loader, device=DEVICE
    )


def batches(data: Source, batch: int, epoch: int, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch, or its first ``count`` batches."""
    samples = data.train_samples
    count = samples // batch if count is None else count
    indices = train_batches(samples, 0, epoch, batch_size=batch, rank=0, world_size=1, first=0, count=count)
    return data.train(list(indices), epoch)


def epoch_variants(cell: LoadCell, tree: Path) -> list[Variant]:
    """Whole epochs, from the first file that is read to the last batch that is there."""

    def ours(loader: Loader) -> Callable[[int], object]:
        data = source(tree, loader, cell.rand_augment)
        return lambda epoch: [len(labels) for _, labels in batches(data, cell.batch, epoch)]

    return [
        _epochs("DALI", "ours", cell.images, ours("dali")),
        _epochs("plain", "peer", cell.images, ours("plain")),
        _epochs("torchvision", "peer", cell.images, torchvisions(cell, tree)),
        _epochs("decoding alone", "yardstick", cell.images, decoding(tree)),
    ]


def _epochs(name: str, role: Role, images: int, load: Callable[[int], object]) -> Variant:
    seconds: list[float] = []
    cores: list[float] = []

    def epoch() -> None:
        start, spent = time.perf_counter(), cpu_seconds()
        load(len(seconds))
        seconds.append(time.perf_counter() - start)
        cores.append(cpu_seconds() - spent)

    def note() -> str:
        speed, work = images / statistics.median(seconds), 1e3 * statistics.median(cores) / images
        return f"{speed:.0f} images/s, {work:.2f} ms of one core for each"

    return Variant(name, {"epoch": epoch}, role, note=note)


def cpu_seconds() -> float:
    """Of this process's threads, and of the processes that it waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def torchvisions(cell: LoadCell, tree: Path) -> Callable[[int], object]:
    """What most trainers do: ImageFolder and torchvision's transforms, whose RandAugment(2, 15) is a milder one."""
    steps: list[Any] = [transforms.RandomResizedCrop(SIZE, scale=(0.05, 1.0)), transforms.RandomHorizontalFlip()]
    steps += [transforms.RandAugment(*RAND_AUGMENT)] if cell.rand_augment else []
    steps += [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    images = datasets.ImageFolder(str(tree / "train"), transforms.Compose(steps))

    def load(epoch: int) -> object:
        order = torch.Generator().manual_seed(epoch)
        loader: Any = DataLoader(images, cell.batch, shuffle=True, num_workers=WORKERS, generator=order)
        return [len(labels) for _, labels in loader]

    return load


def decoding(tree: Path) -> Callable[[int], object]:
    """Every file read and decoded whole, by as many threads: only what a crop leaves out can be spared of it."""
    files = sorted((tree / "train").rglob("*.jpg"))

    def load(_: int) -> object:
        with ThreadPoolExecutor(WORKERS) as pool:
            return sum(image.shape[0] for image in pool.map(lambda file: decode_image(file, ImageReadMode.RGB), files))

    return load


def step_variants(cell: StepCell, tree: Path, steps: int) -> list[Variant]:
    """Full training steps on the batches of each loader, and on a batch that is there already."""
    base = base_model(cell.model)
    idle = trained(FULL, cell, base)
    return [
        Variant("no loading", {f"{steps} steps": lambda: [idle.step() for _ in range(steps)]}, "peer"),
        _steps("DALI", "ours", source(tree, "dali", True), trained(FULL, cell, base), steps),
        _steps("plain", "peer", source(tree, "plain", True), trained(FULL, cell, base), steps),
    ]


def _steps(name: str, role: Role, data: Source, run: Trained, steps: int) -> Variant:
    under_way: list[Any] = []

    def start() -> None:
        under_way.append(batches(data, len(run.images), 0, steps + AHEAD))
        next(under_way[0])

    def step() -> None:
        for _ in range(steps):
            images, labels = next(under_way[0])
            run.images, run.labels = images.to(DEVICE), labels.to(DEVICE)
            run.step()

    # Stopping has a time of its own: what was read ahead is done before it is the next one's turn.
    parts = {"first batch": start, f"{steps} steps": step, "stop": lambda: under_way.pop().close()}
    return Variant(name, parts, role, summed=False)


def resident(tree: Path, loader: Loader, epochs: int) -> list[float]:
    """MiB after each epoch."""
    data = source(tree, loader, True)
    sizes = []
    for epoch in range(epochs):
        for _ in batches(data, 16, epoch):
            pass
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        sizes.append(pages * 4096 / 2**20)
    return sizes


if __name__ == "__main__":
    print(json.dumps(resident(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))  # type: ignore[arg-type]
