"""How long a step computes, by a roofline over each of its operators, on a GPU that none of it has run on.

An operator takes as long as its FLOPs at the reachable rate of matrix products or its bytes at the reachable memory
bandwidth, whichever is longer; operators follow one another. The step is the real one, run on fake tensors, eager:
what a compiler would fuse is counted as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from prelora.analysis.activations import DEVICE, fake_batch, step_loss
from prelora.analysis.hardware import Gpu
from prelora.analysis.hollow import hollow_copy
from prelora.analysis.phases import PhaseModel
from prelora.analysis.traffic import TrafficCounter
from prelora.nn.deferred_grads import lora_grads_from_weights
from prelora.registry import OPERATORS, tensors_of

_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: sdpa_flop_count,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: sdpa_backward_flop_count,
}
"""FLOPs of attention as fake tensors on a CPU take it, which torch's table lacks; backward computes scores again."""

Call = tuple[int, int]
"""FLOPs and bytes of one operator's call."""
FP32 = 4


@dataclass(frozen=True)
class Reach:
    """Shares of a data sheet's peaks that are reached.

    Raises:
        ValueError: a share outside (0, 1].
    """

    compute: float = 0.6
    """Of the rate of matrix products: large GEMMs with what surrounds them."""
    memory: float = 0.8
    """Of the memory bandwidth."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value <= 1:
                raise ValueError(f"{name} = {value}: a share of the peak, accepted in (0, 1]")


@dataclass(frozen=True)
class StepWork:
    """The operators of one phase's step, by part."""

    forward: list[Call]
    backward: list[Call]
    update: list[Call]
    """Once per optimizer step: deferred gradients, clipping and the optimizer."""


class CallCounter(TrafficCounter):
    """Notes every operator's call apart."""

    def __init__(self) -> None:
        super().__init__("reference")
        self.calls: list[Call] = []
        self._noted = (0, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "prim":  # a question to a fake tensor, as where it is
            return func(*args, **(kwargs or {}))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _ATTENTION:
            self.traffic.flops += _ATTENTION[func](*(tensor.shape for tensor in tensors_of(args[:4])))
        counted = (self.traffic.flops, self.traffic.bytes_moved)
        # An operator made of others has noted them by now, and adds nothing of its own.
        if counted != self._noted:
            self.calls.append((counted[0] - self._noted[0], counted[1] - self._noted[1]))
            self._noted = counted
        return out

    def _ours(self, name: str, args: Sequence[Any]) -> Any:
        if not name.startswith("lora_merge"):
            return super()._ours(name, args)
        # The grouped kernels read and write each weight once; the reference takes several passes over it.
        with FlopCounterMode(display=False) as counter:
            out = OPERATORS[name].reference(*args)
        self.traffic.flops += counter.get_total_flops()
        self.traffic.add(name, sum(tensor.nbytes for tensor in tensors_of(args)), sum(o.nbytes for o in out))
        return out

    def take(self) -> list[Call]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


def count_step(
    phase: PhaseModel, image: Sequence[int], batch: int, precision: str, state_bytes: float, *, clips: bool
) -> StepWork:
    """The operators of one step with one micro-batch.

    Args:
        image: [channels, height, width].
        state_bytes: of the optimizer, per trained parameter.
        clips: whether gradients are clipped by their norm.
    """
    with FakeTensorMode():
        model = hollow_copy(phase.model, DEVICE)
        with CallCounter() as counter:
            loss = step_loss(model, fake_batch(batch, image), precision)
            forward = counter.take()
            loss.backward()
            backward = counter.take()
            lora_grads_from_weights(model)
            deferred = counter.take()
    read_and_write = 2 * FP32 + FP32 + 2 * state_bytes + (3 * FP32 if clips else 0)
    optimizer = (0, round(phase.trainable * read_and_write))
    return StepWork(forward, backward, [*deferred, optimizer])


def seconds(calls: Sequence[Call], gpu: Gpu, precision: str, reach: Reach) -> float:
    """Of operators that follow one another."""
    rate, bandwidth = gpu.peak[precision] * reach.compute, gpu.bandwidth * reach.memory
    return sum(max(flops / rate, moved / bandwidth) for flops, moved in calls)
