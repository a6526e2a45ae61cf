"""``lora_merge``: W_eff = W + s·B·A of every layer in one launch, and the gradients of A and B from W_eff's.

Bound by bandwidth: W is read once and W_eff written once. A program makes one tile of one slice's rows; a table tells
it where (``table.py``). The rank is a run-time loop over chunks of BLOCK_R, so slices of any ranks share the launch.

Products are made in fp32 or, where nothing is lost, in tf32. Measured against float64, s·B·A being 7 to 29 % of W,
rms error over rms of W, and how many bf16 values then differ from the exact result's rounding:

| | rms error | other bf16 |
|---|---|---|
| fp32, ``ieee`` | 3e-8 | 0.003 % |
| ``tf32x3`` | 4e-8 to 1e-7 | 0.01 % |
| ``bf16x3`` | 3e-7 to 1e-6 | 0.03 to 0.1 % |
| ``tf32`` | 2e-5 to 9e-5 | 2 to 5 % |

So a 16-bit W_eff takes ``tf32x3``, which is as good as one rounding, and an fp32 W_eff ``ieee``, which is what the
reference computes. 16-bit factors take ``tf32``: it holds them, and so their products, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from prelora.kernels.specimen import Specimen
from prelora.kernels.table import (
    GroupedLaunches,
    address,
    check_layers,
    common_multiple,
    cover,
    cut_slices,
    float_bits,
    grouped_specimen,
    load_address,
    load_float,
    load_size,
    row_major,
    triton_dtype,
)
from torch import Tensor


@triton.jit
def load_sizes(row_ptr, K_MULTIPLE: tl.constexpr, RANK_MULTIPLE: tl.constexpr):
    """What every row of a table ends with: rows, k, stride of the weight's rows, rank, scaling."""
    rows = load_size(row_ptr, 1)
    k = load_size(row_ptr + 1, K_MULTIPLE)
    stride = load_size(row_ptr + 2, K_MULTIPLE)
    rank = load_size(row_ptr + 3, RANK_MULTIPLE)
    return rows, k, stride, rank, load_float(row_ptr + 4)


@triton.jit
def lora_merge_kernel(
    table_ptr,  # [problems, 9]: weight, output, A, B, rows, k, stride of weight's rows, rank, scaling
    tile_ptr,  # [tiles, 2]
    W_DTYPE: tl.constexpr,
    LORA_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    K_MULTIPLE: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BLOCK_N, BLOCK_K) tile of W + s·B·A."""
    pair_ptr = tile_ptr + 2 * tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(pair_ptr) * 9
    tile = tl.load(pair_ptr + 1)
    w_ptr = load_address(row_ptr, W_DTYPE, K_MULTIPLE > 1)
    out_ptr = load_address(row_ptr + 1, OUT_DTYPE, K_MULTIPLE > 1)
    a_ptr = load_address(row_ptr + 2, LORA_DTYPE, K_MULTIPLE > 1)
    b_ptr = load_address(row_ptr + 3, LORA_DTYPE, RANK_MULTIPLE > 1)
    rows, k, stride_wn, rank, scaling = load_sizes(row_ptr + 4, K_MULTIPLE, RANK_MULTIPLE)

    tiles_k = tl.cdiv(k, BLOCK_K)
    n0 = (tile // tiles_k) * BLOCK_N
    k0 = (tile % tiles_k) * BLOCK_K
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    in_n = offs_n[:, None] < rows - n0
    in_k = offs_k[None, :] < k - k0
    b_ptrs = b_ptr + n0.to(tl.int64) * rank + offs_n[:, None] * rank + offs_r[None, :]
    a_ptrs = a_ptr + k0 + offs_r[:, None] * k + offs_k[None, :]
    delta = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        b = tl.load(b_ptrs, mask=in_n & (offs_r[None, :] < rank - r0), other=0.0)  # (BLOCK_N, BLOCK_R)
        a = tl.load(a_ptrs, mask=(offs_r[:, None] < rank - r0) & in_k, other=0.0)  # (BLOCK_R, BLOCK_K)
        delta = tl.dot(b.to(tl.float32), a.to(tl.float32), delta, input_precision=PRECISION)
        b_ptrs += BLOCK_R
        a_ptrs += BLOCK_R * k

    # Loaded before the loop, the tile would hold 32 registers through it: two programs on an SM of sm_80, not three.
    w_ptrs = w_ptr + n0.to(tl.int64) * stride_wn + k0 + offs_n[:, None] * stride_wn + offs_k[None, :]
    w = tl.load(w_ptrs, mask=in_n & in_k, eviction_policy="evict_first")  # (BLOCK_N, BLOCK_K)
    out_ptrs = out_ptr + n0.to(tl.int64) * k + k0 + offs_n[:, None] * k + offs_k[None, :]
    tl.store(out_ptrs, (w.to(tl.float32) + scaling * delta).to(OUT_DTYPE), mask=in_n & in_k)


@triton.jit
def lora_merge_grad_a_kernel(
    table_ptr,  # [problems, 8]: dW, B, dA, rows, k, stride of dW's rows, rank, scaling
    tile_ptr,  # [tiles, 2]
    GRAD_DTYPE: tl.constexpr,
    LORA_DTYPE: tl.constexpr,
    K_MULTIPLE: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BLOCK_R, BLOCK_K) tile of dA = s·Bᵀ·dW, summed over all rows by one program."""
    pair_ptr = tile_ptr + 2 * tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(pair_ptr) * 8
    tile = tl.load(pair_ptr + 1)
    g_ptr = load_address(row_ptr, GRAD_DTYPE, K_MULTIPLE > 1)
    b_ptr = load_address(row_ptr + 1, LORA_DTYPE, RANK_MULTIPLE > 1)
    da_ptr = load_address(row_ptr + 2, LORA_DTYPE, K_MULTIPLE > 1)
    rows, k, stride_gn, rank, scaling = load_sizes(row_ptr + 3, K_MULTIPLE, RANK_MULTIPLE)

    # Ranks vary fastest: programs that read the same columns of dW run together, and the L2 cache serves the second.
    tiles_r = tl.cdiv(rank, BLOCK_R)
    r0 = (tile % tiles_r) * BLOCK_R
    k0 = (tile // tiles_r) * BLOCK_K
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    g_ptrs = g_ptr + k0 + offs_n[:, None] * stride_gn + offs_k[None, :]
    b_ptrs = b_ptr + r0 + offs_n[:, None] * rank + offs_r[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for n0 in range(0, rows, BLOCK_N):
        in_n = offs_n[:, None] < rows - n0
        b = tl.load(b_ptrs, mask=in_n & (offs_r[None, :] < rank - r0), other=0.0)  # (BLOCK_N, BLOCK_R)
        g = tl.load(g_ptrs, mask=in_n & (offs_k[None, :] < k - k0), other=0.0)  # (BLOCK_N, BLOCK_K)
        acc = tl.dot(tl.trans(b.to(tl.float32)), g.to(tl.float32), acc, input_precision=PRECISION)
        b_ptrs += BLOCK_N * rank
        g_ptrs += BLOCK_N * stride_gn
    da_ptrs = da_ptr + r0.to(tl.int64) * k + k0 + offs_r[:, None] * k + offs_k[None, :]
    inside = (offs_r[:, None] < rank - r0) & (offs_k[None, :] < k - k0)
    tl.store(da_ptrs, (scaling * acc).to(LORA_DTYPE), mask=inside)


@triton.jit
def lora_merge_grad_b_kernel(
    table_ptr,  # [problems, 8]: dW, A, dB, rows, k, stride of dW's rows, rank, scaling
    tile_ptr,  # [tiles, 2]
    GRAD_DTYPE: tl.constexpr,
    LORA_DTYPE: tl.constexpr,
    K_MULTIPLE: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BLOCK_N, BLOCK_R) tile of dB = s·dW·Aᵀ, summed over all of k by one program."""
    pair_ptr = tile_ptr + 2 * tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(pair_ptr) * 8
    tile = tl.load(pair_ptr + 1)
    g_ptr = load_address(row_ptr, GRAD_DTYPE, K_MULTIPLE > 1)
    a_ptr = load_address(row_ptr + 1, LORA_DTYPE, K_MULTIPLE > 1)
    db_ptr = load_address(row_ptr + 2, LORA_DTYPE, RANK_MULTIPLE > 1)
    rows, k, stride_gn, rank, scaling = load_sizes(row_ptr + 3, K_MULTIPLE, RANK_MULTIPLE)

    tiles_r = tl.cdiv(rank, BLOCK_R)
    r0 = (tile % tiles_r) * BLOCK_R
    n0 = (tile // tiles_r) * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    in_n = offs_n[:, None] < rows - n0
    g_ptrs = g_ptr + n0.to(tl.int64) * stride_gn + offs_n[:, None] * stride_gn + offs_k[None, :]
    a_ptrs = a_ptr + r0.to(tl.int64) * k + offs_r[:, None] * k + offs_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, k, BLOCK_K):
        in_k = offs_k[None, :] < k - k0
        g = tl.load(g_ptrs, mask=in_n & in_k, other=0.0)  # (BLOCK_N, BLOCK_K)
        a = tl.load(a_ptrs, mask=(offs_r[:, None] < rank - r0) & in_k, other=0.0)  # (BLOCK_R, BLOCK_K)
        acc = tl.dot(g.to(tl.float32), tl.trans(a.to(tl.float32)), acc, input_precision=PRECISION)
        g_ptrs += BLOCK_K
        a_ptrs += BLOCK_K
    db_ptrs = db_ptr + n0.to(tl.int64) * rank + r0 + offs_n[:, None] * rank + offs_r[None, :]
    tl.store(db_ptrs, (scaling * acc).to(LORA_DTYPE), mask=in_n & (offs_r[None, :] < rank - r0))


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes, how exactly products are made, and what the compiler is told."""

    block_n: int
    block_k: int
    block_r: int
    precision: str
    num_warps: int = 4
    num_stages: int = 3

    def constants(self, **others: Any) -> dict[str, Any]:
        """Every constant of a launch; ``others`` are the kernel's own."""
        tile = {"BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "BLOCK_R": self.block_r}
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**others, **tile, "PRECISION": self.precision, **options}


def merge_config(lora_dtype: torch.dtype, out_dtype: torch.dtype) -> LaunchConfig:
    """Three or four programs fit an SM by their registers, each with 16 KiB of W on its way."""
    if lora_dtype != torch.float32:
        return LaunchConfig(64, 64, 16, "tf32")
    return LaunchConfig(64, 64, 16, "ieee" if out_dtype == torch.float32 else "tf32x3")


def grad_a_config(rank: int, grad_dtype: torch.dtype, lora_dtype: torch.dtype) -> LaunchConfig:
    """Ranks beyond 32 take several programs: at 64, the operands of tf32x3 alone fill the registers of sm_80."""
    precision = "tf32x3" if torch.float32 in (grad_dtype, lora_dtype) else "tf32"
    return LaunchConfig(32, 64, 16 if rank <= 16 else 32, precision, num_stages=4)


def grad_b_config(rank: int, grad_dtype: torch.dtype, lora_dtype: torch.dtype) -> LaunchConfig:
    """As for A, with the tile turned: it walks along k, by 128 bytes where tf32x3 leaves the registers for it."""
    config = grad_a_config(rank, grad_dtype, lora_dtype)
    return replace(config, block_n=64, block_k=64 if config.precision == "tf32" else 32)


def merge_tiles(rows: int, k: int, config: LaunchConfig) -> int:
    """Tiles of a slice's rows of W."""
    return cover(rows, config.block_n) * cover(k, config.block_k)


def grad_a_tiles(k: int, rank: int, config: LaunchConfig) -> int:
    """Tiles of a slice's dA."""
    return cover(k, config.block_k) * cover(rank, config.block_r)


def grad_b_tiles(rows: int, rank: int, config: LaunchConfig) -> int:
    """Tiles of a slice's dB."""
    return cover(rows, config.block_n) * cover(rank, config.block_r)


def lora_merge(
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    slices: list[int],
    rows: list[int],
    ranks: list[int],
    scaling: list[float],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return W + [s_i · B_i · A_i for each row slice i] of each layer, summed in fp32 and rounded once.

    Args:
        weights: [out_j, in_j] of each layer j; rows may lie apart.
        lora_a: every slice's A of a layer, stacked: [sum of its ranks, in_j].
        lora_b: every slice's B of a layer in row-major order, one after another.
        slices: how many slices each layer has.
        rows, ranks, scaling: of every slice of every layer, in order.
        dtype: of the results.

    Returns:
        [out_j, in_j] of each layer, contiguous. One launch serves all layers of equal dtypes and alignment.
    """
    cut = cut_slices(slices, rows, ranks, scaling)
    check_layers(weights, lora_a, lora_b, cut)
    weights = [row_major(w) for w in weights]
    lora_a, lora_b = [a.contiguous() for a in lora_a], [b.contiguous() for b in lora_b]
    merged = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
    launches = GroupedLaunches()
    for s in cut:
        w, a, k = weights[s.layer], lora_a[s.layer], weights[s.layer].shape[1]
        wide = (address(w, s.row * w.stride(0)), address(merged[s.layer], s.row * k), address(a, s.rank_row * k))
        b_address = address(lora_b[s.layer], s.element)
        config = merge_config(a.dtype, dtype)
        constants = config.constants(
            W_DTYPE=triton_dtype(w.dtype),
            LORA_DTYPE=triton_dtype(a.dtype),
            OUT_DTYPE=triton_dtype(dtype),
            K_MULTIPLE=common_multiple(wide, (k, w.stride(0))),
            RANK_MULTIPLE=common_multiple((b_address,), (s.rank,)),
        )
        row = (*wide, b_address, s.rows, k, w.stride(0), s.rank, float_bits(s.scaling))
        launches.add(lora_merge_kernel, constants, row, merge_tiles(s.rows, k, config))
    if cut:
        launches.run(weights[0].device)
    return merged


def lora_merge_backward(
    grads: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    slices: list[int],
    rows: list[int],
    ranks: list[int],
    scaling: list[float],
) -> list[Tensor]:
    """Return [dA_0, dB_0, dA_1, ...]: dA_i = s_i · B_iᵀ · dW_i and dB_i = s_i · dW_i · A_iᵀ for each row slice i.

    ``grads`` are dW_eff of each layer, [out_j, in_j]; the rest is as in ``lora_merge``. dA has the shape and dtype of
    ``lora_a``, dB of ``lora_b``. Each takes one pass over dW, in launches grouped by dtype, alignment and whether
    ranks exceed 16. One program sums each element, in order: equal inputs give equal bits.
    """
    cut = cut_slices(slices, rows, ranks, scaling)
    check_layers(grads, lora_a, lora_b, cut)
    grads = [row_major(g) for g in grads]
    lora_a, lora_b = [a.contiguous() for a in lora_a], [b.contiguous() for b in lora_b]
    grads_a = [torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in lora_a]
    grads_b = [torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in lora_b]
    launches = GroupedLaunches()
    for s in cut:
        g, dtype, k = grads[s.layer], lora_a[s.layer].dtype, grads[s.layer].shape[1]
        dw = address(g, s.row * g.stride(0))
        a, da = (address(tensors[s.layer], s.rank_row * k) for tensors in (lora_a, grads_a))
        b, db = (address(tensors[s.layer], s.element) for tensors in (lora_b, grads_b))
        sizes = (s.rows, k, g.stride(0), s.rank, float_bits(s.scaling))
        own = {
            "GRAD_DTYPE": triton_dtype(g.dtype),
            "LORA_DTYPE": triton_dtype(dtype),
            "K_MULTIPLE": common_multiple((dw, a, da), (k, g.stride(0))),
            "RANK_MULTIPLE": common_multiple((b, db), (s.rank,)),
        }
        config = grad_a_config(s.rank, g.dtype, dtype)
        tiles = grad_a_tiles(k, s.rank, config)
        launches.add(lora_merge_grad_a_kernel, config.constants(**own), (dw, b, da, *sizes), tiles)
        config = grad_b_config(s.rank, g.dtype, dtype)
        tiles = grad_b_tiles(s.rows, s.rank, config)
        launches.add(lora_merge_grad_b_kernel, config.constants(**own), (dw, a, db, *sizes), tiles)
    if cut:
        launches.run(grads[0].device)
    return [grad for pair in zip(grads_a, grads_b, strict=True) for grad in pair]


def traffic(
    weights: list[Tensor],
    lora_a: list[Tensor],
    slices: list[int],
    rows: list[int],
    ranks: list[int],
    dtype: torch.dtype,
) -> int:
    """Bytes that the programs of ``lora_merge`` load and store, without their tables; ``meta`` tensors will do."""
    total = 0
    for s in cut_slices(slices, rows, ranks, [1.0] * len(rows)):
        w, a = weights[s.layer], lora_a[s.layer]
        config, k = merge_config(a.dtype, dtype), w.shape[1]
        total += s.rows * k * (w.element_size() + dtype.itemsize)
        total += s.rank * k * a.element_size() * cover(s.rows, config.block_n)
        total += s.rank * s.rows * a.element_size() * cover(k, config.block_k)
    return total


def backward_traffic(
    grads: list[Tensor], lora_a: list[Tensor], slices: list[int], rows: list[int], ranks: list[int]
) -> int:
    """As ``traffic``, of ``lora_merge_backward``."""
    total = 0
    for s in cut_slices(slices, rows, ranks, [1.0] * len(rows)):
        g, a = grads[s.layer], lora_a[s.layer]
        for_a, for_b = grad_a_config(s.rank, g.dtype, a.dtype), grad_b_config(s.rank, g.dtype, a.dtype)
        k, tiles_r = g.shape[1], cover(s.rank, for_a.block_r)
        total += 2 * s.rows * k * g.element_size() * tiles_r
        total += s.rank * s.rows * a.element_size() * (cover(k, for_a.block_k) + 1)
        total += s.rank * k * a.element_size() * (cover(s.rows, for_b.block_n) + 1)
    return total


def specimens() -> Iterator[Specimen]:
    """The dtypes that training uses, aligned; and every alignment in fp32, which takes the most registers.

    Gradients in fp16 are bf16's code but for the conversion.
    """
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    merges = [(fp32, fp32, bf16), (fp32, fp32, fp16), (fp32, fp32, fp32), (bf16, bf16, bf16), (fp16, fp16, fp16)]
    merges = [(*dtypes, 8, 8) for dtypes in [*merges, (bf16, fp32, bf16), (fp32, bf16, bf16)]]
    ragged = [(8, 1), (1, 8), (1, 1)]
    merges += [(fp32, fp32, out, *multiples) for out in (bf16, fp32) for multiples in ragged]
    for w, lora, out, k, rank in merges:
        config = merge_config(lora, out)
        constants = config.constants(
            W_DTYPE=triton_dtype(w),
            LORA_DTYPE=triton_dtype(lora),
            OUT_DTYPE=triton_dtype(out),
            K_MULTIPLE=k,
            RANK_MULTIPLE=rank,
        )
        yield grouped_specimen(lora_merge_kernel, constants, tensor_cores=config.precision != "ieee")
    grads = [(*dtypes, 8, 8) for dtypes in [(fp32, fp32), (bf16, bf16), (bf16, fp32)]]
    grads += [(fp32, fp32, *multiples) for multiples in ragged]
    for kernel, choose in ((lora_merge_grad_a_kernel, grad_a_config), (lora_merge_grad_b_kernel, grad_b_config)):
        for grad, lora, k, rank in grads:
            own = {"GRAD_DTYPE": triton_dtype(grad), "LORA_DTYPE": triton_dtype(lora)}
            for widest in (16, 32):
                config = choose(widest, grad, lora)
                yield grouped_specimen(kernel, config.constants(**own, K_MULTIPLE=k, RANK_MULTIPLE=rank))
