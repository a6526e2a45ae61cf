"""Memory as measured in this process: the peak of an epoch, and live tensors by item."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from prelora import optim, surgery
from prelora.controller import PreLoRA
from prelora.nn.merging import merged_bytes
from prelora.shards import local

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Start a new peak: of the CUDA allocator, or on a CPU of the process's resident memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        with contextlib.suppress(PermissionError):  # a locked-down container: the peak is then the process's
            CLEAR.write_text("5")  # the kernel's way to reset VmHWM


def peak_bytes(device: torch.device) -> int:
    """Peak since ``reset_peak``; where the system cannot reset it, since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        line = next((line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gradient_bytes(optimizer: Optimizer) -> int:
    """Bytes of the gradients that stand now."""
    return sum(local(p.grad).nbytes for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


def memory_by_item(pre: PreLoRA, gradients: int) -> dict[str, int]:
    """Bytes by item; to be called under the steps' autocast.

    Args:
        gradients: as counted after a backward pass, before they were cleared.
    """
    named = dict(pre.base_model.named_parameters())
    return {
        "weights": _bytes([p for name, p in named.items() if not surgery.is_lora(name)]),
        "w_eff": merged_bytes(pre.base_model),
        "lora": _bytes([p for name, p in named.items() if surgery.is_lora(name)]),
        "gradients": gradients,
        "optimizer": sum(optim.state_bytes(pre.optimizer).values()),
        "ema": _bytes(list(pre.ema.module.parameters())) if pre.ema is not None else 0,
    }


def _bytes(tensors: list[Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)
