"""What tensors hold while code runs on fake ones: bytes now, and at the peak."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ_BACK = (torch.int32, torch.int64)


class LiveBytes(TorchDispatchMode):
    """Counts every fake tensor's storage from its first operator to its release; to be entered inside a fake mode."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}

    def restart_peak(self) -> None:
        """Begin a new peak at what is held now."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage._cdata] = weakref.finalize(storage, self._release, storage._cdata, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _release(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


class RealIntegers(TorchDispatchMode):
    """Lets DDP run on fake tensors: what it reads back of its own bookkeeping is made for real.

    DDP allocates integers (shapes, the order of its buckets), sends them round and reads them. They are the only
    tensors that are made by no other tensor in an integer type, and no more than a few thousand.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        real = all(not isinstance(tensor, FakeTensor) for tensor in tensors) if tensors else False
        if real or (not tensors and kwargs.get("dtype") in READ_BACK):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # whether new weights are zero: they have no numbers, and would be
        return func(*args, **kwargs)
