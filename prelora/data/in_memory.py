"""Grey images that fit into memory: training shifts each by a few pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prelora.data.sampler import sample_rng
from prelora.data.source import Batches


class InMemory:
    """Both splits of a set of labelled grey images, as a source."""

    channels = 1
    quarantined: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], *, shift: int, seed: int, loader: str
    ) -> None:
        """Args:
        train, held_out: images [N, 1, H, W], uint8 or fp32 in [-1, 1], and labels [N] int64.
        shift: largest shift of a training image, in pixels.
        seed: of the shifts.
        loader: what makes the batches, in one line.
        """
        self._train, self._held_out = train, held_out
        self._shift, self._seed = shift, seed
        self.loader = loader
        self.classes = int(train[1].max()) + 1
        self.train_samples, self.eval_samples = len(train[1]), len(held_out[1])

    def train(self, indices: Sequence[np.ndarray], epoch: int) -> Batches:
        """Shifted images: see ``Source.train``."""
        images, labels = self._train
        height, width = images.shape[-2:]
        for batch in indices:
            padded = F.pad(_in_range(images[batch]), (self._shift,) * 4, value=-1.0)
            shifted = []
            for image, index in zip(padded, batch, strict=True):
                top, left = sample_rng(self._seed, epoch, int(index)).integers(0, 2 * self._shift + 1, size=2)
                shifted.append(image[:, top : top + height, left : left + width])
            yield torch.stack(shifted), labels[batch]

    def evaluate(self, indices: Sequence[np.ndarray]) -> Batches:
        """The images as they are: see ``Source.evaluate``."""
        images, labels = self._held_out
        for batch in indices:
            yield _in_range(images[batch]), labels[batch]


def _in_range(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
