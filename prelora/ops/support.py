"""Why a provider cannot serve an operator's arguments, in a sentence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from prelora.registry import tensors_of

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cpu_refusal(*args: Any) -> str | None:
    """The provider of library calls on CPU tensors; without arguments it always can."""
    tensor = next(tensors_of(args), None)
    if tensor is not None and tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}, not on the CPU"
    return None


def triton_refusal(*args: Any) -> str | None:
    """The Triton kernels: CUDA tensors, or any in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not args:
        return None if interpreted or torch.cuda.is_available() else "no CUDA device is available"
    for tensor in tensors_of(args):
        if tensor.is_floating_point() and tensor.dtype not in TRITON_DTYPES:
            return f"{str(tensor.dtype).removeprefix('torch.')} has no Triton kernel"
        if tensor.device.type != "cuda" and not interpreted:
            return f"the tensors are on {tensor.device}, not on a CUDA device"
    return None


def triton_slices_refusal(rows: Sequence[int], ranks: Sequence[int]) -> str | None:
    """More slices or larger ranks than the kernels of the low-rank path take."""
    from prelora.kernels.padding import slices_refusal

    return slices_refusal(rows, ranks)
