"""Unwrap and wrap models around surgery, and the few collectives that keep ranks of one mind.

Nothing is pickled: objects travel as JSON in byte tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prelora.sharding import is_sharded
from prelora.shards import is_shard, local, shard_index

MIX = 0x1E3779B97F4A7C15
DDP_OPTIONS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "skip_all_reduce_unused_params",
    "batched_grad_copy",
)


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside DDP and ``torch.compile`` wrappers, in any order.

    Raises:
        TypeError: a wrapper whose inside cannot be changed in a run.
    """
    compiled = _compiled(model)
    if compiled is not None:
        return unwrap(compiled)
    if isinstance(model, DistributedDataParallel):
        if model.mixed_precision is not None:
            raise TypeError("DistributedDataParallel(mixed_precision=...) hooks itself into the model: use autocast")
        return unwrap(model.module)
    name = type(model).__name__
    if name in ("DataParallel", "FullyShardedDataParallel"):
        raise TypeError(f"{name} is not supported: wrap the model in DistributedDataParallel, or fully_shard it")
    return model


def rewrap(model: nn.Module, *, unreduced: Collection[str] = (), reduced: Collection[str] = ()) -> nn.Module:
    """The same wrappers built anew around the plain model inside, after surgery on it; on all ranks together.

    From now on DDP leaves the parameters named in ``unreduced`` alone, and no longer those in ``reduced``. Old DDP
    wrappers are retired: calling one raises. Compiled code is dropped, so the next call compiles again.
    """
    if any(_compiled(m) is not None or m._compiled_call_impl is not None for m in model.modules()):
        torch._dynamo.reset()
    return _rewrap(model, set(unreduced), set(reduced))


def _rewrap(model: nn.Module, unreduced: set[str], reduced: set[str]) -> nn.Module:
    compiled = _compiled(model)
    if compiled is not None:
        inner = _rewrap(compiled, unreduced, reduced)
        return model if inner is compiled else type(model)(inner, model.dynamo_ctx)
    if not isinstance(model, DistributedDataParallel):
        return model
    inner = _rewrap(model.module, unreduced, reduced)
    prefix = "_orig_mod." if _compiled(inner) is not None else ""
    ignored = model.parameters_to_ignore | {prefix + name for name in unreduced}
    inner._ddp_params_and_buffers_to_ignore = sorted(ignored - {prefix + name for name in reduced})  # type: ignore[assignment]
    wrapped = DistributedDataParallel(inner, **_ddp_options(model))
    for hook, state in model._comm_hooks:
        wrapped.register_comm_hook(state, hook)
    wrapped.training = model.training
    _retire(model)
    return wrapped


def _ddp_options(model: DistributedDataParallel) -> dict[str, Any]:
    """What a DDP was built with, as far as this torch's DDP takes it."""
    known = inspect.signature(DistributedDataParallel).parameters
    options = {name: getattr(model, name) for name in DDP_OPTIONS if name in known}
    # torch 2.14 deprecates broadcast_buffers for forward_sync_buffers.
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options[buffers] = getattr(model, buffers)
    if per_bucket := getattr(model, "bucket_bytes_cap_list", None):
        options["bucket_cap_mb_list"] = [size / 2**20 for size in per_bucket]
    elif not model.bucket_bytes_cap_default:
        options["bucket_cap_mb"] = model.bucket_bytes_cap / 2**20
    return options


def compress_gradients(model: nn.Module) -> None:
    """Have DDP all-reduce gradients in bf16, now and after every switch.

    Raises:
        TypeError: no DistributedDataParallel; FSDP2 takes ``MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)``.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    while (compiled := _compiled(model)) is not None:
        model = compiled
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"compress_gradients({type(model).__name__}): accepted is a DistributedDataParallel")
    model.register_comm_hook(model.process_group, bf16_compress_hook)


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Inside, backward adds to the gradients without communication: for all but the last micro-batch of a step.

    Under FSDP2 each rank holds a whole gradient of every parameter until the reducing backward. A plain model's
    gradients are never reduced.
    """
    compiled = _compiled(model)
    if compiled is not None:
        with no_sync(compiled):
            yield
    elif isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif is_sharded(model):
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
    else:
        yield


def has_gradient_buckets(model: nn.Module) -> bool:
    """Whether DDP holds a second copy of the gradients in its buckets."""
    compiled = _compiled(model)
    if compiled is not None:
        return has_gradient_buckets(compiled)
    return isinstance(model, DistributedDataParallel) and not model.gradient_as_bucket_view


def _compiled(model: nn.Module) -> nn.Module | None:
    """What a ``torch.compile`` wrapper is around; its class is not imported, for that costs a second."""
    return model._modules.get("_orig_mod")


def _retire(model: DistributedDataParallel) -> None:
    """Free the reducer's buckets and hooks, and make a stale reference fail loudly instead of diverging."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("this DistributedDataParallel was replaced at the switch: use pre.model from now on")

    model.forward = refuse  # type: ignore[method-assign]
    model.reducer = None  # type: ignore[assignment]
    model.logger = None


def collective_device() -> torch.device:
    """Where the default process group's backend wants its tensors."""
    backend = dist.get_backend() if dist.is_initialized() else "gloo"
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")


def mean_over_ranks(value: float) -> float:
    """The mean of ``value`` over ranks, in fp64, the same bits on each."""
    if world_size() == 1:
        return float(value)
    total = torch.tensor(value, dtype=torch.float64, device=collective_device())
    dist.all_reduce(total)
    # Rank 0's bits: a reduction need not round alike on every rank.
    dist.broadcast(total, src=0)
    return total.item() / world_size()


def broadcast_json(value: Any) -> Any:
    """Rank 0's ``value`` on every rank, through JSON."""
    if world_size() == 1:
        return json.loads(json.dumps(value))
    device = collective_device()
    data = _encode(value, device) if rank() == 0 else torch.empty(0, dtype=torch.uint8, device=device)
    size = torch.tensor(data.numel(), device=device)
    dist.broadcast(size, src=0)
    if rank() != 0:
        data = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return _decode(data)


def broadcast_tensor(tensor: Tensor) -> Tensor:
    """Rank 0's values on every rank, each of which gives a tensor of the same shape and dtype; on its device."""
    if world_size() == 1:
        return tensor
    sent = tensor.to(collective_device()).contiguous()
    dist.broadcast(sent, src=0)
    return sent.to(tensor.device)


def own_share(shares: Sequence[float]) -> float:
    """This rank's own of what each rank had when it was saved; the mean, if there were more or fewer ranks."""
    return shares[rank()] if len(shares) == world_size() else sum(shares) / len(shares)


def gather_json(value: Any) -> list[Any]:
    """Every rank's ``value`` on every rank, through JSON."""
    if world_size() == 1:
        return [json.loads(json.dumps(value))]
    device = collective_device()
    data = _encode(value, device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([data.numel()], device=device))
    longest = max(int(size.item()) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [_decode(part[: int(size.item())]) for part, size in zip(parts, sizes, strict=True)]


def _encode(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _decode(data: Tensor) -> Any:
    return json.loads(bytes(data.tolist()))


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, int]:
    """A checksum of every parameter's bits, by name, with a single device-to-host copy.

    The name of a sharded parameter is followed by the number of the shard that is here; parameters on the meta device
    have no bits and are left out.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.is_meta]
    names = [f"{name}@{shard_index(parameter)[0]}" if is_shard(parameter) else name for name, parameter in named]
    sums = [_bit_sum(local(parameter)) for _, parameter in named]
    return dict(zip(names, torch.stack(sums).tolist(), strict=True)) if sums else {}


def _bit_sum(tensor: Tensor) -> Tensor:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    data = tensor.contiguous().flatten().view(bits).to(torch.int64)
    # Mixed with the position before it is summed (modulo 2^64): no two changes cancel, not even two sign bits.
    data = data + torch.arange(data.numel(), device=data.device) * MIX
    data = (data ^ (data >> 31)) * MIX
    return (data ^ (data >> 31)).sum()


def check_same_on_all_ranks(model: nn.Module) -> None:
    """Hold that every rank has bit-identical parameters; buffers may be each rank's own.

    Of sharded parameters, those of ranks that hold the same shard; of each, that every rank has one.

    Raises:
        RuntimeError: naming the first that differ and the rank.
    """
    if world_size() == 1:
        return
    prints = gather_json(fingerprint(model))
    names = [{key.partition("@")[0] for key in found} for found in prints]
    known: dict[str, int] = {}
    for other, found in enumerate(prints):
        different = [key for key, value in found.items() if known.setdefault(key, value) != value]
        different += sorted(names[other] ^ names[0])
        if different:
            raise RuntimeError(f"rank {other} and rank 0 differ in {len(different)} parameters, as {different[:2]}")


def check_agreed(what: str, value: Any) -> None:
    """Hold that ``value``, plain data, is the same on every rank; what travels is its hash.

    Raises:
        RuntimeError: naming ``what`` and the first rank that differs from rank 0.
    """
    digests = gather_json(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise RuntimeError(f"{what} of rank {other} differ from those of rank 0")
