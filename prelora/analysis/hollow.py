"""Models without their numbers: copies on the meta device, or fake ones that stand on a device without memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def hollow_copy(model: nn.Module, device: str = "meta") -> nn.Module:
    """A deep copy in training mode whose parameters and buffers hold nothing.

    Args:
        device: ``"meta"``; inside a ``FakeTensorMode`` any other, and the copy's tensors are fake ones there.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(model, memo).train()
