"""Random images that are made once: batches without reading, decoding or copying, to time everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prelora.data.source import Batches


class Synthetic:
    """Every batch of a size is the same one, already on its device."""

    channels = 3
    loader = "synthetic: the same random images in every batch"

    def __init__(
        self, *, image_size: int, seed: int, classes: int, train_samples: int, eval_samples: int, device: torch.device
    ) -> None:
        """Args: classes, train_samples, eval_samples: what it says that it has; the rest as in ``build_source``."""
        self.classes = classes
        self.train_samples, self.eval_samples = train_samples, eval_samples
        self.quarantined: Mapping[str, str] = {}
        self._image_size = image_size
        self._seed = seed
        self._device = device
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def train(self, indices: Sequence[np.ndarray], epoch: int) -> Batches:
        """Uniform noise in [-1, 1], which is that of no particular index or epoch."""
        return self.evaluate(indices)

    def evaluate(self, indices: Sequence[np.ndarray]) -> Batches:
        """The same noise."""
        for batch in indices:
            if len(batch) not in self._made:
                self._made[len(batch)] = self._make(len(batch))
            yield self._made[len(batch)]

    def _make(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(self._seed)
        images = torch.rand(count, self.channels, self._image_size, self._image_size, generator=rng) * 2 - 1
        labels = torch.randint(self.classes, (count,), generator=rng)
        return images.to(self._device), labels.to(self._device)
