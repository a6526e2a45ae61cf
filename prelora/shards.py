"""Tensors that may be spread over ranks (DTensors): what is here, all of it, and one laid out like another.

Every function takes a plain tensor too, which is all here. Shards are rows: FSDP2's ``Shard(0)``, each rank's
chunk of ``ceil(rows / ranks)`` rows and the last ones shorter, perhaps empty.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_shard(value: Any) -> TypeGuard[Any]:
    """Whether ``value`` is a tensor of which this rank holds a part."""
    # Nobody has a DTensor who has not imported it, and importing it costs half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this rank holds, detached: a view."""
    return tensor.detach().to_local() if is_shard(tensor) else tensor.detach()


def full(tensor: Tensor) -> Tensor:
    """All of ``tensor``, detached, on its device; of a shard a collective: call it on every rank alike."""
    return tensor.detach().full_tensor() if is_shard(tensor) else tensor.detach()


def full_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``full`` of many tensors, all of them spread over the same ranks or all plain, in a single all-gather."""
    if not tensors or not is_shard(tensors[0]):
        return [tensor.detach() for tensor in tensors]
    first: Any = tensors[0]
    dim = _shard_dim(first)
    ranks = first.device_mesh.size(dim)
    # As many elements from every rank: those of a full chunk, the last ones' filled up with zeros.
    sizes = [-(-tensor.shape[0] // ranks) * (tensor.numel() // tensor.shape[0]) for tensor in tensors]
    mine = torch.cat([_filled(local(tensor).flatten(), size) for tensor, size in zip(tensors, sizes, strict=True)])
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(gathered, mine, group=first.device_mesh.get_group(dim))
    parts = zip(tensors, torch.stack(gathered).split(sizes, 1), strict=True)
    return [part.flatten()[: tensor.numel()].view(tensor.shape).to(tensor.dtype) for tensor, part in parts]


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Rows [start, stop) of the first dimension that this rank holds."""
    rows = tensor.shape[0]
    if not is_shard(tensor):
        return 0, rows
    dim = _shard_dim(tensor)
    chunk = -(-rows // tensor.device_mesh.size(dim))
    start = min(tensor.device_mesh.get_local_rank(dim) * chunk, rows)
    return start, min(start + chunk, rows)


def rows_here(tensor: Tensor, slices: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of each row slice [start, stop) this rank holds, as [begin, end); perhaps nothing."""
    first, last = local_rows(tensor)
    begins = [min(max(start, first), last) for start, _ in slices]
    return [(begin, max(min(stop, last), begin)) for begin, (_, stop) in zip(begins, slices, strict=True)]


def from_local(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of ``like``'s shape and layout of which this rank holds ``part``; its dtype is the part's."""
    if not is_shard(like):
        return part
    return _wrap(part, like, like.shape)


def laid_out_like(value: Tensor, like: Tensor) -> Tensor:
    """``value`` on ``like``'s device and, of the same shape, spread as ``like`` is; its dtype stays.

    ``value`` may be whole where ``like`` is spread, which takes no communication, or spread where ``like`` is
    whole, which is a collective.
    """
    if is_shard(value):
        same = is_shard(like) and (value.device_mesh, value.placements) == (like.device_mesh, like.placements)
        return value.detach() if same else laid_out_like(full(value), like)
    if not is_shard(like) or value.shape != like.shape:
        return value.detach().to(like.device)
    start, stop = local_rows(like)
    return _wrap(value.detach()[start:stop].to(like.to_local().device), like, value.shape)


def sum_over_shards(values: Tensor, like: Tensor) -> Tensor:
    """``values`` added up over the ranks that together hold ``like``; a plain tensor's are all here."""
    if is_shard(like):
        mesh = like.device_mesh
        summed = values.to(mesh.device_type)
        dist.all_reduce(summed, group=mesh.get_group(_shard_dim(like)))
        return summed
    return values


def is_written_here(tensor: Tensor) -> bool:
    """Whether this rank is the one of those with the same part of ``tensor`` that is to save it."""
    if not is_shard(tensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    mesh, dim = tensor.device_mesh, _shard_dim(tensor)
    return all(mesh.get_local_rank(other) == 0 for other in range(mesh.ndim) if other != dim)


def shard_index(tensor: Any) -> tuple[int, int]:
    """Which of how many parts this rank holds."""
    dim = _shard_dim(tensor)
    return tensor.device_mesh.get_local_rank(dim), tensor.device_mesh.size(dim)


def load(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """``module.load_state_dict``, whether either side is sharded or not."""
    spread = {name: tensor for name, tensor in module.state_dict().items() if is_shard(tensor)}
    module.load_state_dict(
        {name: laid_out_like(value, spread[name]) if name in spread else full(value) for name, value in saved.items()}
    )


def _filled(flat: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(flat, (0, size - flat.numel()))


def _shard_dim(tensor: Any) -> int:
    """The dimension of the mesh over which ``tensor`` is spread by rows; over others it is repeated."""
    found = [dim for dim, placement in enumerate(tensor.placements) if placement.is_shard(0)]
    if len(found) != 1 or not all(p.is_replicate() for dim, p in enumerate(tensor.placements) if dim != found[0]):
        raise TypeError(f"a tensor placed as {tensor.placements}; accepted is Shard(0) over one dimension of a mesh")
    return found[0]


def _wrap(part: Tensor, like: Any, shape: torch.Size) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.contiguous(), like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )
