"""Nested dicts and lists of tensors and plain values ↔ JSON, with tensors by name beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from prelora.errors import CheckpointError
from prelora.shards import is_shard, is_written_here, local

TENSOR, SHAPE = "$tensor", "$shape"


def split(value: Any, whole: dict[str, Tensor] | None, parts: dict[str, Tensor], keys: tuple[str, ...] = ()) -> Any:
    """``value`` with every tensor's name left in its place, and the tensors' CPU copies moved out of it.

    Args:
        value: dicts (of string keys), lists, tensors and JSON values.
        whole: takes plain tensors; None: they are only named.
        parts: takes what this rank is to save of tensors that are spread over ranks.
    """
    if isinstance(value, Tensor):
        name = "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)
        if not is_shard(value):
            if whole is not None:
                whole[name] = _copy(value)
            return {TENSOR: name}
        if is_written_here(value):
            parts[name] = _copy(local(value))
        return {TENSOR: name, SHAPE: list(value.shape)}
    if isinstance(value, Mapping):
        return {key: split(item, whole, parts, (*keys, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [split(item, whole, parts, (*keys, str(i))) for i, item in enumerate(value)]
    return value


def join(value: Any, whole: Mapping[str, Tensor], parts: Iterable[dict[str, Tensor]] = ()) -> Any:
    """What ``split`` took apart, tensors spread over ranks made whole again.

    Args:
        parts: what each rank saved, in the order of the shards; emptied.

    Raises:
        CheckpointError: a part is missing.
    """
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return whole[value[TENSOR]]
        if set(value) == {TENSOR, SHAPE}:
            name, shape = value[TENSOR], value[SHAPE]
            # Taken out, so that never more than one tensor is there twice.
            joined = torch.cat([tensors.pop(name) for tensors in parts if name in tensors])
            if list(joined.shape) != shape:
                raise CheckpointError(f"the shards of {name} make {list(joined.shape)}, not {shape}")
            return joined
        return {key: join(item, whole, parts) for key, item in value.items()}
    return [join(item, whole, parts) for item in value] if isinstance(value, list) else value


def _copy(tensor: Tensor) -> Tensor:
    # A copy owns its storage: safetensors refuses tensors that share one.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
