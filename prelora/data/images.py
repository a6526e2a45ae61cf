"""Labelled image files of any size: the source over storage, draws and a loader."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from prelora.data import manifest
from prelora.data.augment import EvalViews, TrainViews, Views
from prelora.data.quarantine import Quarantine
from prelora.data.randaugment import MAX_MAGNITUDE
from prelora.data.samples import Samples
from prelora.data.source import Batches, LoaderName
from prelora.data.storage import open_splits


class Loader(Protocol):
    """Makes the batches of one split."""

    def batches(self, indices: Sequence[np.ndarray], views: Views, *, replace: bool) -> Batches:
        """Images and labels of each batch of indices.

        Args:
            views: what is seen of each sample.
            replace: whether other samples stand in for those that cannot be used; else batches come out smaller.

        Raises:
            DataError: too many files cannot be used.
        """
        ...


class Images:
    """Colour images: inception crop, flip and RandAugment in training, resize and centre crop in evaluation."""

    channels = 3

    def __init__(
        self,
        path: Path,
        *,
        image_size: int,
        seed: int,
        workers: int,
        rand_augment: tuple[int, float] | None,
        max_quarantined: int,
        loader: LoaderName,
        device: torch.device,
    ) -> None:
        """Args: as in ``build_source``.

        Raises:
            ValueError: the splits are missing or hold other classes than each other, the manifest is of other files,
                or the loader cannot serve.
            DataError: an archive is damaged, or the manifest lists too many bad files.
        """
        if rand_augment is not None and not (rand_augment[0] >= 1 and 0 <= rand_augment[1] <= MAX_MAGNITUDE):
            raise ValueError(
                f"rand_augment = {tuple(rand_augment)}: accepted are 1 and more operations of a magnitude from 0 to "
                f"{MAX_MAGNITUDE:g}"
            )
        kind, self.loader = choose_loader(loader, device)
        quarantine = Quarantine(str(path), max_quarantined)
        train, val = _open_samples(path, quarantine)
        self.classes = len(train.storage.classes)
        self.train_samples, self.eval_samples = len(train.storage), len(val.storage)
        self.quarantined = quarantine.reasons
        self._image_size, self._seed, self._rand_augment = image_size, seed, rand_augment
        build = functools.partial(_loader, kind, image_size=image_size, workers=workers, device=device)
        self._train, self._eval = build(train, rand_augment=rand_augment), build(val, rand_augment=None)

    def train(self, indices: Sequence[np.ndarray], epoch: int) -> Batches:
        """Augmented images: see ``Source.train``."""
        views = TrainViews(self._seed, epoch, self._image_size, self._rand_augment)
        return self._train.batches(indices, views, replace=True)

    def evaluate(self, indices: Sequence[np.ndarray]) -> Batches:
        """Resized and centre-cropped images: see ``Source.evaluate``."""
        return self._eval.batches(indices, EvalViews(self._image_size), replace=False)


def choose_loader(loader: LoaderName, device: torch.device) -> tuple[Literal["dali", "plain"], str]:
    """The loader that serves, and a line that says which and why.

    Raises:
        ValueError: DALI was asked for and cannot serve, or the name is unknown.
    """
    if loader not in ("auto", "dali", "plain"):
        raise ValueError(f"data.loader = {loader!r}: accepted are auto, dali, plain")
    if loader == "plain":
        return "plain", "plain: as asked for"
    refusal = _dali_refusal(device)
    if refusal is None:
        from prelora.data.dali import VERSION

        return "dali", f"dali: DALI {VERSION} on {device}"
    if loader == "dali":
        raise ValueError(f"data.loader = 'dali' cannot serve: {refusal}; accepted here are auto and plain")
    return "plain", f"plain: {refusal}"


def _open_samples(path: Path, quarantine: Quarantine) -> list[Samples]:
    """Both splits, known to the manifest if there is one."""
    known = manifest.read(path / manifest.NAME)
    if known is None:
        return [Samples(storage, quarantine, None) for storage in open_splits(path).values()]
    splits = open_splits(path, frozenset(name for files in known.values() for name in files))
    return [
        Samples(storage, quarantine, manifest.facts_of(storage, known.get(split, {}), path / manifest.NAME))
        for split, storage in splits.items()
    ]


def _loader(
    kind: Literal["dali", "plain"],
    samples: Samples,
    *,
    image_size: int,
    rand_augment: tuple[int, float] | None,
    workers: int,
    device: torch.device,
) -> Loader:
    if kind == "dali":
        from prelora.data.dali_loader import DaliLoader

        threads = max(1, workers)
        return DaliLoader(samples, image_size=image_size, rand_augment=rand_augment, threads=threads, device=device)
    from prelora.data.plain import PlainLoader

    return PlainLoader(samples, image_size=image_size, workers=workers, device=device)


def _dali_refusal(device: torch.device) -> str | None:
    try:
        from prelora.data import dali
    except (ImportError, OSError) as error:  # OSError: a library that it is linked to is not there
        return f"DALI cannot be imported ({error}); pip install 'prelora[dali-cu13]' or 'prelora[dali-cu12]'"
    return dali.refusal(device)
