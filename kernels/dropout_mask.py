"""The mask of LoRA's dropout: a function of seed and position alone, so that every kernel draws the same one.

Element (row, col) of x is kept if the upper 24 bits of mix(mix(row ^ seed) ^ col · 0x9E3779B1) are at least
dropout · 2²⁴, where mix is murmur3's 32-bit finaliser; kept elements are multiplied by 1 / (1 - dropout).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def drops(dropout: float, seed: Tensor | None) -> bool:
    """Whether there is anything to drop.

    Raises:
        ValueError: ``dropout`` is no probability, or asks for a seed that is not there.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout {dropout} is not between 0 and 1")
    if dropout > 0 and seed is None:
        raise ValueError(f"dropout {dropout} needs a seed")
    return dropout > 0


def threshold(dropout: float) -> int:
    """What the upper 24 bits of an element's hash must reach for it to be kept."""
    return round(dropout * 2**24)


def kept_scale(dropout: float) -> float:
    """What kept elements are multiplied by; at 1 there are none."""
    return 1 / (1 - dropout) if dropout < 1 else 0.0


@triton.jit
def mix(h):
    """murmur3's 32-bit finaliser of uint32; products wrap."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def keep_mask(seed, rows, cols, threshold):
    """Which elements of a tile are kept: tokens ``rows`` and in-features ``cols``, (BLOCK_M, 1) and (1, BLOCK_K) or
    (1, BLOCK_M) and (BLOCK_K, 1)."""
    mixed = mix(mix(rows.to(tl.uint32) ^ seed.to(tl.uint32)) ^ (cols.to(tl.uint32) * 0x9E3779B1))
    return (mixed >> 8) >= threshold.to(tl.uint32)
