"""What an epoch's steps cost, as measured: rates, parts of the step, FLOP/s, bytes that went to other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prelora import distributed, sharding


def rates(
    *, images: int, seconds: float, parts: Mapping[str, float], flops_per_image: float, peak: float
) -> dict[str, Any]:
    """Measured rates of an epoch.

    Args:
        images: over all ranks.
        seconds: of the steps.
        parts: seconds by part of the step, as ``StepClock.take`` gives them.
        flops_per_image: of the phase, forward and backward.
        peak: FLOP/s of one large matrix product, over all ranks.
    """
    computing = max(seconds - parts["data"], 0.0)
    flop_per_s = images * flops_per_image / computing if computing else None
    return {
        "seconds": seconds,
        "parts": dict(parts),
        "img_per_s": images / seconds,
        "img_per_s_computing": images / computing if computing else None,
        "flop_per_s": flop_per_s,
        "peak_share": flop_per_s / peak if flop_per_s is not None else None,
    }


def communication(model: nn.Module, *, compressed: bool, accumulate: int) -> dict[str, int]:
    """Bytes of the tensors that go through each kind of collective in an optimizer step; empty for one rank.

    Args:
        model: in its wrappers.
        compressed: DDP's gradients travel in 16 bits.
        accumulate: micro-batches a step.
    """
    if distributed.world_size() == 1:
        return {}
    plain = distributed.unwrap(model)
    if sharding.is_sharded(plain):
        sent = sharding.traffic(plain)
        return {**sent, "all_gather": accumulate * sent["all_gather"]}
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"{type(model).__name__} on {distributed.world_size()} ranks is neither in DDP nor sharded")
    reduced = [
        parameter
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad and name not in model.parameters_to_ignore
    ]
    return {"all_reduce": sum(p.numel() * (2 if compressed else p.element_size()) for p in reduced)}
