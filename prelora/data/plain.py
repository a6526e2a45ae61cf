"""Images decoded by Pillow and resized by torch in worker processes: the loader that needs no DALI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from prelora.data import randaugment
from prelora.data.augment import View, Views
from prelora.data.encoded import decode
from prelora.data.samples import Encoded, Samples
from prelora.data.source import Batches
from prelora.errors import DataError


class PlainLoader:
    """The batches of one split: see ``DaliLoader``, of whose pixels these differ by the resize's rounding."""

    def __init__(self, samples: Samples, *, image_size: int, workers: int, device: torch.device) -> None:
        """Args: image_size: side in pixels; workers: processes, 0: this one; device: where the images come out."""
        self._image_size = image_size
        self._samples = samples
        self._workers = workers
        self._device = device

    def batches(self, indices: Sequence[np.ndarray], views: Views, *, replace: bool) -> Batches:
        """See ``prelora.data.images.Loader.batches``."""
        loader: DataLoader[Any] = DataLoader(
            _Pixels(self._samples, indices, views, self._image_size, replace),
            batch_size=None,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # A generator of its own: the loader would else draw from, and move, the global one.
            generator=torch.Generator(),
        )
        for pixels, labels, found, error in loader:
            for index, reason in found:  # by a worker, whose quarantine is not this process's
                self._samples.set_aside(index, reason)
            if error is not None:
                raise error
            if len(pixels):
                pixels, labels = (tensor.to(self._device, non_blocking=True) for tensor in (pixels, labels))
                yield to_unit_range(pixels), labels


class _Pixels(Dataset[Any]):
    """Whole batches: pixels uint8 [N, S, S, 3], labels, what was found unusable, and an error to raise."""

    def __init__(
        self, samples: Samples, indices: Sequence[np.ndarray], views: Views, image_size: int, replace: bool
    ) -> None:
        self.samples = samples
        self.image_size = image_size
        self.indices = indices
        self.views = views
        self.replace = replace

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, str]], DataError | None]:
        if number >= len(self):
            raise IndexError(number)
        found: list[tuple[int, str]] = []
        pixels, labels = [], []
        error = None
        try:
            for index in self.indices[number].tolist():
                seen = self._seen(index, found)
                if seen is not None:
                    pixels.append(seen[0])
                    labels.append(seen[1])
        except DataError as raised:
            error = raised  # raised by the process that trains: through a worker's end, its message would be lost
        stacked = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, dtype=torch.uint8)
        return stacked, torch.tensor(labels, dtype=torch.int64), found, error

    def _seen(self, index: int, found: list[tuple[int, str]]) -> tuple[np.ndarray, int] | None:
        def use(encoded: Encoded) -> tuple[np.ndarray, int]:
            view = self.views(index, encoded.height, encoded.width)
            return look(np.asarray(decode(encoded.data)), view, self.image_size), encoded.label

        return self.samples.first_usable(
            index, use, replace=self.replace, report=lambda bad, reason: found.append((bad, reason))
        )


def look(image: np.ndarray, view: View, side: int) -> np.ndarray:
    """The view of an image.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [side, side, 3].
    """
    (top, left), (height, width) = view.start, view.shape
    window = torch.from_numpy(image[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
    resized = F.interpolate(window, size=view.resized.tolist(), mode="bilinear", align_corners=False)
    top, left = view.offset
    square = resized[0].permute(1, 2, 0).numpy()[top : top + side, left : left + side]
    square = np.ascontiguousarray(square[:, ::-1] if view.flip else square)
    return randaugment.apply(square, view.operations)


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [N, S, S, 3] → float32 [N, 3, S, S] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float().contiguous().sub_(127.5).div_(127.5)
