"""MNIST's file format, which Fashion-MNIST, KMNIST and others have too: IDX, gzipped or not, under MNIST's names."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prelora.data.in_memory import InMemory
from prelora.errors import DataError

SPLITS = {"train": "train", "eval": "t10k"}
SHIFT_SHARE = 1 / 14
"""Largest shift of a training image over its side: 2 of 28 pixels."""


def idx(path: Path, *, image_size: int, seed: int) -> InMemory:
    """The images under ``path``: ``train-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte``, … (``.gz``).

    Args:
        path: the folder.
        image_size: the images' own side in pixels.
        seed: of the augmentation.

    Raises:
        ValueError: the images are of another size.
        DataError: a file is missing, or not what its name says.
    """
    train, held_out = (_split(path, prefix) for prefix in SPLITS.values())
    for images, _ in (train, held_out):
        if tuple(images.shape[-2:]) != (image_size, image_size):
            sides = "×".join(map(str, images.shape[-2:]))
            raise ValueError(f"image_size = {image_size}: the images under {path} are {sides}, accepted is their size")
    return InMemory(
        train, held_out, shift=round(SHIFT_SHARE * image_size), seed=seed, loader=f"idx: {path}, held in memory"
    )


def _split(path: Path, prefix: str) -> tuple[Tensor, Tensor]:
    images, labels = _array(path, f"{prefix}-images-idx3-ubyte", 3), _array(path, f"{prefix}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or len(labels) == 0:
        raise DataError(f"{path} holds {len(images)} {prefix} images and {len(labels)} labels: must be as many, not 0")
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()


def _array(path: Path, name: str, dimensions: int) -> np.ndarray:
    """An IDX file: two zeros, the type (8: unsigned bytes), the dimensions, their big-endian sizes, the bytes."""
    found = next((file for file in (path / name, path / f"{name}.gz") if file.exists()), None)
    if found is None:
        raise DataError(f"{path} has neither {name} nor {name}.gz")
    try:
        content = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{found} is not gzip: {error}") from error
    start = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist())
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(shape):
        raise DataError(f"{found} is not an IDX file of unsigned bytes in {dimensions} dimension(s), or is cut off")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()
