"""AugReg's RandAugment as operators of a DALI pipeline, on the draws of ``prelora.data.randaugment``.

One definition for images on the CPU and on the GPU. Nothing here is random, and a sample goes through the operations
that it drew and no others, so its image does not depend on what shares its batch.

What an operation makes of one value, or of two, is looked up in a table that the NumPy code filled: the bits are the
same, and on the CPU DALI is several times slower at floats, above all at rounding them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn
from nvidia.dali import math as dali_math
from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

from prelora.data import randaugment
from prelora.data.randaugment import FILL, OPS, VALUES, blend, drawn

HAIR = 2**-12
"""Pixels added to where a pixel comes from: halves then go up, as in NumPy, whatever float32 made of them."""
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32)
GREY = (np.array([0.2989, 0.587, 0.114]) * 511 / 510).tolist()
ALL = Constant(255, dtype=DALIDataType.UINT8)
ONE = Constant(1, dtype=DALIDataType.UINT8)
ROW = Constant(256, dtype=DALIDataType.UINT16)
"""Entries of one row of a table for two values."""
INTEGERS = 2**23
"""From here to twice as much, the bits of a float32 count up with the integer that it is."""
INTEGERS_BITS = int(np.float32(INTEGERS).view(np.int32))


def apply(images: Any, draws: Any, *, num_ops: int, magnitude: float, size: int) -> Any:
    """The images after all operations of their draws.

    To be called in a pipeline that is defined with ``enable_conditionals=True``.

    Args:
        images: uint8 [size, size, 3] of layout HWC, on the CPU or on the GPU.
        draws: float32 [num_ops, 7] on the CPU, from ``prelora.data.randaugment.draw`` with the same arguments.

    Returns:
        uint8 [size, size, 3], as ``prelora.data.randaugment.apply`` gives, within what ``docs/augmentation.md`` says.
    """
    for place in range(num_ops):
        images = _one(images, draws[place, 0], draws[place, 1:], magnitude, size)
    return images


def _one(images: Any, op: Any, args: Any, magnitude: float, size: int) -> Any:
    """The operation that each sample drew: DALI splits the batch at every ``if`` and merges it after."""
    if _is_one_of(op, "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        images = _warp(images, args)
    elif _is_one_of(op, "Cutout"):
        images = fn.erase(images, anchor=args[0:2], shape=args[2:4], axis_names="HW", fill_value=FILL)
    elif _is_one_of(op, "AutoContrast"):
        images = _auto_contrast(images)
    elif _is_one_of(op, "Equalize"):
        images = _equalize(images)
    elif _is_one_of(op, "Color"):
        images = _color(images, magnitude)
    elif _is_one_of(op, "Sharpness"):
        images = _sharpness(images, magnitude, size)
    elif _is_one_of(op, "Invert"):
        images = images ^ ALL
    elif _is_one_of(op, "Posterize"):
        images = _by_value(images, "Posterize", magnitude, size)
    elif _is_one_of(op, "Solarize"):
        images = _by_value(images, "Solarize", magnitude, size)
    elif _is_one_of(op, "Contrast"):
        images = _by_value(images, "Contrast", magnitude, size)
    elif _is_one_of(op, "Brightness"):
        images = _by_value(images, "Brightness", magnitude, size)
    else:
        images = _by_value(images, "SolarizeAdd", magnitude, size)
    return images


def _is_one_of(op: Any, *names: str) -> Any:
    """A scalar for each sample: whether its operation has one of these names."""
    found = op == OPS.index(names[0])
    for name in names[1:]:
        found = found | (op == OPS.index(name))
    return found


def _look_up(indices: Any, table: npt.NDArray[Any]) -> Any:
    """The uint8 entries at integers of any type."""
    return fn.lookup_table(
        indices, keys=list(range(table.size)), values=table.astype(np.uint8).ravel().tolist(), dtype=DALIDataType.UINT8
    )


def _by_value(images: Any, op: str, magnitude: float, size: int) -> Any:
    every = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)
    return _look_up(images, randaugment.apply(every, drawn(op, magnitude, size)[None])[..., 0])


def _blends(op: str, magnitude: float) -> npt.NDArray[np.float32]:
    """[256, 256]: by the value that is blended with, and by the image's own."""
    return blend(VALUES[:, None], VALUES, drawn(op, magnitude, 0)[1])


def _auto_contrast(images: Any) -> Any:
    low = fn.reductions.min(images, axes=[0, 1], keep_dims=True)
    span = fn.reductions.max(images, axes=[0, 1], keep_dims=True) - low
    above, spans = np.meshgrid(np.arange(256), np.arange(256))
    stretched = np.minimum(above * 255 // np.maximum(spans, 1), 255)
    # A channel of one colour stays: it is left where it is, and row 0 of the table is the identity.
    stretched[0] = np.arange(256)
    return _look_up(span * ROW + (images - low * (span != 0)), stretched)


def _color(images: Any, magnitude: float) -> Any:
    # The conversion rounds: half less, and it cuts off.
    grey = fn.coord_transform(images, M=GREY, T=[-0.5], dtype=DALIDataType.UINT8)
    return _look_up(grey * ROW + images, _blends("Color", magnitude))


def _sharpness(images: Any, magnitude: float, size: int) -> Any:
    sums = _nearest(fn.filter(images, SMOOTH, dtype=DALIDataType.FLOAT))
    smooth = _look_up(sums, np.arange(13 * 255 + 1) // 13)
    # The outermost pixels stay. They are sent to the row of 255, which an inner pixel has only if it is 255 itself.
    edges = [(0, 0, 1, size), (size - 1, 0, 1, size), (0, 0, size, 1), (0, size - 1, size, 1)]
    smooth = fn.erase(
        smooth,
        anchor=[float(at) for edge in edges for at in edge[:2]],
        shape=[float(extent) for edge in edges for extent in edge[2:]],
        axis_names="HW",
        fill_value=255,
    )
    table = _blends("Sharpness", magnitude)
    table[255] = VALUES
    return _look_up(smooth * ROW + images, table)


def _equalize(images: Any) -> Any:
    """PIL's formula, made from OpenCV's.

    With c pixels below a value, the original gives (c + step // 2) // step, step being a 255th of the pixels but those
    of the greatest value. Of the inverted image, DALI's operator gives 255 less the same in real numbers, rounded.
    """
    rounded = fn.equalize(images ^ ALL) ^ ALL
    shape = images.shape(dtype=DALIDataType.FLOAT, device=images.device)
    greatest = images == fn.reductions.max(images, axes=[0, 1], keep_dims=True)
    # A sum takes no booleans.
    spread = shape[0] * shape[1] - fn.reductions.sum(greatest * ONE, axes=[0, 1], keep_dims=True)
    step = dali_math.floor(spread / 255.0)
    divisor = dali_math.max(step, 1.0)
    half = dali_math.floor(step / 2.0) / divisor - 0.5  # the nearest integer, where the original cuts off
    equalized = _look_up(_nearest(rounded * (spread / 255.0 / divisor) + half), np.minimum(np.arange(2 * 256), 255))
    return equalized ^ (equalized ^ images) * (step == 0)


def _nearest(values: Any) -> Any:
    """The nearest integers, int32, of floats below 2**22: many times faster on the CPU than DALI's cast."""
    return fn.reinterpret(values + float(INTEGERS), dtype=DALIDataType.INT32) - INTEGERS_BITS


def _warp(images: Any, args: Any) -> Any:
    # A draw counts from the centre of the first pixel, DALI from its corner.
    centre = fn.transforms.translation(offset=[-0.5, -0.5])
    corner = fn.transforms.translation(offset=[0.5 + HAIR, 0.5 + HAIR])
    matrix = fn.transforms.combine(centre, fn.reshape(args[0:6], shape=[2, 3]), corner)
    return fn.warp_affine(images, matrix=matrix, interp_type=DALIInterpType.INTERP_NN, fill_value=FILL)
