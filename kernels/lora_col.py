"""``lora_col``: LoRA's gradients from activations, dA = dSᵀ·drop(x) and dB_i = s_i · dy_iᵀ · S_i.

Both sum over all tokens, far more than there are elements in dA and dB. So the tokens are split over programs: each
sums BLOCK_C columns of x or dy over its share of the tokens into a workspace in fp32, and a second launch adds the
shares in order. There are no atomics: equal inputs give equal bits.
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
    Slices,
    cases,
    precision_of,
    rank_tiles,
    slice_bounds,
    slice_scale,
    slice_tile,
    slices_of,
    strides,
    whole,
)
from prelora.kernels.specimen import Specimen
from torch import Tensor

PROGRAMS = 108
"""One for each of an A100's 108 SMs: more would write and read more partial sums. A constant, so that the split, and
with it every bit of the result, is the same on every GPU."""
SUM_BLOCK = 512
"""Elements of a program of the second launch: 16 bytes for each of 128 threads."""


@dataclass(frozen=True)
class ColConfig:
    """Launch constants; chosen by arithmetic for sm_80, not yet timed on any GPU."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int


def col_config(dtype: torch.dtype, block_rank: int) -> ColConfig:
    """Constants for the widest tile of ranks, ``block_rank``."""
    if dtype == torch.float32:
        # No tensor cores: sums and operands compete for registers, and every token of a tile is unrolled.
        return ColConfig(32, 64, 4, 3) if block_rank <= 32 else ColConfig(16, 64, 8, 4)
    # 16 KiB of x in flight per stage. S is read again for every block_c columns, from the L2 cache: R / block_c bytes
    # of it for each byte of x.
    if block_rank > 128:
        return ColConfig(32, 64, 8, 4)
    if block_rank <= 32:
        return ColConfig(32, 256, 8, 3)
    return ColConfig(64, 128, 4 if block_rank <= 32 else 8, 3) if block_rank <= 64 else ColConfig(32, 128, 8, 4)


def token_split(tokens: int, tiles: int, block_m: int) -> tuple[int, int]:
    """(shares, tokens of each but the last): enough shares of every tile to fill the GPU once, none of them empty."""
    blocks = triton.cdiv(tokens, block_m)
    share = triton.cdiv(blocks, min(blocks, max(1, PROGRAMS // tiles)))
    return triton.cdiv(blocks, share), share * block_m


def col_tiles(in_features: int, slices: Slices | None, x_tiles: int, config: ColConfig) -> tuple[int, int]:
    """Tiles of dA (``in_features`` 0: none) and of dB."""
    rows = () if slices is None else slices.rows
    return triton.cdiv(in_features, config.block_c) * x_tiles, sum(triton.cdiv(n, config.block_c) for n in rows)


@triton.jit
def multiply_cols(
    act_ptr, stride_m, stride_c, factor_ptr, stride_factor, first, last, cols, width, ranks, rank_end, seed, threshold,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of an activation, transposed, times S or dS over tokens first to last: (BLOCK_C, BLOCK_R) in fp32."""
    rows = first + tl.arange(0, BLOCK_M)
    # The tile is loaded transposed, not transposed after loading: only so do sm_80's loads become asynchronous copies.
    act_ptrs = act_ptr + cols.to(tl.int64)[:, None] * stride_c + rows.to(tl.int64)[None, :] * stride_m
    factor_ptrs = factor_ptr + rows.to(tl.int64)[:, None] * stride_factor + ranks[None, :]
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    step = tl.cast(BLOCK_M, tl.int64) * stride_m
    for start in range(first, last, BLOCK_M):
        tokens = start + tl.arange(0, BLOCK_M)
        inside = (cols < width)[:, None] & (tokens < last)[None, :]
        act = tl.load(act_ptrs, mask=inside, other=0.0)  # (BLOCK_C, BLOCK_M)
        if DROPOUT:
            act = tl.where(keep_mask(seed, tokens[None, :], cols[:, None], threshold), act, 0.0)
        inside = (tokens < last)[:, None] & (ranks < rank_end)[None, :]
        factor = tl.load(factor_ptrs, mask=inside, other=0.0)  # (BLOCK_M, BLOCK_R)
        acc = tl.dot(act, factor, acc, input_precision=PRECISION)
        act_ptrs += step
        factor_ptrs += BLOCK_M * stride_factor
    return acc


@triton.jit
def lora_col_kernel(
    x_ptr, dy_ptr, s_ptr, ds_ptr, partial_ptr, seed_ptr,
    tokens, in_features, share, stride_xm, stride_xk, stride_dym, stride_dyn, size_a, size_partial,
    row_end_0, row_end_1, row_end_2, rank_end_0, rank_end_1, rank_end_2, scale_0, scale_1, scale_2,
    threshold, kept_scale,
    X_TILES: tl.constexpr, SLICES: tl.constexpr, DROPOUT: tl.constexpr, GRANULE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_RX: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of dA or dB, share of the tokens); writes its sum to its share of the workspace."""
    a_tiles = tl.cdiv(in_features, BLOCK_C) * X_TILES
    tile = tl.program_id(0)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    partial_ptr += tl.program_id(1).to(tl.int64) * size_partial
    all_ranks = rank_end_2 * GRANULE
    if tile < a_tiles:
        seed = 0
        if DROPOUT:
            seed = tl.load(seed_ptr)
        a_cols = tile // X_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
        a_ranks = tile % X_TILES * BLOCK_RX + tl.arange(0, BLOCK_RX)
        a_tile = multiply_cols(
            x_ptr, stride_xm, stride_xk, ds_ptr, all_ranks, first, last, a_cols, in_features, a_ranks, all_ranks,
            seed, threshold, DROPOUT, BLOCK_M, BLOCK_C, BLOCK_RX, PRECISION,
        )  # fmt: skip
        if DROPOUT:
            a_tile *= kept_scale
        a_ptrs = partial_ptr + a_ranks[None, :] * in_features + a_cols[:, None]
        tl.store(a_ptrs, a_tile, mask=(a_cols < in_features)[:, None] & (a_ranks < all_ranks)[None, :])
    else:
        index, row_tile = slice_tile(tile - a_tiles, row_end_0, row_end_1, row_end_2, SLICES, BLOCK_C)
        row_start, row_end = slice_bounds(index, row_end_0, row_end_1, row_end_2, SLICES)
        rank_start, rank_end = slice_bounds(index, rank_end_0, rank_end_1, rank_end_2, SLICES)
        b_rows = row_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        b_ranks = tl.arange(0, BLOCK_R)
        height = row_end - row_start
        rank = (rank_end - rank_start) * GRANULE
        b_tile = multiply_cols(
            dy_ptr + tl.cast(row_start, tl.int64) * stride_dyn, stride_dym, stride_dyn, s_ptr + rank_start * GRANULE,
            all_ranks, first, last, b_rows, height, b_ranks, rank, 0, 0, False, BLOCK_M, BLOCK_C, BLOCK_R, PRECISION,
        )  # fmt: skip
        b_tile *= slice_scale(index, scale_0, scale_1, scale_2)
        start_1 = row_end_0 * rank_end_0 * GRANULE
        start_2 = start_1 + (row_end_1 - row_end_0) * (rank_end_1 - rank_end_0) * GRANULE
        start = size_a + tl.where(index == 0, 0, tl.where(index == 1, start_1, start_2))
        b_ptrs = partial_ptr + start + b_rows[:, None] * rank + b_ranks[None, :]
        tl.store(b_ptrs, b_tile, mask=(b_rows < height)[:, None] & (b_ranks < rank)[None, :])


@triton.jit
def lora_col_sum_kernel(
    partial_ptr, da_ptr, db_ptr, size_a, size, size_partial, shares, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum of the shares, in order: the first ``size_a`` of ``size`` elements are dA's, the others dB's."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ptrs = partial_ptr + offsets
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(shares):
        acc += tl.load(ptrs, mask=offsets < size, other=0.0)
        ptrs += size_partial
    tl.store(da_ptr + offsets, acc.to(da_ptr.dtype.element_ty), mask=offsets < size_a)
    inside = (offsets >= size_a) & (offsets < size)
    tl.store(db_ptr + (offsets - size_a), acc.to(db_ptr.dtype.element_ty), mask=inside)


def lora_col(
    x: Tensor | None,
    dy: Tensor | None,
    s: Tensor | None,
    ds: Tensor | None,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    dtype: torch.dtype,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dA = dSᵀ·drop(x), [sum of ranks, in], and every dB_i = s_i · dy_iᵀ · S_i one after another, flat.

    Args:
        x, ds: [M, in] and [M, sum of ranks] as from ``lora_row``, or None: no dA.
        dy, s: [M, out] and [M, sum of ranks] as from ``lora_row``, or None: no dB.
        rows, ranks, scaling: of each slice.
        dtype: of dA and dB.
        dropout, seed: as in ``lora_row``; they give the same mask.
    """
    slices = slices_of(rows, ranks, scaling)
    if x is None or ds is None:
        x = ds = None
    if dy is None or s is None:
        dy = s = None
    given = x if x is not None else dy
    if given is None:
        return None, None
    da = None if x is None else x.new_empty((slices.rank, x.shape[1]), dtype=dtype)
    db = None if dy is None else dy.new_empty(slices.size_b, dtype=dtype)
    if given.shape[0] == 0:
        return None if da is None else da.zero_(), None if db is None else db.zero_()
    size_a = 0 if da is None else da.numel()
    size = size_a + (0 if db is None else db.numel())
    partial = _partials(x, dy, s, ds, slices, (size_a, size), dropout, seed)
    with torch.cuda.device_of(given):
        lora_col_sum_kernel[(triton.cdiv(size, SUM_BLOCK),)](
            partial, db if da is None else da, da if db is None else db, size_a, size, partial.stride(0),
            partial.shape[0], BLOCK=SUM_BLOCK, num_warps=4,
        )  # fmt: skip
    return da, db


def _partials(
    x: Tensor | None, dy: Tensor | None, s: Tensor | None, ds: Tensor | None, slices: Slices,
    sizes: tuple[int, int], dropout: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Every share's dA and dB, flat, in fp32: [shares, elements and a tail that keeps rows 64-byte aligned]."""
    given = x if x is not None else dy
    x_tiles, block_rx = rank_tiles(slices.rank) if x is not None else (0, slices.block_rank)
    config = col_config(given.dtype, max(block_rx, slices.block_rank if dy is not None else 0))
    in_features = 0 if x is None else x.shape[1]
    tiles = sum(col_tiles(in_features, None if dy is None else slices, x_tiles, config))
    shares, share = token_split(given.shape[0], tiles, config.block_m)
    partial = given.new_empty((shares, whole(sizes[1], 16)), dtype=torch.float32)
    dropping = x is not None and drops(dropout, seed)
    with torch.cuda.device_of(given):
        lora_col_kernel[(tiles, shares)](
            x, dy, None if s is None else s.contiguous(), None if ds is None else ds.contiguous(), partial,
            seed if dropping else None, given.shape[0], in_features, share, *strides(x), *strides(dy), sizes[0],
            partial.stride(0), *slices.row_ends(), *slices.rank_ends(), *slices.scales(), threshold(dropout),
            kept_scale(dropout), X_TILES=x_tiles, SLICES=0 if dy is None else slices.count, DROPOUT=dropping,
            GRANULE=slices.granule, BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_RX=block_rx,
            BLOCK_R=slices.block_rank, PRECISION=precision_of(given.dtype), num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
    return partial


def traffic(
    tokens: int, in_features: int, rows: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, out: torch.dtype,
    da: bool = True, db: bool = True,
) -> int:  # fmt: skip
    """Bytes that both grids load and store for dA (``da``) and dB (``db``) in dtype ``out``."""
    slices = slices_of(rows, ranks, [1.0] * len(rows))
    x_tiles, block_rx = rank_tiles(slices.rank)
    config = col_config(dtype, max(block_rx if da else 0, slices.block_rank if db else 0))
    a_tiles, b_tiles = col_tiles(in_features if da else 0, slices if db else None, x_tiles, config)
    shares, _ = token_split(tokens, a_tiles + b_tiles, config.block_m)
    activations = da * in_features * x_tiles + db * sum(slices.rows)
    again = [triton.cdiv(n, config.block_c) * r for n, r in zip(slices.rows, slices.ranks, strict=True)]
    factors = da * triton.cdiv(in_features, config.block_c) * slices.rank + db * sum(again)
    sums = da * slices.rank * in_features + db * slices.size_b
    return tokens * (activations + factors) * dtype.itemsize + sums * (2 * shares * 4 + out.itemsize)


def specimens() -> Iterator[Specimen]:
    """Every configuration of ``col_config``, and the second launch."""
    for element in ("bf16", "fp32"):
        pointers = {"partial_ptr": "*fp32", "da_ptr": f"*{element}", "db_ptr": f"*{element}"}
        sizes = dict.fromkeys(("size_a", "size", "size_partial"), "i32")
        yield Specimen(
            f"lora_col_sum {element}",
            lora_col_sum_kernel,
            pointers | sizes | {"shares": "i32", "BLOCK": "constexpr"},
            {"BLOCK": SUM_BLOCK},
            4,
            1,
            frozenset(pointers | sizes),
            tensor_cores=False,
            asynchronous=False,
        )
    yield from map(_specimen, cases(dropout=True))


def _specimen(case: Case) -> Specimen:
    x_tiles, block_rx = rank_tiles(case.slices.rank)
    config = col_config(case.dtype, block_rx)
    pointers = dict.fromkeys(("x_ptr", "dy_ptr", "s_ptr", "ds_ptr"), f"*{case.element}") | {"partial_ptr": "*fp32"}
    sizes = ("tokens", "in_features", "share", "stride_xm", "stride_xk", "stride_dym", "stride_dyn", "size_a")
    constants = {"X_TILES": x_tiles, "SLICES": case.slices.count, "DROPOUT": case.dropping, "GRANULE": 8}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_C": config.block_c, "BLOCK_RX": block_rx}
    constants |= {"BLOCK_R": case.slices.block_rank, "PRECISION": case.precision}
    signature = pointers | {"seed_ptr": "*i64"} | dict.fromkeys((*sizes, "size_partial"), "i32") | SLICE_SIGNATURE
    signature |= SCALE_SIGNATURE | {"threshold": "i32", "kept_scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    return Specimen(
        f"lora_col {case.label} {config.block_m}x{config.block_c}",
        lora_col_kernel,
        signature,
        constants | {"stride_xk": 1, "stride_dyn": 1} | ({} if case.dropping else {"seed_ptr": None}),
        config.num_warps,
        config.num_stages,
        frozenset(pointers) | {"in_features", "stride_xm", "stride_dym", "size_a", "size_partial", *ROW_ENDS},
        case.tensor_cores,
        # wgmma wants tf32 operands with the tokens innermost: sm_90 and later copy them there 4 bytes at a time.
        wide_loads=case.precision != "tf32",
    )
