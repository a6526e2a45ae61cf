"""The one interface of all image sources, and the one place that picks a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

Batches = Iterator[tuple[Tensor, Tensor]]
SourceName = Literal["digits", "folder"]


class Source(Protocol):
    """Labelled images, addressed by index; batches are (images [N, C, H, W] fp32 in [-1, 1], labels [N] int64)."""

    classes: int
    channels: int
    train_samples: int
    eval_samples: int

    def train(self, indices: Sequence[np.ndarray], epoch: int) -> Batches:
        """Augmented training batches; the augmentation is a function of (seed, epoch, sample)."""
        ...

    def evaluate(self, indices: Sequence[np.ndarray]) -> Batches:
        """Evaluation batches, not augmented."""
        ...


def build_source(
    name: SourceName,
    *,
    path: Path | None = None,
    image_size: int,
    seed: int,
    workers: int = 0,
    rand_augment: tuple[int, int] | None = None,
) -> Source:
    """The source by name.

    Args:
        path: of ``folder``: a directory with ``train/<class>/*`` and ``val/<class>/*``.
        image_size: side of the images in pixels.
        seed: of the augmentation.
        workers: loader processes.
        rand_augment: of ``folder``: (operations, magnitude), or None.

    Raises:
        ValueError: an unknown name, or an option that is missing or not wanted.
    """
    if name == "digits":
        from prelora.data.digits import Digits

        for option, value in (("path", path), ("rand_augment", rand_augment)):
            if value is not None:
                raise ValueError(f"data 'digits' takes no {option}, got {value}: only 'folder' does")
        return Digits(image_size=image_size, seed=seed)
    if name == "folder":
        from prelora.data.folder import Folder

        if path is None:
            raise ValueError("data 'folder' needs a path: a directory with train/<class>/* and val/<class>/*")
        return Folder(path, image_size=image_size, seed=seed, workers=workers, rand_augment=rand_augment)
    raise ValueError(f"data {name!r}: accepted are digits, folder")
