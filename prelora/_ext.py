"""The compiled extension ``prelora._C``: loaded once, when first asked for; why it cannot be is remembered.

Loading it registers the operators of ``torch.ops.prelora_C``: C++ cores without checks of their own beyond memory
safety, called through ``prelora.ops``.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUILD_NOTE = "_C_build.txt"
"""What ``setup.py`` leaves beside this file where the extension could not be built: why."""

CORE = "prelora_C::grouped_gemm_"
"""An operator that has a kernel for every device that the extension was built for."""


@functools.cache
def reason() -> str | None:
    """Why the extension cannot be used; None: it is loaded."""
    try:
        importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        note = Path(__file__).with_name(BUILD_NOTE)
        if note.is_file():
            return f"prelora._C was not built: {note.read_text(encoding='utf-8').splitlines()[0]}"
        if isinstance(error, ModuleNotFoundError):
            return "prelora._C was not built: `pip install --no-build-isolation` of the source tree builds it"
        return f"prelora._C cannot be loaded: {error}"
    torch.library.register_fake(CORE, lambda *_: None)
    torch.library.register_fake("prelora_C::adapter_gradients", _fake_adapter_gradients)
    return None


def _fake_adapter_gradients(*args: Any) -> list[Tensor]:
    *_, lora_a, lora_b, _, _, _, need_a, need_b = args
    return [torch.empty_like(factor) for factor, needed in ((lora_a, need_a), (lora_b, need_b)) if needed]


@functools.cache
def cuda_reason() -> str | None:
    """Why the extension's CUDA part cannot be used, be there a device or not; None: it is loaded."""
    if reason() is None and not torch._C._dispatch_has_kernel_for_dispatch_key(CORE, "CUDA"):
        return f"prelora._C was built {torch.ops.prelora_C.cuda()}"
    return reason()


def release_memory() -> int:
    """Give back to the system the memory that the CPU's effective weights left for the next ones; how many bytes."""
    return 0 if reason() else torch.ops.prelora_C.release_kept()


def description() -> str:
    """What is loaded: the CPU's instruction set in use, CUDA's version and architectures; or why nothing is."""
    return reason() or f"{torch.ops.prelora_C.isa()} on the CPU, {torch.ops.prelora_C.cuda()}"
