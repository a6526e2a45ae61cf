"""``lora_forward``: y = x·Wᵀ + b + [s_i · h_i · B_iᵀ for each row slice i] as one GEMM.

Its loop over the in features runs on over the ranks, [x | h]·[W | s·B]ᵀ, so that the low-rank path costs no pass over
y: one more step for ranks up to 32.
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

GROUP_M = 8
"""Tiles of tokens that a group of consecutive programs shares columns with, so that W's tiles stay in the L2 cache."""


@dataclass(frozen=True)
class GemmConfig:
    """Launch constants; chosen by arithmetic for sm_80, not yet timed on any GPU."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def gemm_config(dtype: torch.dtype, tokens: int, width: int) -> GemmConfig:
    """Constants for a result [tokens, width], the narrowest slice's width."""
    if dtype == torch.float32:
        # No tensor cores: 16 sums a thread and their operands.
        return GemmConfig(64, 32, 16, 4, 3)
    # 128 x 256 reads each operand least often (85 operations a byte from the L2 cache) and takes an SM of its own; it
    # is worth it once every one of 108 SMs gets two. Steps of 32, so that small ranks add little to the sum.
    if width >= 256 and triton.cdiv(tokens, 128) * triton.cdiv(width, 256) >= 216:
        return GemmConfig(128, 256, 32, 8, 4)
    if triton.cdiv(tokens, 128) * triton.cdiv(width, 128) >= 108:
        return GemmConfig(128, 128, 32, 4, 4)
    return GemmConfig(64, 64, 32, 4, 4)


@triton.jit
def multiply_joined(
    acc, act_rows, stride_ak, low_rows, weight_cols, stride_wk, factor_cols, stride_fk, depth, rank,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + [act | low]·[weight; factor] over ``depth`` and then ``rank`` terms: (BLOCK_M, BLOCK_N) in fp32.

    ``act_rows`` and ``low_rows`` (BLOCK_M, 1) point to the rows' first elements, ``weight_cols`` and ``factor_cols``
    (1, BLOCK_N) to the columns'.
    """
    first = tl.cdiv(depth, BLOCK_K)
    for step in range(first + tl.cdiv(rank, BLOCK_K)):
        # One loop for both sums: two would wait for memory twice.
        joined = step >= first
        term = tl.where(joined, step - first, step) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = term < tl.where(joined, rank, depth)
        term = term.to(tl.int64)
        act = tl.where(joined, low_rows + term[None, :], act_rows + term[None, :] * stride_ak)
        weight = tl.where(joined, factor_cols + term[:, None] * stride_fk, weight_cols + term[:, None] * stride_wk)
        act = tl.load(act, mask=inside[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        weight = tl.load(weight, mask=inside[:, None], other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(act, weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_of_program(program, m_tiles, n_tiles, GROUP: tl.constexpr):
    """(tile of tokens, tile of columns): ``GROUP`` tiles of tokens for each tile of columns, then the next."""
    first = program // (GROUP * n_tiles) * GROUP
    size = tl.minimum(m_tiles - first, GROUP)
    return first + program % (GROUP * n_tiles) % size, program % (GROUP * n_tiles) // size


@triton.jit
def lora_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, h_ptr, b_ptr, y_ptr,
    tokens, in_features, stride_xm, stride_xk, stride_wn, stride_wk, stride_bs, stride_bn,
    row_end_0, row_end_1, row_end_2, rank_end_0, rank_end_1, rank_end_2, row_tiles,
    SLICES: tl.constexpr, GRANULE: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, tile of a slice's rows)."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), row_tiles, GROUP)
    index, row_tile = slice_tile(tile_n, row_end_0, row_end_1, row_end_2, SLICES, BLOCK_N)
    row_start, row_end = slice_bounds(index, row_end_0, row_end_1, row_end_2, SLICES)
    rank_start, rank_end = slice_bounds(index, rank_end_0, rank_end_1, rank_end_2, SLICES)
    height = row_end - row_start
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # What lies outside is read from the first rows and columns again, and never stored: no masks in the loop.
    m = (rows % tokens).to(tl.int64)[:, None]
    n = (cols % height)[None, :]
    acc = multiply_joined(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
        x_ptr + m * stride_xm, stride_xk, h_ptr + m * (rank_end_2 * GRANULE) + rank_start * GRANULE,
        weight_ptr + (row_start + n).to(tl.int64) * stride_wn, stride_wk, b_ptr + index * stride_bs + n * stride_bn, 1,
        in_features, (rank_end - rank_start) * GRANULE, BLOCK_K, PRECISION,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias_ptr + row_start + cols, mask=cols < height, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * row_end_2 + (row_start + cols)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(rows < tokens)[:, None] & (cols < height)[None, :])


def forward_tiles(tokens: int, rows: Sequence[int], config: GemmConfig) -> tuple[int, int]:
    """Tiles of tokens, and of all slices' rows; a program for each pair."""
    return triton.cdiv(tokens, config.block_m), sum(triton.cdiv(n, config.block_n) for n in rows)


def lora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
) -> Tensor:
    """Return x·Wᵀ + b + [s_i · h_i · B_iᵀ for each slice i], [M, out], in x's dtype.

    Args:
        x: [M, in].
        weight: [out, in], in x's dtype.
        bias: [out] or None.
        h: [M, sum of ranks] in x's dtype, as S from ``lora_row``.
        lora_b: every slice's B [rows_i, rank_i] in row-major order, one after another.
        rows, ranks, scaling: of each slice.
    """
    slices = slices_of(rows, ranks, scaling)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    if x.shape[0] == 0:
        return y
    config = gemm_config(x.dtype, x.shape[0], min(slices.rows))
    token_tiles, row_tiles = forward_tiles(x.shape[0], slices.rows, config)
    packed = pack_b(lora_b, slices, x.dtype, 1, scaled=True)
    with torch.cuda.device_of(x):
        lora_forward_kernel[(token_tiles * row_tiles,)](
            x, weight, bias, h.contiguous(), packed, y, *x.shape, *x.stride(), *weight.stride(), *packed.stride()[:2],
            *slices.row_ends(), *slices.rank_ends(), row_tiles, SLICES=slices.count, GRANULE=slices.granule,
            BIAS=bias is not None, GROUP=GROUP_M, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, PRECISION=precision_of(x.dtype), num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
    return y


def traffic(
    tokens: int, in_features: int, rows: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, bias: int = 0
) -> int:
    """Bytes that the grid loads and stores; ``bias``: bytes of one of its elements."""
    slices = slices_of(rows, ranks, [1.0] * len(rows))
    config = gemm_config(dtype, tokens, min(slices.rows))
    token_tiles, _ = forward_tiles(tokens, slices.rows, config)
    total = tokens * sum(slices.rows) * dtype.itemsize + token_tiles * sum(slices.rows) * bias
    for n, rank in zip(slices.rows, slices.ranks, strict=True):
        _, tiles = forward_tiles(tokens, [n], config)
        loaded = token_tiles * tiles * (config.block_m + config.block_n)
        total += loaded * (in_features + rank) * dtype.itemsize
    return total


def specimens() -> Iterator[Specimen]:
    """Every configuration of ``gemm_config``; the rank makes no difference to the machine code."""
    for case in cases(dropout=False):
        if case.slices.block_rank == 32:
            for config in dict.fromkeys(gemm_config(case.dtype, tokens, 1024) for tokens in (64, 4096, 16384)):
                yield _specimen(case, config)


def _specimen(case: Case, config: GemmConfig) -> Specimen:
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "h_ptr", "b_ptr", "y_ptr"), f"*{case.element}")
    aligned = ("in_features", "stride_xm", "stride_wn", "stride_bs", "stride_bn")
    sizes = ("tokens", "in_features", "stride_xm", "stride_xk", "stride_wn", "stride_wk", "stride_bs", "stride_bn")
    constants = {"SLICES": case.slices.count, "GRANULE": 8, "BIAS": True, "GROUP": GROUP_M}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    constants |= {"PRECISION": case.precision}
    return Specimen(
        f"lora_forward {case.label} {config.block_m}x{config.block_n}",
        lora_forward_kernel,
        pointers | dict.fromkeys(sizes, "i32") | SLICE_SIGNATURE | {"row_tiles": "i32"}
        | dict.fromkeys(constants, "constexpr"),
        constants | {"stride_xk": 1, "stride_wk": 1},
        config.num_warps,
        config.num_stages,
        frozenset((*pointers, *aligned, *ROW_ENDS)),
        case.tensor_cores,
    )  # fmt: skip
