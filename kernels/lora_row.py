"""``lora_row``: what the low-rank path needs of each token, S = drop(x)·Aᵀ and dS_i = s_i · dy_i · B_i.

x [M, k] and dy [M, n] are read once each, by one launch: a program multiplies BLOCK_M whole rows of x, or of one slice
of dy, with a factor that the L2 cache holds. The work is bound by that one read as long as the ranks sum to less than
about 100 (A100, 16 bit: 2R operations per 2 bytes against 156 per byte).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from prelora.kernels.dropout_mask import drops, keep_mask, kept_scale, threshold
from prelora.kernels.padding import (
    ROW_ENDS,
    SCALE_SIGNATURE,
    SLICE_SIGNATURE,
    Case,
    cases,
    pack_a,
    pack_b,
    precision_of,
    rank_tiles,
    slice_bounds,
    slice_scale,
    slices_of,
    strides,
    whole,
)
from prelora.kernels.specimen import Specimen
from torch import Tensor


@dataclass(frozen=True)
class RowConfig:
    """Launch constants; chosen by arithmetic for sm_80, not yet timed on any GPU."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


def row_config(dtype: torch.dtype, block_rank: int, tokens: int) -> RowConfig:
    """Constants for the widest tile of ranks, ``block_rank``."""
    if dtype == torch.float32:
        # No tensor cores: sums and operands compete for registers.
        return RowConfig(32, 32, 8 if block_rank > 64 else 4, 3)
    # 4 to 8 KiB of x in flight per stage hide the latency of DRAM with two programs on an SM. A program for each of 108
    # SMs comes before more rows for a program, and more rows before reading a wide factor more often: for each byte of
    # x the L2 cache delivers R / block_m of it, at 2.5 times DRAM's bandwidth. Warps and stages: no spills on any arch.
    if tokens <= 64 * 108:
        return RowConfig(32, 64, 4, 4 if block_rank < 128 else 3)
    if block_rank <= 64 and tokens >= 128 * 90:
        return RowConfig(128, 64, 8, 3)
    if block_rank < 128:
        return RowConfig(64, 64, 4, 4)
    return RowConfig(128 if block_rank == 128 else 64, 32, 8, 4)


@triton.jit
def multiply_rows(
    act_ptr, stride_m, stride_k, factor_ptr, stride_factor, rows, tokens, width, seed, threshold,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of an activation times a packed factor: (BLOCK_M, BLOCK_R) in fp32."""
    cols = tl.arange(0, BLOCK_K)
    act_ptrs = act_ptr + rows.to(tl.int64)[:, None] * stride_m + cols.to(tl.int64)[None, :] * stride_k
    factor_ptrs = factor_ptr + cols[:, None] * stride_factor + tl.arange(0, BLOCK_R)[None, :]  # (BLOCK_K, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    step = tl.cast(BLOCK_K, tl.int64) * stride_k
    for start in range(0, width, BLOCK_K):
        inside = (rows < tokens)[:, None] & (start + cols < width)[None, :]
        act = tl.load(act_ptrs, mask=inside, other=0.0)  # (BLOCK_M, BLOCK_K)
        if DROPOUT:
            act = tl.where(keep_mask(seed, rows[:, None], (start + cols)[None, :], threshold), act, 0.0)
        acc = tl.dot(act, tl.load(factor_ptrs), acc, input_precision=PRECISION)
        act_ptrs += step
        factor_ptrs += BLOCK_K * stride_factor
    return acc


@triton.jit
def lora_row_kernel(
    x_ptr, dy_ptr, a_ptr, b_ptr, s_ptr, ds_ptr, seed_ptr,
    tokens, in_features, stride_xm, stride_xk, stride_dym, stride_dyn, stride_bs,
    row_end_0, row_end_1, row_end_2, rank_end_0, rank_end_1, rank_end_2, scale_0, scale_1, scale_2,
    threshold, kept_scale,
    X_TILES: tl.constexpr, SLICES: tl.constexpr, DROPOUT: tl.constexpr, GRANULE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_RX: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, job): the first X_TILES jobs are tiles of S's columns, the others slices of dy."""
    tile = tl.program_id(0) // (X_TILES + SLICES)
    job = tl.program_id(0) % (X_TILES + SLICES)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = rank_end_2 * GRANULE
    if job < X_TILES:
        seed = 0
        if DROPOUT:
            seed = tl.load(seed_ptr)
        s_cols = job * BLOCK_RX + tl.arange(0, BLOCK_RX)
        s_tile = multiply_rows(
            x_ptr, stride_xm, stride_xk, a_ptr + job * BLOCK_RX, X_TILES * BLOCK_RX, rows, tokens, in_features,
            seed, threshold, DROPOUT, BLOCK_M, BLOCK_K, BLOCK_RX, PRECISION,
        )  # fmt: skip
        if DROPOUT:
            s_tile *= kept_scale
        s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * ranks + s_cols[None, :]
        tl.store(s_ptrs, s_tile.to(s_ptr.dtype.element_ty), mask=(rows < tokens)[:, None] & (s_cols < ranks)[None, :])
    else:
        index = job - X_TILES
        start, end = slice_bounds(index, row_end_0, row_end_1, row_end_2, SLICES)
        rank_start, rank_end = slice_bounds(index, rank_end_0, rank_end_1, rank_end_2, SLICES)
        ds_tile = multiply_rows(
            dy_ptr + tl.cast(start, tl.int64) * stride_dyn, stride_dym, stride_dyn, b_ptr + index * stride_bs, BLOCK_R,
            rows, tokens, end - start, 0, 0, False, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
        )  # fmt: skip
        ds_tile *= slice_scale(index, scale_0, scale_1, scale_2)
        ds_cols = rank_start * GRANULE + tl.arange(0, BLOCK_R)
        ds_ptrs = ds_ptr + rows.to(tl.int64)[:, None] * ranks + ds_cols[None, :]
        inside = (rows < tokens)[:, None] & (ds_cols < rank_end * GRANULE)[None, :]
        tl.store(ds_ptrs, ds_tile.to(ds_ptr.dtype.element_ty), mask=inside)


def row_grid(tokens: int, x_tiles: int, slices: int, config: RowConfig) -> tuple[int]:
    """One program for each tile of tokens and each of its jobs."""
    return (triton.cdiv(tokens, config.block_m) * (x_tiles + slices),)


def lora_row(
    x: Tensor | None,
    dy: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return S = drop(x)·Aᵀ and dS = [s_i · dy_i · B_i for each slice i].

    Args:
        x: [M, in], or None: no S.
        dy: [M, out], or None: no dS.
        lora_a: [sum of ranks, in].
        lora_b: every slice's B [rows_i, rank_i] in row-major order, one after another.
        rows, ranks, scaling: of each slice.
        dropout: probability of dropping an element of x.
        seed: one int64 element on x's device.

    Returns:
        S and dS, [M, sum of ranks], in x's and in dy's dtype.
    """
    slices = slices_of(rows, ranks, scaling)
    given = x if x is not None else dy
    if given is None:
        return None, None
    tokens = given.shape[0]
    s = None if x is None else x.new_empty((tokens, slices.rank))
    ds = None if dy is None else dy.new_empty((tokens, slices.rank))
    if tokens == 0:
        return s, ds
    x_tiles, block_rx = rank_tiles(slices.rank) if x is not None else (0, slices.block_rank)
    config = row_config(given.dtype, max(block_rx, slices.block_rank), tokens)
    dropping = x is not None and drops(dropout, seed)
    packed_a = None if x is None else pack_a(lora_a, x.dtype, config.block_k, x_tiles * block_rx)
    packed_b = None if dy is None else pack_b(lora_b, slices, dy.dtype, config.block_k, scaled=False)
    dy_slices = 0 if dy is None else slices.count
    with torch.cuda.device_of(given):
        lora_row_kernel[row_grid(tokens, x_tiles, dy_slices, config)](
            x, dy, packed_a, packed_b, s, ds, seed if dropping else None,
            tokens, lora_a.shape[1], *strides(x), *strides(dy), 0 if packed_b is None else packed_b.stride(0),
            *slices.row_ends(), *slices.rank_ends(), *slices.scales(), threshold(dropout), kept_scale(dropout),
            X_TILES=x_tiles, SLICES=dy_slices, DROPOUT=dropping, GRANULE=slices.granule, BLOCK_M=config.block_m,
            BLOCK_K=config.block_k, BLOCK_RX=block_rx, BLOCK_R=slices.block_rank, PRECISION=precision_of(given.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return s, ds


def traffic(
    tokens: int, in_features: int, rows: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, x: bool = True,
    dy: bool = True,
) -> int:  # fmt: skip
    """Bytes that the grid loads and stores for S (``x``) and dS (``dy``)."""
    slices = slices_of(rows, ranks, [1.0] * len(rows))
    x_tiles, block_rx = rank_tiles(slices.rank)
    config = row_config(dtype, max(block_rx if x else 0, slices.block_rank if dy else 0), tokens)
    tiles = triton.cdiv(tokens, config.block_m)
    s = tokens * (in_features * x_tiles + slices.rank) + tiles * whole(in_features, config.block_k) * x_tiles * block_rx
    factors = sum(whole(n, config.block_k) for n in slices.rows) * slices.block_rank
    ds = tokens * (sum(slices.rows) + slices.rank) + tiles * factors
    return (s * x + ds * dy) * dtype.itemsize


def specimens() -> Iterator[Specimen]:
    """Every configuration of ``row_config``."""
    for case in cases(dropout=True):
        _, block_rx = rank_tiles(case.slices.rank)
        for config in dict.fromkeys(row_config(case.dtype, block_rx, tokens) for tokens in (1, 128 * 80, 2**20)):
            yield _specimen(case, config)


def _specimen(case: Case, config: RowConfig) -> Specimen:
    x_tiles, block_rx = rank_tiles(case.slices.rank)
    pointers = dict.fromkeys(("x_ptr", "dy_ptr", "a_ptr", "b_ptr", "s_ptr", "ds_ptr"), f"*{case.element}")
    sizes = ("tokens", "in_features", "stride_xm", "stride_xk", "stride_dym", "stride_dyn", "stride_bs")
    constants = {"X_TILES": x_tiles, "SLICES": case.slices.count, "DROPOUT": case.dropping, "GRANULE": 8}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "BLOCK_RX": block_rx}
    constants |= {"BLOCK_R": case.slices.block_rank, "PRECISION": case.precision}
    signature = pointers | {"seed_ptr": "*i64"} | dict.fromkeys(sizes, "i32") | SLICE_SIGNATURE
    signature |= SCALE_SIGNATURE | {"threshold": "i32", "kept_scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    return Specimen(
        f"lora_row {case.label} {config.block_m}x{config.block_k}",
        lora_row_kernel,
        signature,
        constants | {"stride_xk": 1, "stride_dyn": 1} | ({} if case.dropping else {"seed_ptr": None}),
        config.num_warps,
        config.num_stages,
        frozenset(pointers) | {"in_features", "stride_xm", "stride_dym", "stride_bs", *ROW_ENDS},
        case.tensor_cores,
    )
