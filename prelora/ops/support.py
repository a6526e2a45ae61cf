"""Why a provider cannot serve an operator's arguments, in a sentence."""

from __future__ import annotations

import os
from typing import Any

import torch

from prelora.registry import first_tensor


def cpu_refusal(*args: Any) -> str | None:
    """The provider of library calls on CPU tensors; without arguments it always can."""
    tensor = first_tensor(args)
    if tensor is not None and tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}, not on the CPU"
    return None


def triton_refusal(*args: Any) -> str | None:
    """The Triton kernels: CUDA tensors, or any in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    tensor = first_tensor(args)
    if tensor is None:
        return None if interpreted or torch.cuda.is_available() else "no CUDA device is available"
    if tensor.dtype == torch.float64:
        return "float64 has no Triton kernel"
    if tensor.device.type != "cuda" and not interpreted:
        return f"the tensors are on {tensor.device}, not on a CUDA device"
    return None
