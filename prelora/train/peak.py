"""The rate of matrix products that this machine reaches, which a step's rate is held against."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from prelora import distributed
from prelora.precision import DTYPES, Precision

SIDES = {"cpu": 768, "cuda": 8192}
REPEATS = 5


def measure_peak(device: torch.device, precision: Precision) -> float:
    """FLOP/s of one large square matrix product in ``precision``: the best of a few, summed over all ranks at once.

    It is a library's product on data that it can keep close, so that a training step does not reach it. Ranks that
    share a machine measure together, and get their share of it.
    """
    side = SIDES[device.type]
    left, right = (torch.ones(side, side, dtype=DTYPES[precision], device=device) for _ in range(2))
    torch.mm(left, right)
    if distributed.world_size() > 1:
        dist.barrier()
    seconds = min(_seconds(left, right) for _ in range(REPEATS))
    return sum(distributed.gather_json(2 * side**3 / seconds))


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    if left.is_cuda:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.mm(left, right)
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1000
    began = time.perf_counter()
    torch.mm(left, right)
    return time.perf_counter() - began
