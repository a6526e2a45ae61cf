"""Padded sizes, and the small padded copies of A and B that let the kernels' inner loops go without rank masks.

``tl.dot`` contracts over at least 16 elements of 16 bits and 8 of 32, and ``tl.arange`` counts to powers of two, so a
rank is padded to a power of two of at least 16. A and B are tiny beside activations: the launchers copy them into
zero-filled buffers of whole tiles, in the compute dtype; zeros add nothing to a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_RANK = 16
MAX_RANK = 128
"""Largest rank of a slice; beyond it a plain GEMM is the better kernel."""
MAX_TILE = 256
"""Widest tile over the ranks of all slices: 64 x 256 fp32 sums are 64 registers of each of 256 threads."""
MAX_SLICES = 3

ROW_ENDS = ("row_end_0", "row_end_1", "row_end_2")
SLICE_SIGNATURE = dict.fromkeys((*ROW_ENDS, "rank_end_0", "rank_end_1", "rank_end_2"), "i32")
SCALE_SIGNATURE = dict.fromkeys(("scale_0", "scale_1", "scale_2"), "fp32")
"""Arguments of the kernels that serve several slices, in order, for ``Specimen.signature``."""


def slices_refusal(rows: Sequence[int], ranks: Sequence[int]) -> str | None:
    """Why the kernels cannot serve these slices; None: they can."""
    if not 1 <= len(rows) <= MAX_SLICES:
        return f"{len(rows)} row slices: the kernels take 1 to {MAX_SLICES}"
    if not all(1 <= rank <= MAX_RANK for rank in ranks):
        return f"ranks {tuple(ranks)}: the kernels take 1 to {MAX_RANK}"
    return None


@dataclass(frozen=True)
class Slices:
    """Row slices of one weight, as the launchers take them."""

    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.rows) == len(self.ranks) == len(self.scaling):
            raise ValueError(f"{len(self.rows)} row slices, {len(self.ranks)} ranks, {len(self.scaling)} scalings")
        if reason := slices_refusal(self.rows, self.ranks):
            raise ValueError(reason)

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def rank(self) -> int:
        """R, the sum of the ranks: columns of S and dS."""
        return sum(self.ranks)

    @property
    def size_b(self) -> int:
        """Elements of all B_i."""
        return sum(n * r for n, r in zip(self.rows, self.ranks, strict=True))

    @property
    def block_rank(self) -> int:
        """Padded rank of every slice: that of the largest."""
        return padded_rank(max(self.ranks))

    @property
    def granule(self) -> int:
        """Largest power of two up to 8 that divides every rank.

        Triton knows of an integer argument only whether 16 divides it. Ranks passed in granules of 8 and multiplied by
        a constant 8 are known to be multiples of 8, which is what 16-byte accesses to S and dS need.
        """
        return next(size for size in (8, 4, 2, 1) if all(rank % size == 0 for rank in self.ranks))

    def row_ends(self) -> tuple[int, ...]:
        """Where each slice's rows end, ``MAX_SLICES`` numbers."""
        return _ends(self.rows)

    def rank_ends(self) -> tuple[int, ...]:
        """Where each slice's columns of S end, in granules, ``MAX_SLICES`` numbers."""
        return _ends([rank // self.granule for rank in self.ranks])

    def scales(self) -> tuple[float, ...]:
        """s_i of each slice, ``MAX_SLICES`` numbers."""
        return tuple(float(s) for s in self.scaling) + (1.0,) * (MAX_SLICES - self.count)


def slices_of(rows: Sequence[int], ranks: Sequence[int], scaling: Sequence[float]) -> Slices:
    """``Slices`` of any sequences."""
    return Slices(tuple(rows), tuple(ranks), tuple(scaling))


@dataclass(frozen=True)
class Case:
    """Dtype, slices and dropout of a specimen: what every kernel of the low-rank path is compiled for."""

    dtype: torch.dtype
    precision: str
    slices: Slices
    dropping: bool = False

    @property
    def element(self) -> str:
        """Triton's name of the dtype."""
        return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]

    @property
    def label(self) -> str:
        name = "tf32" if self.precision == "tf32" else self.element
        return f"{name} {self.slices.count}x{self.slices.block_rank}" + self.dropping * " dropout"

    @property
    def tensor_cores(self) -> bool:
        return self.dtype != torch.float32 or self.precision == "tf32"


def cases(dropout: bool) -> Iterator[Case]:
    """Each padded rank of one slice and of three, by dtype; with ``dropout``, also that.

    fp16 is bf16 with another letter in its instructions, so that one rank stands for all; so it is with tf32 slices.
    """
    for rank in (16, 32, 64, 128):
        one, three = (slices_of([1024] * count, [rank] * count, [1.0] * count) for count in (1, 3))
        for slices in (one, three):
            yield Case(torch.bfloat16, "ieee", slices)
            if dropout:
                yield Case(torch.bfloat16, "ieee", slices, dropping=True)
            yield Case(torch.float32, "ieee", slices)
        yield Case(torch.float32, "tf32", one)
        if rank == 32:
            yield Case(torch.float16, "ieee", one)


def padded_rank(rank: int) -> int:
    """The power of two, at least 16, that a rank is padded to."""
    return max(MIN_RANK, 1 << (rank - 1).bit_length())


def rank_tiles(rank: int) -> tuple[int, int]:
    """(tiles, width of each) that cover R columns of S: a single one up to ``MAX_TILE``, so that x is read once."""
    tiles = triton.cdiv(rank, MAX_TILE)
    return tiles, padded_rank(triton.cdiv(rank, tiles))


def whole(size: int, block: int) -> int:
    """``size`` rounded up to whole blocks."""
    return triton.cdiv(size, block) * block


def pack_a(lora_a: Tensor, dtype: torch.dtype, block_k: int, width: int) -> Tensor:
    """Aᵀ in zeros: [in, in whole blocks; R, in ``width`` columns], rank contiguous."""
    rank, features = lora_a.shape
    packed = lora_a.new_zeros((whole(features, block_k), width), dtype=dtype)
    packed[:features, :rank] = lora_a.t()
    return packed


def pack_b(lora_b: Tensor, slices: Slices, dtype: torch.dtype, block_n: int, scaled: bool) -> Tensor:
    """Each B_i, or s_i·B_i, in zeros: [slices; rows of the longest, in whole blocks; padded rank]."""
    shape = (slices.count, whole(max(slices.rows), block_n), slices.block_rank)
    packed = lora_b.new_zeros(shape, dtype=dtype)
    sizes = [n * r for n, r in zip(slices.rows, slices.ranks, strict=True)]
    blocks = lora_b.reshape(-1).split(sizes)
    for out, block, n, r, s in zip(packed, blocks, slices.rows, slices.ranks, slices.scaling, strict=True):
        out[:n, :r] = s * block.view(n, r) if scaled and s != 1 else block.view(n, r)
    return packed


def strides(tensor: Tensor | None) -> tuple[int, int]:
    """Both strides of a matrix; zeros of one that is not there, whose loads are compiled away."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def precision_of(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: tf32 only where torch itself may use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _ends(sizes: Sequence[int]) -> tuple[int, ...]:
    ends = list(accumulate(sizes))
    return tuple(ends + ends[-1:] * (MAX_SLICES - len(ends)))


@triton.jit
def slice_bounds(index, end_0, end_1, end_2, SLICES: tl.constexpr):
    """Where slice ``index`` of ``SLICES`` consecutive ones starts and ends."""
    if SLICES == 1:
        start = 0
        end = end_0
    else:
        start = tl.where(index == 0, 0, tl.where(index == 1, end_0, end_1))
        end = tl.where(index == 0, end_0, tl.where(index == 1, end_1, end_2))
    return start, end


@triton.jit
def slice_scale(index, scale_0, scale_1, scale_2):
    """s_i of slice ``index``."""
    return tl.where(index == 0, scale_0, tl.where(index == 1, scale_1, scale_2))


@triton.jit
def slice_tile(tile, row_end_0, row_end_1, row_end_2, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    """Slice of a tile of ``BLOCK`` rows, and its number in there; a tile never crosses into the next slice."""
    tiles_0 = tl.cdiv(row_end_0, BLOCK)
    tiles_1 = tiles_0 + tl.cdiv(row_end_1 - row_end_0, BLOCK)
    index = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_1).to(tl.int32)
    if SLICES == 1:
        index = 0
    return index, tile - tl.where(index == 0, 0, tl.where(index == 1, tiles_0, tiles_1))
