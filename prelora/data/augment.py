"""Which window of an image is seen, and how it is changed: drawn here once, carried out by either loader."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from prelora.data import randaugment
from prelora.data.sampler import sample_rng

AREA = (0.05, 1.0)
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10
NO_OPERATIONS = np.zeros((0, randaugment.COLUMNS), dtype=np.float32)


class View(NamedTuple):
    """A window, resized, and cut once more, flipped and augmented; pairs are (height, width) in pixels, int32."""

    start: np.ndarray
    """Of the window in the image: top, left."""
    shape: np.ndarray
    """Of the window."""
    resized: np.ndarray
    """What the window is resized to."""
    offset: np.ndarray
    """Of the square that is kept of it: top, left."""
    flip: np.ndarray
    """Of left and right; int32 0 or 1."""
    operations: np.ndarray
    """RandAugment's, float32 [num_ops, P]: see ``randaugment.draw``."""


Views = Callable[[int, int, int], View]
"""What is seen of a sample, by its index and its image's height and width."""


@dataclass(frozen=True)
class TrainViews:
    """An inception crop, a flip, RandAugment: a function of (seed, epoch, index) and the image's size."""

    seed: int
    epoch: int
    image_size: int
    rand_augment: tuple[int, float] | None

    def __call__(self, index: int, height: int, width: int) -> View:
        rng = sample_rng(self.seed, self.epoch, index)
        top, left, rows, columns = inception_crop(rng.random((ATTEMPTS, 4)), height, width)
        flip = rng.random() < 0.5
        count, magnitude = self.rand_augment or (0, 0.0)
        operations = randaugment.draw(rng, count, magnitude, self.image_size)
        side = self.image_size
        return _view((top, left), (rows, columns), (side, side), (0, 0), flip, operations)


@dataclass(frozen=True)
class EvalViews:
    """The centre of the image, whose shorter side is resized to 256/224 of the square that is kept."""

    image_size: int

    def __call__(self, index: int, height: int, width: int) -> View:
        short = round(self.image_size * 256 / 224)
        # The longer side is cut off to an integer, as torchvision does.
        rows, columns = (
            (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        )
        offset = (round((rows - self.image_size) / 2), round((columns - self.image_size) / 2))
        return _view((0, 0), (height, width), (rows, columns), offset, False, NO_OPERATIONS)


def inception_crop(draws: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a window of random area and ratio; the centre if no attempt fits.

    Args:
        draws: [attempts, 4] in [0, 1): the area, the ratio, and where between the edges the window lies.
    """
    low, high = map(math.log, RATIO)
    for area, ratio, down, right in draws.tolist():
        target = height * width * (AREA[0] + area * (AREA[1] - AREA[0]))
        aspect = math.exp(low + ratio * (high - low))
        columns, rows = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            return int(down * (height - rows + 1)), int(right * (width - columns + 1)), rows, columns
    if width / height < RATIO[0]:
        rows, columns = round(width / RATIO[0]), width
    elif width / height > RATIO[1]:
        rows, columns = height, round(height * RATIO[1])
    else:
        rows, columns = height, width
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _view(
    start: tuple[int, int],
    shape: tuple[int, int],
    resized: tuple[int, int],
    offset: tuple[int, int],
    flip: bool,
    operations: np.ndarray,
) -> View:
    return View(
        start=np.array(start, dtype=np.int32),
        shape=np.array(shape, dtype=np.int32),
        resized=np.array(resized, dtype=np.int32),
        offset=np.array(offset, dtype=np.int32),
        flip=np.array(flip, dtype=np.int32),
        operations=operations,
    )
