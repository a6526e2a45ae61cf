"""1,797 real images of handwritten digits that scikit-learn ships: nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from prelora.data.in_memory import InMemory

EVAL_SHARE = 0.2
NATIVE_SIZE = 8


def digits(*, image_size: int, seed: int) -> InMemory:
    """Grey 8×8 digits, enlarged to ``image_size``; training shifts each by up to one native pixel.

    Args:
        image_size: side in pixels, a multiple of 8.
        seed: of the augmentation.

    Raises:
        ValueError: ``image_size`` is no multiple of 8.
    """
    if image_size % NATIVE_SIZE or image_size < NATIVE_SIZE:
        raise ValueError(f"image_size = {image_size}: the digits are 8×8, accepted are multiples of 8")
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.reshape(-1, 1, NATIVE_SIZE, NATIVE_SIZE)).float() / 8 - 1
    images = F.interpolate(images, size=image_size, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(classes).long()
    # The split is part of the data set, not of a run: it does not follow the seed.
    splits = train_test_split(np.arange(len(labels)), test_size=EVAL_SHARE, random_state=0, stratify=labels)
    train, held_out = ((images[chosen], labels[chosen]) for chosen in map(np.sort, splits))
    return InMemory(train, held_out, shift=image_size // NATIVE_SIZE, seed=seed, loader="digits: held in memory")
