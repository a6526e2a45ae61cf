"""AugReg's RandAugment as operators of a DALI pipeline, on the draws of ``prelora.data.randaugment``.

One definition for images on the CPU and on the GPU. Nothing here is random, and a sample goes through the operations
that it drew and no others, so its image does not depend on what shares its batch.

What an operation makes of one value, or of two, is looked up in a table that the NumPy code filled: the bits are the
same, and on the CPU DALI is several times slower at floats, above all at rounding them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn
from nvidia.dali import math as dali_math
from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

from prelora.data import randaugment
from prelora.data.randaugment import FILL, OPS, VALUES, blend, drawn

BY_VALUE, WARP, CUTOUT, AUTO_CONTRAST, EQUALIZE, COLOR, SHARPNESS = range(7)
KINDS = [
    {
        "Rotate": WARP,
        "ShearX": WARP,
        "ShearY": WARP,
        "TranslateX": WARP,
        "TranslateY": WARP,
        "Cutout": CUTOUT,
        "AutoContrast": AUTO_CONTRAST,
        "Equalize": EQUALIZE,
        "Color": COLOR,
        "Sharpness": SHARPNESS,
    }.get(op, BY_VALUE)
    for op in OPS
]
"""How each operation is carried out; by its value: what a value becomes hangs on nothing else."""
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
        images = _one(images, fn.cast(draws[place, 0], dtype=DALIDataType.UINT8), draws[place, 1:], magnitude, size)
    return images


def _one(images: Any, op: Any, args: Any, magnitude: float, size: int) -> Any:
    """The operation that each sample drew: DALI splits the batch at every ``if`` and merges it after."""
    kind = fn.lookup_table(op, keys=list(range(len(OPS))), values=KINDS, dtype=DALIDataType.UINT8)
    # Operators take arguments from the CPU, arithmetic takes them from where the images are.
    row = op.gpu() if images.device == "gpu" else op
    if kind == BY_VALUE:
        images = _look_up(row * ROW + images, _values(magnitude, size))
    elif kind == WARP:
        images = _warp(images, args)
    elif kind == CUTOUT:
        images = fn.erase(images, anchor=args[0:2], shape=args[2:4], axis_names="HW", fill_value=FILL)
    elif kind == AUTO_CONTRAST:
        images = _auto_contrast(images)
    elif kind == EQUALIZE:
        images = _equalize(images)
    elif kind == COLOR:
        images = _color(images, magnitude)
    else:
        images = _sharpness(images, magnitude, size)
    return images


def _look_up(indices: Any, table: list[int]) -> Any:
    """The uint8 entries at integers of any type."""
    return fn.lookup_table(indices, keys=_keys(len(table)), values=table, dtype=DALIDataType.UINT8)


@functools.cache
def _keys(count: int) -> list[int]:
    return list(range(count))


@functools.cache
def _values(magnitude: float, size: int) -> list[int]:
    """A row for each operation that goes by the value, as NumPy has it; rows of zeros between them."""
    every = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)
    table = np.zeros((len(OPS), 256), np.uint8)
    for op, kind in enumerate(KINDS):
        if kind == BY_VALUE:
            table[op] = randaugment.apply(every, drawn(OPS[op], magnitude, size)[None])[:, 0, 0]
    return _entries(table)


@functools.cache
def _stretched() -> list[int]:
    """By the span of a channel's values, and by how far a value is above the least of them."""
    above, span = np.arange(256), np.arange(256)[:, None]
    table = np.minimum(above * 255 // np.maximum(span, 1), 255)
    table[0] = above  # a channel of one colour stays
    return _entries(table)


@functools.cache
def _blends(op: str, magnitude: float) -> list[int]:
    """By the value that is blended with, and by the image's own."""
    table = blend(VALUES[:, None], VALUES, drawn(op, magnitude, 0)[1])
    if op == "Sharpness":
        table[255] = VALUES  # for the edges, see ``_sharpness``
    return _entries(table)


def _entries(table: npt.NDArray[Any]) -> list[int]:
    return table.astype(np.uint8).ravel().tolist()


def _auto_contrast(images: Any) -> Any:
    low = fn.reductions.min(images, axes=[0, 1], keep_dims=True)
    span = fn.reductions.max(images, axes=[0, 1], keep_dims=True) - low
    # Where there is but one colour, the value itself is looked up, in the row of span 0.
    return _look_up(span * ROW + (images - low * (span != 0)), _stretched())


def _color(images: Any, magnitude: float) -> Any:
    # The conversion rounds: half less, and it cuts off.
    grey = fn.coord_transform(images, M=GREY, T=[-0.5], dtype=DALIDataType.UINT8)
    return _look_up(grey * ROW + images, _blends("Color", magnitude))


def _sharpness(images: Any, magnitude: float, size: int) -> Any:
    sums = _nearest(fn.filter(images, SMOOTH, dtype=DALIDataType.FLOAT))
    smooth = _look_up(sums, [total // 13 for total in range(13 * 255 + 1)])
    # The outermost pixels stay. They are sent to the row of 255, which an inner pixel has only if it is 255 itself.
    edges = [(0, 0, 1, size), (size - 1, 0, 1, size), (0, 0, size, 1), (0, size - 1, size, 1)]
    smooth = fn.erase(
        smooth,
        anchor=[float(at) for edge in edges for at in edge[:2]],
        shape=[float(extent) for edge in edges for extent in edge[2:]],
        axis_names="HW",
        fill_value=255,
    )
    return _look_up(smooth * ROW + images, _blends("Sharpness", magnitude))


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
    equalized = _look_up(
        _nearest(rounded * (spread / 255.0 / divisor) + half), [min(value, 255) for value in range(2 * 256)]
    )
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
