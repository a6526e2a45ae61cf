"""Matrix products on the CPU by the faster of the libraries that torch has."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

ONEDNN_FROM = 2**23
"""Multiplications of a product from which oneDNN's 30 µs before it begins do not count."""


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·bᵀ + bias of a [m, k] and b [n, k], where b or bᵀ is contiguous.

    In fp32 torch multiplies by MKL, which is slow on processors that are not Intel's. There oneDNN takes 1.1 to 1.3
    times less for a ViT's Linear forward and for its input's gradient (2 cores of an AMD EPYC with AVX-512, 2026); on
    Intel's it takes 0.9 to 1.1 times as long (2 cores of a Xeon with AVX-512). It rounds otherwise: what is to equal an
    ``nn.Linear`` bit for bit must not go through here.
    """
    fits = a.shape[1] == b.shape[1]  # torch.mm has the better error message
    large = a.shape[0] * a.shape[1] * b.shape[0] >= ONEDNN_FROM
    if a.dtype == torch.float32 and fits and large and prefers_onednn():
        return torch.ops.mkldnn._linear_pointwise(a.contiguous(), b, bias, "none", [], "")
    return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())


@functools.cache
def prefers_onednn() -> bool:
    """Whether torch has oneDNN and this is a processor on which it is faster than MKL."""
    return torch.backends.mkldnn.is_available() and not _is_intel()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
