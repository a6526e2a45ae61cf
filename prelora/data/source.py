"""The one interface of all image sources, and the one place that picks a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from prelora.data import imagenet

Batches = Iterator[tuple[Tensor, Tensor]]
SourceName = Literal["digits", "idx", "images", "synthetic"]
LoaderName = Literal["auto", "dali", "plain"]
TAKEN_BY = {"path": ("images", "idx"), "rand_augment": ("images",), "loader": ("images",)}
"""Options that not every source takes."""


class Source(Protocol):
    """Labelled images, addressed by index; batches are (images [N, C, H, W] fp32 in [-1, 1], labels [N] int64).

    They may come on the device that the source was built for.
    """

    classes: int
    channels: int
    train_samples: int
    eval_samples: int
    loader: str
    """What makes the batches, and why that: one line."""
    quarantined: Mapping[str, str]
    """File → why it cannot be used, of those that this process has met."""

    def train(self, indices: Sequence[np.ndarray], epoch: int) -> Batches:
        """Augmented training batches; the augmentation is a function of (seed, epoch, sample).

        Of a file that cannot be used the next one stands in, with the draws of the one that it stands in for.

        Raises:
            DataError: more files cannot be used than may be.
        """
        ...

    def evaluate(self, indices: Sequence[np.ndarray]) -> Batches:
        """Evaluation batches, not augmented. Files that cannot be used are left out, and a batch of only such.

        Raises:
            DataError: more files cannot be used than may be.
        """
        ...


def build_source(
    name: SourceName,
    *,
    path: Path | None = None,
    image_size: int,
    seed: int,
    workers: int = 0,
    rand_augment: tuple[int, float] | None = None,
    loader: LoaderName = "auto",
    max_quarantined: int = 32,
    classes: int = imagenet.CLASSES,
    train_samples: int = imagenet.TRAIN_IMAGES,
    eval_samples: int = imagenet.EVAL_IMAGES,
    device: torch.device | None = None,
) -> Source:
    """The source by name.

    Args:
        path: of ``images``: a directory with both splits as folders, tars or TFRecords, see ``prelora.data.storage``;
            of ``idx``: one with MNIST's four files.
        image_size: side of the images in pixels.
        seed: of the augmentation.
        workers: of ``images``: threads of DALI, processes of the plain loader.
        rand_augment: of ``images``: (operations, magnitude) on AugReg's scale, or None.
        loader: of ``images``: "dali", "plain", or "auto", which takes DALI where it runs.
        max_quarantined: of ``images``: files that may be left out before a DataError.
        classes, train_samples, eval_samples: of ``synthetic``: what it pretends to have.
        device: where the batches go; None: the CPU.

    Raises:
        ValueError: an unknown name, or an option that is missing, not wanted, or cannot be served.
        DataError: the images cannot be used.
    """
    device = torch.device("cpu") if device is None else device
    if name == "images":
        from prelora.data.images import Images

        if path is None:
            raise ValueError("data 'images' needs a path: a directory with the splits train and val")
        return Images(
            path,
            image_size=image_size,
            seed=seed,
            workers=workers,
            rand_augment=rand_augment,
            max_quarantined=max_quarantined,
            loader=loader,
            device=device,
        )
    _refuse_unwanted(name, {"path": path, "rand_augment": rand_augment, "loader": None if loader == "auto" else loader})
    if name == "idx":
        from prelora.data.idx import idx

        if path is None:
            raise ValueError("data 'idx' needs a path: a directory with train-images-idx3-ubyte.gz and so on")
        return idx(path, image_size=image_size, seed=seed)
    if name == "digits":
        from prelora.data.digits import digits

        return digits(image_size=image_size, seed=seed)
    if name == "synthetic":
        from prelora.data.synthetic import Synthetic

        return Synthetic(
            image_size=image_size,
            seed=seed,
            classes=classes,
            train_samples=train_samples,
            eval_samples=eval_samples,
            device=device,
        )
    raise ValueError(f"data {name!r}: accepted are digits, idx, images, synthetic")


def _refuse_unwanted(name: str, given: Mapping[str, object]) -> None:
    for option, value in given.items():
        if value is not None and name not in TAKEN_BY[option]:
            takers = TAKEN_BY[option]
            only = " and ".join(map(repr, takers)) + (" do" if len(takers) > 1 else " does")
            raise ValueError(f"data {name!r} takes no {option}, got {value}: only {only}")
