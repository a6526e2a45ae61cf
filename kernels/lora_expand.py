"""``lora_expand``: y_i += s_i · h_i · B_iᵀ in place, over the result of a library's GEMM.

One read and one write of y, [M, out]; h and B come from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from prelora.kernels.padding import (
    ROW_ENDS,
    SLICE_SIGNATURE,
    Case,
    cases,
    pack_b,
    precision_of,
    slice_bounds,
    slice_tile,
    slices_of,
)
from prelora.kernels.specimen import Specimen
from torch import Tensor


@dataclass(frozen=True)
class ExpandConfig:
    """Launch constants; chosen by arithmetic for sm_80, not yet timed on any GPU."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def expand_config(dtype: torch.dtype, block_rank: int) -> ExpandConfig:
    """Constants for slices of padded rank ``block_rank``."""
    # y's tile waits in registers beside the sums, and several programs on an SM overlap one's loads with another's
    # stores: 64 sums a thread, fewer where the factors' own tiles are large or there are no tensor cores.
    if dtype == torch.float32:
        return ExpandConfig(32, 64, 16, 8, 3)
    return ExpandConfig(64, 128, min(block_rank, 64), 4 if block_rank <= 32 else 8, 3)


@triton.jit
def lora_expand_kernel(
    y_ptr, h_ptr, b_ptr, tokens, stride_ym, stride_yn, stride_bs,
    row_end_0, row_end_1, row_end_2, rank_end_0, rank_end_1, rank_end_2, row_tiles,
    SLICES: tl.constexpr, GRANULE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, tile of a slice's rows); tiles of the same tokens follow each other, and share h."""
    tile = tl.program_id(0) % row_tiles
    index, row_tile = slice_tile(tile, row_end_0, row_end_1, row_end_2, SLICES, BLOCK_N)
    row_start, row_end = slice_bounds(index, row_end_0, row_end_1, row_end_2, SLICES)
    rank_start, rank_end = slice_bounds(index, rank_end_0, rank_end_1, rank_end_2, SLICES)
    rows = tl.program_id(0) // row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    y_ptr += tl.cast(row_start, tl.int64) * stride_yn
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * stride_ym + cols.to(tl.int64)[None, :] * stride_yn
    inside = (rows < tokens)[:, None] & (cols < row_end - row_start)[None, :]
    y = tl.load(y_ptrs, mask=inside, other=0.0)  # (BLOCK_M, BLOCK_N)
    ranks = tl.arange(0, BLOCK_K)
    rank = (rank_end - rank_start) * GRANULE
    h_ptr += rank_start * GRANULE
    h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * (rank_end_2 * GRANULE) + ranks[None, :]
    b_ptrs = b_ptr + index * stride_bs + ranks[:, None] + cols[None, :] * BLOCK_R
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, BLOCK_R, BLOCK_K):
        h = tl.load(h_ptrs + start, mask=(rows < tokens)[:, None] & (start + ranks < rank)[None, :], other=0.0)
        acc = tl.dot(h, tl.load(b_ptrs + start), acc, input_precision=PRECISION)
    tl.store(y_ptrs, (acc + y.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=inside)


def expand_tiles(tokens: int, rows: Sequence[int], config: ExpandConfig) -> tuple[int, int]:
    """Tiles of tokens, and of all slices' rows; a program for each pair."""
    return triton.cdiv(tokens, config.block_m), sum(triton.cdiv(n, config.block_n) for n in rows)


def lora_expand(
    y: Tensor,
    h: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
) -> None:
    """Add s_i · h_i · B_iᵀ to y's columns of each slice i, in place.

    Args:
        y: [M, out].
        h: [M, sum of ranks], as S from ``lora_row``.
        lora_b: every slice's B [rows_i, rank_i] in row-major order, one after another.
        rows, ranks, scaling: of each slice.
    """
    slices = slices_of(rows, ranks, scaling)
    if y.shape[0] == 0:
        return
    config = expand_config(y.dtype, slices.block_rank)
    token_tiles, row_tiles = expand_tiles(y.shape[0], slices.rows, config)
    packed = pack_b(lora_b, slices, y.dtype, config.block_n, scaled=True)
    with torch.cuda.device_of(y):
        lora_expand_kernel[(token_tiles * row_tiles,)](
            y, h.contiguous(), packed, y.shape[0], *y.stride(), packed.stride(0), *slices.row_ends(),
            *slices.rank_ends(), row_tiles, SLICES=slices.count, GRANULE=slices.granule,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=slices.block_rank,
            PRECISION=precision_of(y.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def traffic(tokens: int, rows: Sequence[int], ranks: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that the grid loads and stores."""
    slices = slices_of(rows, ranks, [1.0] * len(rows))
    config = expand_config(dtype, slices.block_rank)
    token_tiles, row_tiles = expand_tiles(tokens, slices.rows, config)
    h = sum(triton.cdiv(n, config.block_n) * r for n, r in zip(slices.rows, slices.ranks, strict=True))
    factors = row_tiles * config.block_n * slices.block_rank
    return (tokens * (2 * sum(slices.rows) + h) + token_tiles * factors) * dtype.itemsize


def specimens() -> Iterator[Specimen]:
    """Every configuration of ``expand_config``."""
    return map(_specimen, cases(dropout=False))


def _specimen(case: Case) -> Specimen:
    config = expand_config(case.dtype, case.slices.block_rank)
    pointers = dict.fromkeys(("y_ptr", "h_ptr", "b_ptr"), f"*{case.element}")
    sizes = ("tokens", "stride_ym", "stride_yn", "stride_bs")
    constants = {"SLICES": case.slices.count, "GRANULE": 8, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    constants |= {"BLOCK_K": config.block_k, "BLOCK_R": case.slices.block_rank, "PRECISION": case.precision}
    return Specimen(
        f"lora_expand {case.label} {config.block_m}x{config.block_n}",
        lora_expand_kernel,
        pointers | dict.fromkeys(sizes, "i32") | SLICE_SIGNATURE | {"row_tiles": "i32"}
        | dict.fromkeys(constants, "constexpr"),
        constants | {"stride_yn": 1},
        config.num_warps,
        config.num_stages,
        frozenset(pointers) | {"stride_ym", "stride_bs", *ROW_ENDS},
        case.tensor_cores,
        asynchronous=config.block_k < case.slices.block_rank,
    )  # fmt: skip
