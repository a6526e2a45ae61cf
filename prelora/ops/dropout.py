"""The mask of LoRA's dropout: a function of seed and position, so that only the seed is kept for backward."""

from __future__ import annotations

import torch
from torch import Tensor

THRESHOLD_BITS = 24


def keep_mask(seed: Tensor, tokens: int, features: int, dropout: float) -> Tensor:
    """Which elements of an input [tokens, features] are kept; bool, on the seed's device.

    Element (row, col) is kept if the upper 24 bits of mix(mix(row ^ seed) ^ col · 0x9E3779B1) are at least
    dropout · 2²⁴, where mix is murmur3's 32-bit finaliser. Every provider computes this same function.

    Args:
        seed: one int64 element, of which the low 32 bits count.
        dropout: probability of dropping an element.
    """
    row = torch.arange(tokens, device=seed.device)[:, None]
    col = torch.arange(features, device=seed.device)[None, :]
    mixed = _mix(_mix(_low(row ^ seed.reshape(()))) ^ _low(col * 0x9E3779B1))
    return _shift(mixed, 32 - THRESHOLD_BITS) >= round(dropout * 2**THRESHOLD_BITS)


def drop(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """x [tokens, features] with dropped elements zero and kept ones times 1 / (1 - dropout)."""
    if seed is None or dropout == 0:
        return x
    tokens, features = x.shape
    return torch.where(keep_mask(seed, tokens, features, dropout), x * (1 / (1 - dropout)), 0)


def _mix(h: Tensor) -> Tensor:
    h = (h ^ _shift(h, 16)) * -2048144789  # 0x85EBCA6B as int32, whose product wraps
    h = (h ^ _shift(h, 13)) * -1028477387  # 0xC2B2AE35
    return h ^ _shift(h, 16)


def _shift(h: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32, whose own shift copies the sign."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)


def _low(value: Tensor) -> Tensor:
    """The low 32 bits of int64, as int32."""
    return ((value + 2**31) % 2**32 - 2**31).to(torch.int32)
