"""Bytes read and written and FLOPs done, by count: the same on every machine, and without one.

Every operator is counted as if it read each input and wrote each output once, which is what a library GEMM or a
pointwise kernel does at best. The Triton kernels say themselves what their grids load and store.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from prelora.registry import NAMESPACE, OPERATORS

ONEDNN_LINEAR = "mkldnn::_linear_pointwise"
GROUPED_GEMM = "prelora_C::grouped_gemm_"
ADAPTER_GRADIENTS = "prelora_C::adapter_gradients"


@dataclass
class Traffic:
    """What was counted."""

    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0
    by_operator: Counter[str] = field(default_factory=Counter)
    """Bytes read and written by each operator."""

    @property
    def bytes_moved(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written

    def add(self, name: str, read: int, written: int) -> None:
        """Count one call."""
        self.bytes_read += read
        self.bytes_written += written
        self.by_operator[name] += read + written


class TrafficCounter(TorchDispatchMode):
    """Counts what runs inside it, on real or on fake tensors.

    Args:
        provider: which provider of prelora's operators is counted, whatever device the tensors are on.
    """

    def __init__(self, provider: str = "cpu") -> None:
        super().__init__()
        self.provider = provider
        self.traffic = Traffic()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            return self._ours(func._schema.name.partition("::")[2], args)
        with self:
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        out = func(*args, **kwargs)
        name = func._schema.name
        if name == ONEDNN_LINEAR:
            self.traffic.flops += 2 * args[0].numel() * args[1].shape[0]
        elif name == GROUPED_GEMM:
            self._grouped(name, *args)
            return out
        elif name == ADAPTER_GRADIENTS:
            self.traffic.flops += _adapter_flops(*args)
        elif func._overloadpacket in flop_registry:
            self.traffic.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if not _moves_nothing(func):
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            overwritten = _overwritten(func, args, kwargs)
            read = [tensor for tensor in inputs if not any(tensor is other for other in overwritten)]
            self.traffic.add(name, sum(map(_bytes, read)), sum(map(_bytes, written)))
        return out

    def _grouped(
        self, name: str, a: list[Tensor], b: list[Tensor], d: list[Tensor], out: list[Tensor], *_: Any
    ) -> None:
        for a_i, b_i, c_i in zip(a, b, out, strict=True):
            # A, B and C of sizes mk, kn and mn: their product is (mnk)².
            self.traffic.flops += 2 * math.isqrt(a_i.numel() * b_i.numel() * c_i.numel())
        self.traffic.add(name, sum(map(_bytes, (*a, *b, *d))), sum(map(_bytes, out)))

    def _ours(self, name: str, args: Sequence[Any]) -> Any:
        if self.provider != "triton":
            with self:
                return OPERATORS[name].implementation(self.provider)(*args)
        # The kernels count their bytes; FLOPs are those of the definition.
        kernels = importlib.import_module("prelora.kernels.traffic")
        inside = TrafficCounter("reference")
        with inside:
            out = OPERATORS[name].reference(*args)
        self.traffic.flops += inside.traffic.flops
        self.traffic.add(f"{NAMESPACE}::{name}", *getattr(kernels, name)(*args))
        return out


def count_traffic(function: Callable[[], Any], provider: str = "cpu") -> Traffic:
    """What one call moves and computes."""
    counter = TrafficCounter(provider)
    with counter:
        function()
    return counter.traffic


def frozen_floor(tokens: int, in_features: int, out_features: int, element_bytes: int) -> int:
    """Bytes that a frozen Linear moves forward and backward, and one more read of x, without which A cannot train."""
    frozen = 2 * (tokens * in_features + tokens * out_features + out_features * in_features)
    return (frozen + tokens * in_features) * element_bytes


def _adapter_flops(dy: Tensor, _: Any, s: Any, ds: Any, lora_a: Tensor, lora_b: Tensor, *rest: Any) -> int:
    """Of dA and dB, and of the S and dS that are not given: A's elements, and B's, once each per token."""
    *_, need_a, need_b = rest
    by_a, by_b = lora_a.numel(), lora_b.numel()
    products = need_a * (by_a + (ds is None) * by_b) + need_b * (by_b + (s is None) * by_a)
    return 2 * dy.shape[0] * products


def _moves_nothing(func: Any) -> bool:
    """Views, and allocations that are written by what follows."""
    name = func._schema.name.partition("::")[2]
    allocates = name.startswith(("empty", "new_empty")) or name in ("detach", "lift_fresh", "_unsafe_view")
    return allocates or (func.is_view and not func._schema.is_mutable)


def _overwritten(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Arguments that are written without being read: ``out=`` and the target of ``copy_``, ``fill_`` and ``zero_``."""
    out = [value for key, value in kwargs.items() if key == "out"]
    name = func._schema.name.partition("::")[2]
    return [*out, *(args[:1] if name in ("copy_", "fill_", "zero_") else ())]


def _bytes(tensor: Tensor) -> int:
    """Of the elements that differ: an expanded dimension is read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride != 0 or size == 0 else 1
    return elements * tensor.element_size()
