"""``lora_dy``: dS_i = s_i · dy_i · B_i and dB_i = s_i · dy_iᵀ · S_i, both from one read of dy.

A program sums dB of BLOCK_N rows over its share of the tokens, and writes what these columns of dy add to each token's
dS. A second launch adds the columns' parts of dS and a third the tokens' parts of dB, each in order. Writing and
reading those parts costs less than the second read of dy, by ``lora_row`` and ``lora_col``, only for small ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from prelora.kernels.lora_col import SUM_BLOCK, col_config, col_tiles, lora_col_sum_kernel, token_split
from prelora.kernels.padding import (
    ROW_ENDS,
    SCALE_SIGNATURE,
    SLICE_SIGNATURE,
    Case,
    Slices,
    cases,
    pack_b,
    padded_rank,
    precision_of,
    slice_bounds,
    slice_scale,
    slice_tile,
    slices_of,
    whole,
)
from prelora.kernels.specimen import Specimen
from torch import Tensor

MAX_BLOCK_RANK = 32
"""Largest padded rank; beyond it the parts of dS always outweigh a read of dy."""
ADD_BLOCK_M = 64
"""Tokens of a program that adds parts of dS."""


@dataclass(frozen=True)
class DyConfig:
    """Launch constants; chosen by arithmetic for sm_80, not yet timed on any GPU."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def dy_config(dtype: torch.dtype, block_rank: int) -> DyConfig:
    """Constants for slices of padded rank ``block_rank``."""
    # Tiles as wide as registers allow, since every tile of columns writes its part of dS in fp32.
    if dtype == torch.float32:
        return DyConfig(16, 128, 8, 3) if block_rank <= 16 else DyConfig(16, 64, 4, 3)
    return DyConfig(32, 512, 8, 2)


def bytes_moved(
    tokens: int, rows: Sequence[int], ranks: Sequence[int], dtype: torch.dtype
) -> tuple[int, int]:  # fmt: skip
    """Bytes between DRAM and the GPU by this kernel, and by ``lora_row`` and ``lora_col``.

    Activations, S, dS and the parts are counted each time that a launch reads or writes them; not what a launch reads
    again from the L2 cache.
    """
    slices = slices_of(rows, ranks, [1.0] * len(rows))
    config = dy_config(dtype, slices.block_rank)
    dy, ds = (tokens * width * dtype.itemsize for width in (sum(slices.rows), slices.rank))
    shares, _ = token_split(tokens, dy_tiles(slices, config), config.block_m)
    parts = [triton.cdiv(n, config.block_n) * tokens * r for n, r in zip(slices.rows, slices.ranks, strict=True)]
    joint = dy + 2 * ds + 2 * 4 * (sum(parts) + shares * slices.size_b)
    col = col_config(dtype, slices.block_rank)
    shares, _ = token_split(tokens, col_tiles(0, slices, 0, col)[1], col.block_m)
    return joint, 2 * dy + 2 * ds + 2 * 4 * shares * slices.size_b


def worth_it(tokens: int, rows: Sequence[int], ranks: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether this kernel moves fewer bytes than ``lora_row`` and ``lora_col``."""
    if tokens == 0 or padded_rank(max(ranks)) > MAX_BLOCK_RANK:
        return False
    joint, separate = bytes_moved(tokens, rows, ranks, dtype)
    return joint < separate


def dy_tiles(slices: Slices, config: DyConfig) -> int:
    """Tiles of all slices' rows; a program for each and each share of the tokens."""
    return sum(triton.cdiv(n, config.block_n) for n in slices.rows)


@triton.jit
def lora_dy_kernel(
    dy_ptr, s_ptr, b_ptr, ds_part_ptr, db_part_ptr,
    tokens, share, stride_dym, stride_dyn, stride_bs, stride_dsp, stride_dbp,
    row_end_0, row_end_1, row_end_2, rank_end_0, rank_end_1, rank_end_2, scale_0, scale_1, scale_2,
    SLICES: tl.constexpr, GRANULE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of a slice's rows, share of the tokens)."""
    index, row_tile = slice_tile(tl.program_id(0), row_end_0, row_end_1, row_end_2, SLICES, BLOCK_N)
    row_start, row_end = slice_bounds(index, row_end_0, row_end_1, row_end_2, SLICES)
    rank_start, rank_end = slice_bounds(index, rank_end_0, rank_end_1, rank_end_2, SLICES)
    scale = slice_scale(index, scale_0, scale_1, scale_2)
    all_ranks = rank_end_2 * GRANULE
    rank = (rank_end - rank_start) * GRANULE
    height = row_end - row_start
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    cols = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    rows = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    # dy's tile is loaded transposed: as such it is an operand of both products, and sm_80's loads are asynchronous.
    dy_ptrs = dy_ptr + (row_start + cols).to(tl.int64)[:, None] * stride_dyn + rows[None, :] * stride_dym
    s_ptrs = s_ptr + rows[:, None] * all_ranks + rank_start * GRANULE + ranks[None, :]
    ds_ptrs = ds_part_ptr + row_tile.to(tl.int64) * stride_dsp + rank_start * GRANULE
    ds_ptrs += rows[None, :] * all_ranks + ranks[:, None]
    b = tl.load(b_ptr + index * stride_bs + ranks[:, None] + cols[None, :] * BLOCK_R)  # (BLOCK_R, BLOCK_N)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    step = tl.cast(BLOCK_M, tl.int64) * stride_dym
    for start in range(first, last, BLOCK_M):
        inside = start + tl.arange(0, BLOCK_M) < last
        dy = tl.load(dy_ptrs, mask=(cols < height)[:, None] & inside[None, :], other=0.0)  # (BLOCK_N, BLOCK_M)
        s = tl.load(s_ptrs, mask=inside[:, None] & (ranks < rank)[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
        ds = tl.dot(b, dy, input_precision=PRECISION) * scale  # (BLOCK_R, BLOCK_M)
        tl.store(ds_ptrs, ds, mask=(ranks < rank)[:, None] & inside[None, :])
        db = tl.dot(dy, s, db, input_precision=PRECISION)
        dy_ptrs += step
        s_ptrs += BLOCK_M * all_ranks
        ds_ptrs += BLOCK_M * all_ranks
    before_1 = row_end_0 * rank_end_0 * GRANULE
    before_2 = before_1 + (row_end_1 - row_end_0) * (rank_end_1 - rank_end_0) * GRANULE
    before = tl.where(index == 0, 0, tl.where(index == 1, before_1, before_2))
    db_ptrs = db_part_ptr + tl.program_id(1).to(tl.int64) * stride_dbp + before + cols[:, None] * rank + ranks[None, :]
    tl.store(db_ptrs, db * scale, mask=(cols < height)[:, None] & (ranks < rank)[None, :])


@triton.jit
def lora_dy_add_kernel(
    ds_part_ptr, ds_ptr, tokens, stride_dsp,
    row_end_0, row_end_1, row_end_2, rank_end_0, rank_end_1, rank_end_2,
    SLICES: tl.constexpr, GRANULE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, slice): dS_i as the sum of its columns' parts, in order."""
    index = tl.program_id(1)
    row_start, row_end = slice_bounds(index, row_end_0, row_end_1, row_end_2, SLICES)
    rank_start, rank_end = slice_bounds(index, rank_end_0, rank_end_1, rank_end_2, SLICES)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = rank_start * GRANULE + tl.arange(0, BLOCK_R)
    offsets = rows.to(tl.int64)[:, None] * (rank_end_2 * GRANULE) + cols[None, :]
    inside = (rows < tokens)[:, None] & (cols < rank_end * GRANULE)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    ptrs = ds_part_ptr + offsets
    for _ in range(tl.cdiv(row_end - row_start, BLOCK_N)):
        acc += tl.load(ptrs, mask=inside, other=0.0)
        ptrs += stride_dsp
    tl.store(ds_ptr + offsets, acc.to(ds_ptr.dtype.element_ty), mask=inside)


def lora_dy(
    dy: Tensor,
    s: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return dS, [M, sum of ranks] in dy's dtype, and every dB_i one after another, flat, in ``dtype``.

    Args:
        dy: [M, out].
        s: [M, sum of ranks] in dy's dtype, as from ``lora_row``.
        lora_b: every slice's B [rows_i, rank_i] in row-major order, one after another.
        rows, ranks, scaling: of each slice; ranks up to ``MAX_BLOCK_RANK``.
    """
    slices = slices_of(rows, ranks, scaling)
    if slices.block_rank > MAX_BLOCK_RANK:
        raise ValueError(f"ranks {slices.ranks}: lora_dy takes up to {MAX_BLOCK_RANK}; use lora_row and lora_col")
    tokens = dy.shape[0]
    ds = dy.new_empty((tokens, slices.rank))
    db = dy.new_empty(slices.size_b, dtype=dtype)
    if tokens == 0:
        return ds, db.zero_()
    config = dy_config(dy.dtype, slices.block_rank)
    shares, share = token_split(tokens, dy_tiles(slices, config), config.block_m)
    tiles = triton.cdiv(max(slices.rows), config.block_n)
    ds_part = dy.new_empty((tiles, whole(tokens * slices.rank, 16)), dtype=torch.float32)
    db_part = dy.new_empty((shares, whole(slices.size_b, 16)), dtype=torch.float32)
    packed = pack_b(lora_b, slices, dy.dtype, config.block_n, scaled=False)
    blocks = {"SLICES": slices.count, "GRANULE": slices.granule, "BLOCK_N": config.block_n}
    with torch.cuda.device_of(dy):
        lora_dy_kernel[(dy_tiles(slices, config), shares)](
            dy, s.contiguous(), packed, ds_part, db_part, tokens, share, *dy.stride(), packed.stride(0),
            ds_part.stride(0), db_part.stride(0), *slices.row_ends(), *slices.rank_ends(), *slices.scales(), **blocks,
            BLOCK_M=config.block_m, BLOCK_R=slices.block_rank, PRECISION=precision_of(dy.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        lora_dy_add_kernel[(triton.cdiv(tokens, ADD_BLOCK_M), slices.count)](
            ds_part, ds, tokens, ds_part.stride(0), *slices.row_ends(), *slices.rank_ends(), **blocks,
            BLOCK_M=ADD_BLOCK_M, BLOCK_R=slices.block_rank, num_warps=4,
        )  # fmt: skip
        lora_col_sum_kernel[(triton.cdiv(slices.size_b, SUM_BLOCK),)](
            db_part, db, db, 0, slices.size_b, db_part.stride(0), shares, BLOCK=SUM_BLOCK, num_warps=4,
        )  # fmt: skip
    return ds, db


def traffic(
    tokens: int, rows: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, out: torch.dtype
) -> int:  # fmt: skip
    """Bytes that the three grids load and store, dB in dtype ``out``."""
    slices = slices_of(rows, ranks, [1.0] * len(rows))
    config = dy_config(dtype, slices.block_rank)
    tiles = dy_tiles(slices, config)
    shares, _ = token_split(tokens, tiles, config.block_m)
    parts = sum(triton.cdiv(n, config.block_n) * tokens * r for n, r in zip(slices.rows, slices.ranks, strict=True))
    factors = shares * tiles * config.block_n * slices.block_rank
    loaded = tokens * sum(slices.rows) + parts + factors
    stored = tokens * slices.rank
    return (loaded + stored) * dtype.itemsize + 2 * 4 * (parts + shares * slices.size_b) + slices.size_b * out.itemsize


def specimens() -> Iterator[Specimen]:
    """Every configuration of ``dy_config``, and the launch that adds dS."""
    for case in cases(dropout=False):
        if case.slices.block_rank <= MAX_BLOCK_RANK:
            yield _specimen(case)
            if case.dtype == torch.bfloat16:
                yield _add_specimen(case)


def _specimen(case: Case) -> Specimen:
    config = dy_config(case.dtype, case.slices.block_rank)
    pointers = dict.fromkeys(("dy_ptr", "s_ptr", "b_ptr"), f"*{case.element}")
    pointers |= {"ds_part_ptr": "*fp32", "db_part_ptr": "*fp32"}
    sizes = ("tokens", "share", "stride_dym", "stride_dyn", "stride_bs", "stride_dsp", "stride_dbp")
    constants = {"SLICES": case.slices.count, "GRANULE": 8, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    constants |= {"BLOCK_R": case.slices.block_rank, "PRECISION": case.precision}
    return Specimen(
        f"lora_dy {case.label} {config.block_m}x{config.block_n}",
        lora_dy_kernel,
        pointers | dict.fromkeys(sizes, "i32") | SLICE_SIGNATURE | SCALE_SIGNATURE
        | dict.fromkeys(constants, "constexpr"),
        constants | {"stride_dyn": 1},
        config.num_warps,
        config.num_stages,
        frozenset(pointers) | {"stride_dym", "stride_bs", "stride_dsp", "stride_dbp", *ROW_ENDS},
        case.tensor_cores,
        # As tf32, dy would need two layouts in shared memory: one for each product.
        asynchronous=case.precision != "tf32",
    )  # fmt: skip


def _add_specimen(case: Case) -> Specimen:
    config = dy_config(case.dtype, case.slices.block_rank)
    pointers = {"ds_part_ptr": "*fp32", "ds_ptr": f"*{case.element}"}
    constants = {"SLICES": case.slices.count, "GRANULE": 8, "BLOCK_M": ADD_BLOCK_M, "BLOCK_N": config.block_n}
    constants |= {"BLOCK_R": case.slices.block_rank}
    return Specimen(
        f"lora_dy_add {case.label}",
        lora_dy_add_kernel,
        pointers | {"tokens": "i32", "stride_dsp": "i32"} | SLICE_SIGNATURE | dict.fromkeys(constants, "constexpr"),
        constants,
        4,
        1,
        frozenset((*pointers, "stride_dsp", *ROW_ENDS)),
        tensor_cores=False,
        asynchronous=False,
    )
