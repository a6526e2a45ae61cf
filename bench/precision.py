"""Where and in which precision everything here runs: on the GPU if there is one, in fp32 or under bf16 autocast."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of activations; parameters are fp32 in both."""


def autocast(precision: str) -> AbstractContextManager[None]:
    """Autocast to bf16 for ``"bf16"``, nothing for ``"fp32"``."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(DEVICE.type, PRECISIONS[precision])
