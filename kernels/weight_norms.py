"""``weight_norms``: sums of squares of hundreds of tensors in one pass over their bytes.

A tensor is a number of rows, each contiguous (one row where the whole is); a program sums one span of up to CHUNK
elements of one row, whatever its dtype and alignment, and a second, tiny launch adds each tensor's partial sums. All
orders are fixed and there are no atomics: equal inputs give equal bits. Squares and sums are fp32, so values beyond
1.8e19 overflow to infinity, and below 1e-23 vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from prelora.kernels.autotune import tuned
from prelora.kernels.specimen import Specimen
from prelora.kernels.table import DTYPES, cover, device_table, device_tiles, on_device, triton_dtype
from torch import Tensor


@triton.jit
def span_sum_of_squares(address, length, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Of ``length`` elements at ``address``: those up to the first multiple of 16 bytes apart, then BLOCK at a time.

    Whole blocks are loaded without a mask: one that ends at an arbitrary element would break the 16-byte accesses.
    """
    ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
    head = tl.minimum((16 - (address % 16).to(tl.int32)) % 16 // ITEM, length)
    ptr = address.to(tl.pointer_type(DTYPE))
    offs_head = tl.arange(0, 8)
    x_head = tl.load(ptr + offs_head, mask=offs_head < head, other=0.0).to(tl.float32)  # (8,)

    ptr = tl.multiple_of(ptr + head, 16)
    body = length - head
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(body // BLOCK):
        x = tl.load(ptr + offs, eviction_policy="evict_first").to(tl.float32)  # (BLOCK,)
        acc += x * x
        ptr += BLOCK
    x = tl.load(ptr + offs, mask=offs < body % BLOCK, other=0.0).to(tl.float32)
    return tl.sum(acc + x * x) + tl.sum(x_head * x_head)


@triton.jit
def sums_of_squares_kernel(
    table_ptr,  # [tensors, 5]: address, columns, bytes from row to row, dtype, spans of a row
    tile_ptr,  # [spans, 2]
    partial_ptr,  # [spans]
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares of one span, written at the span's place."""
    pid = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(tile_ptr + 2 * pid) * 5
    tile = tl.load(tile_ptr + 2 * pid + 1).to(tl.int64)
    columns = tl.load(row_ptr + 1)
    dtype = tl.load(row_ptr + 3)
    spans = tl.load(row_ptr + 4)
    first = tile % spans * CHUNK
    address = tl.load(row_ptr) + tile // spans * tl.load(row_ptr + 2)
    length = tl.minimum(columns - first, CHUNK).to(tl.int32)
    if dtype == 0:
        total = span_sum_of_squares(address + 4 * first, length, tl.float32, BLOCK)
    elif dtype == 1:
        total = span_sum_of_squares(address + 2 * first, length, tl.bfloat16, BLOCK)
    else:
        total = span_sum_of_squares(address + 2 * first, length, tl.float16, BLOCK)
    tl.store(partial_ptr + pid, total)


@triton.jit
def add_partials_kernel(
    bounds_ptr,  # [tensors, 2]: first partial sum and one past the last
    partial_ptr,  # [spans]
    out_ptr,  # [tensors]
    BLOCK: tl.constexpr,
):
    """The sum of one tensor's partial sums."""
    pid = tl.program_id(0)
    first = tl.load(bounds_ptr + 2 * pid)
    count = (tl.load(bounds_ptr + 2 * pid + 1) - first).to(tl.int32)
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        acc += tl.load(partial_ptr + first + start + offs, mask=offs < count - start, other=0.0)  # (BLOCK,)
    tl.store(out_ptr + pid, tl.sum(acc))


@dataclass(frozen=True)
class LaunchConfig:
    """Elements of a span and of a block, and warps."""

    chunk: int = 32768
    block: int = 4096
    num_warps: int = 4


CANDIDATES = (LaunchConfig(), LaunchConfig(chunk=65536), LaunchConfig(block=8192, num_warps=8))
"""Six programs of the first fit an SM, each with 16 KiB of fp32 on its way; the smallest ViT-S has 650 spans."""

ADDED_AT_ONCE = 1024
"""Partial sums that a program of the second stage adds at once."""

NARROW = 64
"""A program for each row of fewer columns would cost more than a copy of the tensor."""

DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


def rows_of(tensor: Tensor) -> Tensor:
    """The elements of ``tensor`` in any order, [rows, columns], each row contiguous: a view wherever one will do."""
    if tensor.is_contiguous():
        return tensor.view(1, -1)
    by_stride = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    rows = by_stride.reshape(-1, by_stride.shape[-1])
    return rows if rows.stride(1) == 1 and rows.shape[1] >= NARROW else tensor.contiguous().view(1, -1)


def spans(columns: int, config: LaunchConfig = CANDIDATES[0]) -> int:
    """How many programs a row takes."""
    return cover(columns, config.chunk)


def sums_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares of each tensor.

    Args:
        tensors: fp32, bf16 and fp16, of any shapes and strides, on one device; an empty one sums to 0. One that is not
            made of contiguous rows is copied first.

    Returns:
        fp32 [number of tensors]; relative error about 1e-7, however many elements there are.
    """
    if not tensors:
        return torch.empty(0)
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        raise ValueError(f"tensors on one device, not on {sorted({str(tensor.device) for tensor in tensors})}")
    views = [rows_of(tensor.detach()) for tensor in tensors]
    sums = torch.empty(len(tensors), dtype=torch.float32, device=device)
    size = sum(view.nbytes for view in views).bit_length()
    config = tuned("sums_of_squares", device, (size,), CANDIDATES, lambda config: _prepared(views, sums, config))
    _prepared(views, sums, config)()
    return sums


def _prepared(views: list[Tensor], sums: Tensor, config: LaunchConfig) -> Callable[[], None]:
    """Both launches, with their tables and partial sums in place."""
    table: list[tuple[int, ...]] = []
    bounds = [0]
    for view in views:
        triton_dtype(view.dtype)
        rows, columns = view.shape
        row_bytes = view.stride(0) * view.element_size()
        table.append((view.data_ptr(), columns, row_bytes, DTYPE_CODES[view.dtype], spans(columns, config)))
        bounds.append(bounds[-1] + rows * spans(columns, config))
    counts = [end - start for start, end in pairwise(bounds)]
    partial = torch.empty(bounds[-1], dtype=torch.float32, device=sums.device)
    tables = device_table(table, sums.device), device_tiles(counts, sums.device)
    bounds_table = device_table(list(pairwise(bounds)), sums.device)

    def launch() -> None:
        with on_device(sums.device):
            if len(partial):
                sums_of_squares_kernel[(len(partial),)](
                    *tables, partial, config.chunk, config.block, num_warps=config.num_warps
                )
            add_partials_kernel[(len(views),)](bounds_table, partial, sums, BLOCK=ADDED_AT_ONCE)

    return launch


def weight_norms(tensors: list[Tensor], squared: bool) -> Tensor:
    """Return the Frobenius norm of each tensor, or its square; as ``sums_of_squares``."""
    sums = sums_of_squares(tensors)
    return sums if squared else sums.sqrt()


def traffic(tensors: list[Tensor]) -> int:
    """Bytes that the programs of ``sums_of_squares`` load and store, without their tables; ``meta`` tensors will do."""
    total = 0
    for tensor in tensors:
        rows, columns = rows_of(tensor).shape
        total += tensor.numel() * tensor.element_size() + 2 * 4 * rows * spans(columns) + 4
    return total


def specimens() -> Iterator[Specimen]:
    """Both stages; the first in every configuration that tuning may choose."""
    pointers = {"table_ptr": "*i64", "tile_ptr": "*i32", "partial_ptr": "*fp32"}
    for config in CANDIDATES:
        yield Specimen(
            label=f"sums_of_squares {config.chunk} by {config.block} of {config.num_warps} warps",
            kernel=sums_of_squares_kernel,
            signature={**pointers, "CHUNK": "constexpr", "BLOCK": "constexpr"},
            constants={"CHUNK": config.chunk, "BLOCK": config.block},
            num_warps=config.num_warps,
            num_stages=3,
            divisible_by_16=frozenset(pointers),
            tensor_cores=False,
            asynchronous=False,
            max_registers=80,
        )
    yield Specimen(
        label=f"add_partials {ADDED_AT_ONCE}",
        kernel=add_partials_kernel,
        signature={"bounds_ptr": "*i64", "partial_ptr": "*fp32", "out_ptr": "*fp32", "BLOCK": "constexpr"},
        constants={"BLOCK": ADDED_AT_ONCE},
        num_warps=4,
        num_stages=3,
        tensor_cores=False,
        asynchronous=False,
    )
