"""Image folders (``train/<class>/*``, ``val/<class>/*``) over torchvision: the plain loader."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from prelora.data.source import Batches

TO_UNIT_RANGE = transforms.Normalize([0.5] * 3, [0.5] * 3)


class Folder:
    """Colour images of any size: inception crop and flip in training, resize and centre crop in evaluation.

    ``rand_augment`` is torchvision's ``RandAugment(num_ops, magnitude)``, whose magnitudes (0 to 30 of its own
    scale) are not AugReg's.
    """

    channels = 3

    def __init__(
        self, path: Path, *, image_size: int, seed: int, workers: int, rand_augment: tuple[int, int] | None
    ) -> None:
        """Args: as in ``build_source``.

        Raises:
            ValueError: the folders are missing or hold other classes.
        """
        for split in ("train", "val"):
            if not (path / split).is_dir():
                raise ValueError(f"{path} has no folder {split!r}: expected train/<class>/* and val/<class>/*")
        augment = [transforms.RandAugment(*rand_augment)] if rand_augment else []
        self._train = ImageFolder(
            str(path / "train"),
            transforms.Compose(
                [
                    transforms.RandomResizedCrop(image_size, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3)),
                    transforms.RandomHorizontalFlip(),
                    *augment,
                    transforms.ToTensor(),
                    TO_UNIT_RANGE,
                ]
            ),
        )
        self._eval = ImageFolder(
            str(path / "val"),
            transforms.Compose(
                [
                    transforms.Resize(round(image_size * 256 / 224)),
                    transforms.CenterCrop(image_size),
                    transforms.ToTensor(),
                    TO_UNIT_RANGE,
                ]
            ),
        )
        if self._train.classes != self._eval.classes:
            odd = sorted(set(self._train.classes) ^ set(self._eval.classes))
            raise ValueError(f"train and val of {path} hold different classes: {', '.join(odd[:4])}")
        self.classes = len(self._train.classes)
        self.train_samples, self.eval_samples = len(self._train), len(self._eval)
        self._seed = seed
        self._workers = workers

    def train(self, indices: Sequence[np.ndarray], epoch: int) -> Batches:
        """Augmented images: see ``Source.train``."""
        return self._load(_Seeded(self._train, self._seed, epoch), indices)

    def evaluate(self, indices: Sequence[np.ndarray]) -> Batches:
        """Resized and centre-cropped images: see ``Source.evaluate``."""
        return self._load(self._eval, indices)

    def _load(self, dataset: Dataset[Any], indices: Sequence[np.ndarray]) -> Batches:
        batches = [batch.tolist() for batch in indices]
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: the loader would else draw from, and move, the global one.
            generator=torch.Generator().manual_seed(self._seed),
        )
        return iter(loader)


class _Seeded(Dataset[Any]):
    """A dataset whose transforms draw from (seed, epoch, sample) alone, whatever worker runs them."""

    def __init__(self, images: ImageFolder, seed: int, epoch: int) -> None:
        self.images = images
        self.stream = f"{seed}:{epoch}"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        digest = hashlib.sha256(f"{self.stream}:{index}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            return self.images[index]
