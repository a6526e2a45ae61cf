"""1,797 real images of handwritten digits that scikit-learn ships: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from prelora.data.sampler import sample_rng
from prelora.data.source import Batches

EVAL_SHARE = 0.2
NATIVE_SIZE = 8


class Digits:
    """Grey 8×8 digits, enlarged to ``image_size``; training shifts each by up to one native pixel."""

    classes = 10
    channels = 1
    loader = "digits: held in memory"
    quarantined: Mapping[str, str] = MappingProxyType({})

    def __init__(self, *, image_size: int, seed: int) -> None:
        """Args: image_size: side in pixels, a multiple of 8; seed: of the augmentation.

        Raises:
            ValueError: ``image_size`` is no multiple of 8.
        """
        if image_size % NATIVE_SIZE or image_size < NATIVE_SIZE:
            raise ValueError(f"image_size = {image_size}: the digits are 8×8, accepted are multiples of 8")
        pixels, labels = load_digits(return_X_y=True)
        # The split is part of the data set, not of a run: it does not follow the seed.
        train, held_out = train_test_split(
            np.arange(len(labels)), test_size=EVAL_SHARE, random_state=0, stratify=labels
        )
        images = torch.from_numpy(pixels.reshape(-1, 1, NATIVE_SIZE, NATIVE_SIZE)).float() / 8 - 1
        images = F.interpolate(images, size=image_size, mode="bilinear", align_corners=False)
        self._labels = torch.from_numpy(labels).long()
        self._images = images
        self._train, self._eval = np.sort(train), np.sort(held_out)
        self._shift = image_size // NATIVE_SIZE
        self._seed = seed
        self.train_samples, self.eval_samples = len(train), len(held_out)

    def train(self, indices: Sequence[np.ndarray], epoch: int) -> Batches:
        """Shifted images: see ``Source.train``."""
        shift = self._shift
        for batch in indices:
            chosen = self._train[batch]
            padded = F.pad(self._images[chosen], (shift,) * 4, value=-1.0)
            size = self._images.shape[-1]
            images = []
            for image, index in zip(padded, batch, strict=True):
                top, left = sample_rng(self._seed, epoch, int(index)).integers(0, 2 * shift + 1, size=2)
                images.append(image[:, top : top + size, left : left + size])
            yield torch.stack(images), self._labels[chosen]

    def evaluate(self, indices: Sequence[np.ndarray]) -> Batches:
        """The images as they are: see ``Source.evaluate``."""
        for batch in indices:
            chosen = self._eval[batch]
            yield self._images[chosen], self._labels[chosen]
