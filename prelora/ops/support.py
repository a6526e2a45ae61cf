"""Why a provider cannot serve an operator's arguments, in a sentence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from prelora import _ext
from prelora.registry import tensors_of

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXTENSION_DTYPES = TRITON_DTYPES


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


def extension_cpu_refusal(*args: Any) -> str | None:
    """``prelora._C`` on CPU tensors."""
    return _ext.reason() or _extension_refusal("cpu", args)


def extension_cuda_refusal(*args: Any) -> str | None:
    """``prelora._C`` on CUDA tensors."""
    if not args and not torch.cuda.is_available():
        return _ext.cuda_reason() or "no CUDA device is available"
    return _ext.cuda_reason() or _extension_refusal("cuda", args)


def grouped_refusal(*args: Any) -> str | None:
    """``lora_merge`` and its like as grouped products on CPU tensors."""
    return extension_cpu_refusal(*args) or _rank_refusal(*args)


def grouped_cuda_refusal(*args: Any) -> str | None:
    """``lora_merge`` and its like as grouped products on CUDA tensors."""
    return extension_cuda_refusal(*args) or _rank_refusal(*args)


def _rank_refusal(*args: Any) -> str | None:
    ranks = args[5] if len(args) > 5 else ()  # after three lists of tensors, slices and rows
    return f"slice {list(ranks).index(0)} has rank 0" if 0 in ranks else None


def _extension_refusal(device: str, args: Sequence[Any]) -> str | None:
    for tensor in tensors_of(args):
        if tensor.device.type != device:
            return f"a tensor is on {tensor.device}, not on {device}"
        if tensor.dtype not in EXTENSION_DTYPES:
            return f"{str(tensor.dtype).removeprefix('torch.')} is not built into prelora._C"
    for arg in args:
        if isinstance(arg, torch.dtype) and arg not in EXTENSION_DTYPES:
            return f"{str(arg).removeprefix('torch.')} is not built into prelora._C"
    return None
