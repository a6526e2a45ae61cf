"""``lora_dx``: the gradient of a two-path Linear's input, dx = dy·W + drop(dS·A), as one GEMM.

Without dropout its loop over the out features runs on over the ranks, [dy | dS]·[W ; A]; with dropout it starts from
dS·A, masked in registers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from prelora.kernels.dropout_mask import drops, keep_mask, kept_scale, threshold
from prelora.kernels.lora_forward import GROUP_M, GemmConfig, gemm_config, multiply_joined, tile_of_program
from prelora.kernels.padding import Case, cases, precision_of
from prelora.kernels.specimen import Specimen
from torch import Tensor


@triton.jit
def lora_dx_kernel(
    dy_ptr, weight_ptr, ds_ptr, a_ptr, dx_ptr, seed_ptr,
    tokens, in_features, out_features, rank, stride_dym, stride_dyn, stride_wn, stride_wk, threshold, kept_scale,
    DROPOUT: tl.constexpr, GRANULE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, tile of in-features)."""
    n_tiles = tl.cdiv(in_features, BLOCK_N)
    tile_m, tile_n = tile_of_program(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), n_tiles, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # What lies outside is read from the first rows and columns again, and never stored: no masks in the loop.
    m = (rows % tokens).to(tl.int64)[:, None]
    n = (cols % in_features)[None, :]
    rank *= GRANULE
    dy_rows = dy_ptr + m * stride_dym
    ds_rows = ds_ptr + m * rank
    weight_cols = weight_ptr + n.to(tl.int64) * stride_wk
    a_cols = a_ptr + n
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if DROPOUT:
        acc = multiply_joined(
            acc, dy_rows, stride_dyn, ds_rows, weight_cols, stride_wn, a_cols, in_features, 0, rank,
            BLOCK_K, PRECISION,
        )  # fmt: skip
        kept = keep_mask(tl.load(seed_ptr), rows[:, None], cols[None, :], threshold)
        acc = tl.where(kept, acc * kept_scale, 0.0)
        rank = 0
    acc = multiply_joined(
        acc, dy_rows, stride_dyn, ds_rows, weight_cols, stride_wn, a_cols, in_features, out_features, rank,
        BLOCK_K, PRECISION,
    )  # fmt: skip
    dx_ptrs = dx_ptr + rows.to(tl.int64)[:, None] * in_features + cols[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=(rows < tokens)[:, None] & (cols < in_features)[None, :])


def dx_config(dtype: torch.dtype, tokens: int, in_features: int, dropping: bool) -> GemmConfig:
    """``gemm_config``, but with dropout no more than 64 sums a thread: the mask's hashes need registers beside them."""
    config = gemm_config(dtype, tokens, in_features)
    return GemmConfig(128, 128, 32, 8, 4) if dropping and config.block_m == 128 else config


def dx_tiles(tokens: int, in_features: int, config: GemmConfig) -> tuple[int, int]:
    """Tiles of tokens and of in-features; a program for each pair."""
    return triton.cdiv(tokens, config.block_m), triton.cdiv(in_features, config.block_n)


def lora_dx(
    dy: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor, dropout: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """Return dx = dy·W + drop(dS·A), [M, in], in dy's dtype.

    Args:
        dy: [M, out].
        weight: [out, in], in dy's dtype.
        ds: [M, sum of ranks] in dy's dtype, as from ``lora_row``.
        lora_a: [sum of ranks, in].
        dropout, seed: as in ``lora_row``; they give the same mask.
    """
    tokens, in_features = dy.shape[0], weight.shape[1]
    dx = dy.new_empty((tokens, in_features))
    if tokens == 0:
        return dx
    dropping = drops(dropout, seed)
    config = dx_config(dy.dtype, tokens, in_features, dropping)
    token_tiles, col_tiles = dx_tiles(tokens, in_features, config)
    rank = ds.shape[1]
    granule = 8 if rank % 8 == 0 else 1
    with torch.cuda.device_of(dy):
        lora_dx_kernel[(token_tiles * col_tiles,)](
            dy, weight, ds.contiguous(), lora_a.to(dy.dtype).contiguous(), dx, seed if dropping else None, tokens,
            in_features, dy.shape[1], rank // granule, *dy.stride(), *weight.stride(), threshold(dropout),
            kept_scale(dropout), DROPOUT=dropping, GRANULE=granule, GROUP=GROUP_M, BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, BLOCK_K=config.block_k, PRECISION=precision_of(dy.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return dx


def traffic(
    tokens: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype, dropping: bool = False
) -> int:
    """Bytes that the grid loads and stores; ``rank`` is the sum of all slices'."""
    config = dx_config(dtype, tokens, in_features, dropping)
    token_tiles, col_tiles = dx_tiles(tokens, in_features, config)
    loaded = token_tiles * col_tiles * (config.block_m + config.block_n) * (out_features + rank)
    return (loaded + tokens * in_features) * dtype.itemsize


def specimens() -> Iterator[Specimen]:
    """Every configuration of ``dx_config``; ranks make no difference to the machine code."""
    for case in cases(dropout=True):
        if case.slices.block_rank == 32 and case.slices.count == 1:
            sizes = (64, 4096, 16384)
            for config in dict.fromkeys(dx_config(case.dtype, tokens, 1024, case.dropping) for tokens in sizes):
                yield _specimen(case, config)


def _specimen(case: Case, config: GemmConfig) -> Specimen:
    pointers = dict.fromkeys(("dy_ptr", "weight_ptr", "ds_ptr", "a_ptr", "dx_ptr"), f"*{case.element}")
    aligned = ("in_features", "out_features", "stride_dym", "stride_wn")
    sizes = ("tokens", "in_features", "out_features", "rank", "stride_dym", "stride_dyn", "stride_wn", "stride_wk")
    constants = {"DROPOUT": case.dropping, "GRANULE": 8, "GROUP": GROUP_M, "BLOCK_M": config.block_m}
    constants |= {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "PRECISION": case.precision}
    signature = pointers | {"seed_ptr": "*i64"} | dict.fromkeys(sizes, "i32")
    return Specimen(
        f"lora_dx {case.label} {config.block_m}x{config.block_n}",
        lora_dx_kernel,
        signature | {"threshold": "i32", "kept_scale": "fp32"} | dict.fromkeys(constants, "constexpr"),
        constants | {"stride_dyn": 1, "stride_wk": 1} | ({} if case.dropping else {"seed_ptr": None}),
        config.num_warps,
        config.num_stages,
        frozenset((*pointers, *aligned)),
        case.tensor_cores,
    )
