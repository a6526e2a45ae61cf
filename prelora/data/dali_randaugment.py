"""AugReg's RandAugment as operators of a DALI pipeline, on the draws of ``prelora.data.randaugment``.

One definition for images on the CPU and on the GPU. Nothing here is random, and a sample goes through the operations
that it drew and no others, so its image does not depend on what shares its batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn
from nvidia.dali import math as dali_math
from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

from prelora.data.randaugment import FILL, OPS

HAIR = 2**-12
"""Pixels added to where a pixel comes from: halves then go up, as in NumPy, whatever float32 made of them."""
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32)
GREY = (np.array([0.2989, 0.587, 0.114]) * 511 / 510).tolist()
ALL = Constant(255, dtype=DALIDataType.UINT8)
ONE = Constant(1, dtype=DALIDataType.UINT8)


def apply(images: Any, draws: Any, num_ops: int) -> Any:
    """The images after all operations of their draws.

    To be called in a pipeline that is defined with ``enable_conditionals=True``.

    Args:
        images: uint8 [H, W, 3] of layout HWC, at least 3×3, on the CPU or on the GPU.
        draws: float32 [num_ops, 7] on the CPU, from ``prelora.data.randaugment.draw``.
        num_ops: how many operations there are in each draw.

    Returns:
        uint8 [H, W, 3], as ``prelora.data.randaugment.apply`` gives, within what ``docs/augmentation.md`` says.
    """
    for place in range(num_ops):
        images = _one(images, draws[place, 0], draws[place, 1:])
    return images


def _one(images: Any, op: Any, args: Any) -> Any:
    """The operation that each sample drew: DALI splits the batch at every ``if`` and merges it after."""
    # Operators take arguments from the CPU, arithmetic takes them from where the images are.
    values = args.gpu() if images.device == "gpu" else args
    if _is_one_of(op, "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        images = _warp(images, args)
    elif _is_one_of(op, "Contrast", "Brightness"):
        images = _blend(values[1], images, values[0])
    elif _is_one_of(op, "Invert", "Solarize"):
        images = images ^ (images >= values[0]) * ALL
    elif _is_one_of(op, "AutoContrast"):
        images = _auto_contrast(images)
    elif _is_one_of(op, "Equalize"):
        images = _equalize(images)
    elif _is_one_of(op, "Posterize"):
        images = images & fn.cast(values[0], dtype=DALIDataType.UINT8)
    elif _is_one_of(op, "Color"):
        images = _blend(dali_math.floor(fn.coord_transform(images, M=GREY)), images, values[0])
    elif _is_one_of(op, "Sharpness"):
        images = _sharpness(images, values[0])
    elif _is_one_of(op, "Cutout"):
        images = fn.erase(images, anchor=args[0:2], shape=args[2:4], axis_names="HW", fill_value=FILL)
    else:
        images = fn.cast(images + (images < 128) * values[0], dtype=DALIDataType.UINT8)
    return images


def _is_one_of(op: Any, *names: str) -> Any:
    """A scalar for each sample: whether its operation has one of these names."""
    found = op == OPS.index(names[0])
    for name in names[1:]:
        found = found | (op == OPS.index(name))
    return found


def _blend(degenerate: Any, images: Any, factor: Any) -> Any:
    """``degenerate`` at factor 0, the image at 1, beyond it at more; cut off to integers."""
    # The cast saturates, but rounds: nothing is left for it to round.
    return fn.cast(dali_math.floor(degenerate + factor * (images - degenerate)), dtype=DALIDataType.UINT8)


def _auto_contrast(images: Any) -> Any:
    low = fn.reductions.min(images, axes=[0, 1], keep_dims=True)
    span = fn.reductions.max(images, axes=[0, 1], keep_dims=True) - low
    scale = 255.0 / (span + (span == 0) * ALL)
    return fn.cast(dali_math.floor(images * scale - (span != 0) * low * scale), dtype=DALIDataType.UINT8)


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
    equalized = dali_math.floor(rounded * (spread / 255.0 / divisor) + dali_math.floor(step / 2.0) / divisor)
    return fn.cast((step > 0) * dali_math.min(equalized, 255.0) + (step == 0) * images, dtype=DALIDataType.UINT8)


def _sharpness(images: Any, factor: Any) -> Any:
    """Blends with the smoothed image; the outermost pixels stay."""
    smooth = dali_math.floor(fn.filter(images, SMOOTH, dtype=DALIDataType.FLOAT) / 13.0)
    inner = _blend(smooth[1:-1, 1:-1], images[1:-1, 1:-1], factor)
    rows = fn.cat(images[1:-1, 0:1], inner, images[1:-1, -1:], axis=1)
    return fn.cat(images[0:1], rows, images[-1:], axis=0)


def _warp(images: Any, args: Any) -> Any:
    # A draw counts from the centre of the first pixel, DALI from its corner.
    centre = fn.transforms.translation(offset=[-0.5, -0.5])
    corner = fn.transforms.translation(offset=[0.5 + HAIR, 0.5 + HAIR])
    matrix = fn.transforms.combine(centre, fn.reshape(args[0:6], shape=[2, 3]), corner)
    return fn.warp_affine(images, matrix=matrix, interp_type=DALIInterpType.INTERP_NN, fill_value=FILL)
