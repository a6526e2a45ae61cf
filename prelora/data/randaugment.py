"""AugReg's RandAugment on NumPy: what is drawn for a sample, and what it does to an image.

The sixteen operations and their levels are those of the TensorFlow code that AugReg trained with, with its quirks; they
are listed in ``docs/augmentation.md``. Everything random is drawn first, as plain numbers, so that another loader can
apply the very same draws: ``prelora.data.dali_randaugment`` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)
"""Names of the operations; a draw holds an index into them."""
COLUMNS = 7
"""Numbers of one operation in a draw: its index, then up to six arguments, then zeros."""
MAX_MAGNITUDE = 20.0
"""AugReg's strongest; above it the original shifts bits by a negative count."""
FILL = 128
"""What comes in from outside of the image, and what Cutout leaves."""
VALUES = np.arange(256, dtype=np.float32)


def draw(rng: np.random.Generator, num_ops: int, magnitude: float, size: int) -> Floats:
    """What RandAugment does to one image: operations chosen with replacement, each always applied.

    Args:
        rng: the sample's own generator; how many numbers are taken from it depends on ``num_ops`` alone.
        num_ops: operations, one after another.
        magnitude: AugReg's m, 0 to 20; the level of every operation is magnitude / 10, not clipped at 1.
        size: side of the (square) image in pixels.

    Returns:
        float32 [num_ops, 7]: the index into ``OPS``, then the arguments of the operation:

        * Rotate, ShearX, ShearY, TranslateX, TranslateY: a, b, c, d, e, f. The pixel at (x, y) comes from
          (ax + by + c, dx + ey + f), in pixels, with (0, 0) the centre of the first one.
        * Cutout: top, left, height and width of the hole, in pixels.
        * Posterize: a mask of the bits to keep. Solarize: threshold. SolarizeAdd: addend.
        * Color, Sharpness: the factor. Contrast, Brightness: the factor, and the grey value that it is a distance from.

    Raises:
        ValueError: ``magnitude`` is outside of 0 to 20.
    """
    if not 0 <= magnitude <= MAX_MAGNITUDE:
        raise ValueError(f"magnitude = {magnitude}: accepted is 0 to {MAX_MAGNITUDE:g}")
    draws = np.empty((num_ops, COLUMNS), np.float32)
    for place in range(num_ops):
        op = OPS[rng.integers(len(OPS))]
        sign = 1 - 2 * int(rng.integers(2))
        top, left = rng.integers(size, size=2)
        draws[place] = drawn(op, magnitude, size, sign, (int(top), int(left)))
    return draws


def drawn(op: str, magnitude: float, size: int, sign: int = 1, centre: tuple[int, int] = (0, 0)) -> Floats:
    """One operation as ``draw`` gives it, float32 [7].

    Args:
        sign: 1 or -1, of the operations that go either way.
        centre: row and column of Cutout's hole.
    """
    args = _arguments(op, magnitude / 10, size, sign, centre)
    return np.array((OPS.index(op), *args, *[0] * (COLUMNS - 1 - len(args))), np.float32)


def _arguments(op: str, level: float, size: int, sign: int, centre: tuple[int, int]) -> tuple[float, ...]:
    if op == "Rotate":
        return _rotation(math.radians(30 * level * sign), size)
    if op in ("ShearX", "ShearY"):
        shear = 0.3 * level * sign
        return (1, shear, 0, 0, 1, 0) if op == "ShearX" else (1, 0, 0, shear, 1, 0)
    if op in ("TranslateX", "TranslateY"):
        pixels = 100 * level * sign
        return (1, 0, pixels, 0, 1, 0) if op == "TranslateX" else (1, 0, 0, 0, 1, pixels)
    if op == "Cutout":
        half = int(40 * level)
        top, left = (max(0, at - half) for at in centre)
        bottom, right = (min(size, at + half) for at in centre)
        return (top, left, bottom - top, right - left)
    if op == "Posterize":
        # Where asked to clear all 8 bits, TensorFlow clears 7.
        return (256 - 2 ** min(7, 8 - int(4 * level)),)
    if op == "Solarize":
        # TensorFlow made a uint8 of the threshold: 256 is 0, and 384, of magnitude 15, is 128.
        return (int(256 * level) % 256,)
    if op == "SolarizeAdd":
        return (int(110 * level),)
    if op in ("Color", "Sharpness"):
        return (1.8 * level + 0.1,)
    if op == "Brightness":
        return (1.8 * level + 0.1, 0)
    if op == "Contrast":
        # Meant as the mean of the image, the original's is the mean count of its histogram's 256 bins.
        return (1.8 * level + 0.1, min(255, size * size // 256))
    return ()


def _rotation(radians: float, size: int) -> tuple[float, ...]:
    """About the centre of the image."""
    cos, sin, middle = math.cos(radians), math.sin(radians), (size - 1) / 2
    return (cos, -sin, middle - (cos - sin) * middle, sin, cos, middle - (sin + cos) * middle)


def apply(image: Image, draws: Floats) -> Image:
    """The image after all operations of a draw.

    Args:
        image: uint8 [H, W, 3]; left as it is.
        draws: float32 [num_ops, 7], from ``draw``.
    """
    for row in draws:
        image = _APPLY[OPS[int(row[0])]](image, row[1:])
    return image


def _by_table(image: Image, table: npt.NDArray[Any]) -> Image:
    """Each value replaced by its entry, cut off to an integer.

    Args:
        table: [256], or [256, 3] with a column for each channel.
    """
    table = table.astype(np.uint8)
    if table.ndim == 1:
        return table.take(image)
    return np.stack([table[:, channel].take(image[..., channel]) for channel in range(3)], axis=-1)


def blend(degenerate: Floats, image: Floats, factor: np.float32) -> Floats:
    """``degenerate`` at factor 0, the image at 1, beyond it at more; fp32 in [0, 255], not yet cut off to integers."""
    return np.clip(degenerate + factor * (image - degenerate), 0, 255)


def _auto_contrast(image: Image, _: Floats) -> Image:
    # Row by row: many times faster than over both axes at once.
    low = image.min(axis=0).min(axis=0).astype(np.float32)
    span = image.max(axis=0).max(axis=0) - low
    flat = span == 0
    scale = np.float32(255) / np.where(flat, np.float32(255), span)
    table = np.clip(VALUES[:, None] * scale - np.where(flat, 0, low) * scale, 0, 255)
    return _by_table(image, table)


def _equalize(image: Image, _: Floats) -> Image:
    tables = np.empty((256, 3), np.int64)
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        below = np.cumsum(counts) - counts
        tables[:, channel] = np.minimum((below + step // 2) // step, 255) if step else np.arange(256)
    return _by_table(image, tables)


def _invert(image: Image, _: Floats) -> Image:
    return 255 - image


def _posterize(image: Image, args: Floats) -> Image:
    return image & np.uint8(args[0])


def _solarize(image: Image, args: Floats) -> Image:
    return _by_table(image, np.where(args[0] > VALUES, VALUES, 255 - VALUES))


def _solarize_add(image: Image, args: Floats) -> Image:
    return _by_table(image, np.where(VALUES < 128, np.minimum(VALUES + args[0], 255), VALUES))


def _color(image: Image, args: Floats) -> Image:
    # 0.2989 R + 0.587 G + 0.114 B, times 255.5 / 255, cut off: in integers, since floats may miss one by a hair.
    red, green, blue = np.moveaxis(image.astype(np.uint32), -1, 0)
    grey = (2989 * red + 5870 * green + 1140 * blue) * 511 // 5_100_000
    return blend(grey[..., None].astype(np.float32), image.astype(np.float32), args[0]).astype(np.uint8)


def _towards_grey(image: Image, args: Floats) -> Image:
    return _by_table(image, blend(args[1], VALUES, args[0]))


def _sharpness(image: Image, args: Floats) -> Image:
    """Blends with the mean of 3×3 pixels in which the middle one counts five times; the outermost pixels stay."""
    wide = image.astype(np.uint16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    smooth = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]) // 13
    out = image.copy()
    out[1:-1, 1:-1] = blend(smooth.astype(np.float32), image[1:-1, 1:-1].astype(np.float32), args[0])
    return out


def _warp(image: Image, args: Floats) -> Image:
    """The nearest pixel to where each one comes from, or grey from outside of the image."""
    height, width = image.shape[:2]
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    from_x = _nearest(args[0] * x + args[1] * y + args[2])
    from_y = _nearest(args[3] * x + args[4] * y + args[5])
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    at = np.where(inside, from_y * width + from_x, height * width)
    pixels = np.concatenate([image.reshape(-1, 3), np.full((1, 3), FILL, np.uint8)])
    return pixels.take(at, axis=0)


def _nearest(at: Floats) -> npt.NDArray[np.int32]:
    """Halves go away from zero, as in C++."""
    return np.copysign(np.floor(np.abs(at) + np.float32(0.5)), at).astype(np.int32)


def _cutout(image: Image, args: Floats) -> Image:
    top, left, height, width = args[:4].astype(int)
    out = image.copy()
    out[top : top + height, left : left + width] = FILL
    return out


_APPLY: dict[str, Callable[[Image, Floats], Image]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _warp,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _color,
    "Contrast": _towards_grey,
    "Brightness": _towards_grey,
    "Sharpness": _sharpness,
    "ShearX": _warp,
    "ShearY": _warp,
    "TranslateX": _warp,
    "TranslateY": _warp,
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}
