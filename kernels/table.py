"""Tables for grouped launches: one launch serves many problems of different shapes.

A grouped kernel's program reads from ``tile_ptr`` which problem it serves and which of the problem's tiles, then the
problem's addresses and sizes from its row of int64 numbers in ``table_ptr``. Both are built on the host and copied
once: the copies are cached under *everything they contain*, addresses included, so no copy can be stale. A tensor that
moves gives another key; one that dies and leaves its address to another of the same sizes gives the same, right, row.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from prelora.kernels.specimen import Specimen
from torch import Tensor

VECTOR = 8
"""Elements that take 16 bytes or more in every dtype here."""

CACHED_COPIES = 64
"""A grouped launch uses two, of some 300 KB together for a hundred large layers."""

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What grouped kernels read and write."""


class Slice(NamedTuple):
    """Rows of one layer with an update of their own, and where their part of W, A and the packed B begins."""

    layer: int
    row: int
    rows: int
    rank_row: int
    element: int
    rank: int
    scaling: float


def cut_slices(
    slices: Sequence[int], rows: Sequence[int], ranks: Sequence[int], scaling: Sequence[float]
) -> list[Slice]:
    """Every slice of every layer, in order; layer j has ``slices[j]`` of them, the other lists run over them all."""
    if not sum(slices) == len(rows) == len(ranks) == len(scaling):
        raise ValueError(
            f"{sum(slices)} slices in all need as many rows, ranks and scalings, got {len(rows)}, {len(ranks)} and "
            f"{len(scaling)}"
        )
    cut: list[Slice] = []
    for layer, count in enumerate(slices):
        row = rank_row = element = 0
        for i in range(len(cut), len(cut) + count):
            cut.append(Slice(layer, row, rows[i], rank_row, element, ranks[i], scaling[i]))
            row, rank_row, element = row + rows[i], rank_row + ranks[i], element + rows[i] * ranks[i]
    return cut


def check_layers(
    weights: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], cut: Sequence[Slice]
) -> None:
    """Raise where the slices of ``cut`` do not make up the layers: a kernel would read beside them."""
    totals = [[0, 0, 0] for _ in weights]
    for s in cut:
        totals[s.layer] = [s.row + s.rows, s.rank_row + s.rank, s.element + s.rows * s.rank]
    for layer, (w, a, b, (rows, rank, elements)) in enumerate(zip(weights, lora_a, lora_b, totals, strict=True)):
        if (*w.shape, *a.shape, b.numel()) != (rows, w.shape[-1], rank, w.shape[-1], elements):
            raise ValueError(
                f"layer {layer}: slices of {rows} rows and rank {rank} in all need W [{rows}, in], A [{rank}, in] and "
                f"{elements} elements of B, got {list(w.shape)}, {list(a.shape)} and {b.numel()}"
            )
        devices = {w.device, a.device, b.device, weights[0].device}
        if a.dtype != b.dtype or len(devices) > 1:
            raise ValueError(
                f"layer {layer}: A and B of one dtype and all layers on one device, not {a.dtype} and {b.dtype} on "
                f"{', '.join(sorted(map(str, devices)))}"
            )


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of ``dtype``."""
    if dtype not in DTYPES:
        raise TypeError(f"grouped kernels take {', '.join(map(str, DTYPES))}, not {dtype}")
    return DTYPES[dtype]


def row_major(tensor: Tensor) -> Tensor:
    """``tensor`` [rows, columns] itself where its rows are contiguous, however far apart; else a copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def address(tensor: Tensor, offset: int) -> int:
    """Where the element stands that is ``offset`` elements after the first."""
    return tensor.data_ptr() + offset * tensor.element_size()


def cover(size: int, block: int) -> int:
    """How many blocks cover ``size``; ``triton.cdiv`` takes 2 µs, which a launch over 144 problems would notice."""
    return -(-size // block)


def common_multiple(addresses: Sequence[int], sizes: Sequence[int]) -> int:
    """VECTOR where addresses and sizes allow accesses of 16 bytes throughout, else 1."""
    return 1 if any(a % 16 for a in addresses) or any(size % VECTOR for size in sizes) else VECTOR


def on_device(device: torch.device) -> torch.cuda.device:
    """The context in which kernels run on ``device``: nothing to do on a CPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


class GroupedLaunches:
    """Problems gathered by kernel and constants; each such group is then one launch."""

    def __init__(self) -> None:
        self.groups: dict[tuple, tuple[list[tuple[int, ...]], list[int]]] = {}

    def add(self, kernel: Any, constants: dict[str, Any], row: tuple[int, ...], tiles: int) -> None:
        """A problem that ``row`` of the table describes and that takes ``tiles`` programs."""
        rows, counts = self.groups.setdefault((kernel, *constants.items()), ([], []))
        rows.append(row)
        counts.append(tiles)

    def run(self, device: torch.device) -> None:
        """Launch every group that has any tiles."""
        with on_device(device):
            for (kernel, *constants), (rows, counts) in self.groups.items():
                if grid := sum(counts):
                    kernel[(grid,)](device_table(rows, device), device_tiles(counts, device), **dict(constants))


def grouped_specimen(kernel: Any, constants: dict[str, Any], **budget: Any) -> Specimen:
    """Of a kernel that takes ``table_ptr``, ``tile_ptr`` and ``constants``, as ``GroupedLaunches.add`` has them.

    Where all sizes allow it, accesses are wide and three programs of 4 warps fit an SM.
    """
    own = {name: value for name, value in constants.items() if name not in ("num_warps", "num_stages")}
    multiples = [value for name, value in own.items() if name.endswith("_MULTIPLE")]
    aligned = all(multiple > 1 for multiple in multiples)
    dtypes = "/".join(str(value) for name, value in own.items() if name.endswith("_DTYPE"))
    tile = "x".join(str(value) for name, value in own.items() if name.startswith("BLOCK_"))
    sizes = "" if aligned else f" multiples of {', '.join(map(str, multiples))}"
    return Specimen(
        label=f"{kernel.__name__.removesuffix('_kernel')} {dtypes} {tile} {own['PRECISION']}{sizes}",
        kernel=kernel,
        signature={"table_ptr": "*i64", "tile_ptr": "*i32", **dict.fromkeys(own, "constexpr")},
        constants=own,
        num_warps=constants["num_warps"],
        num_stages=constants["num_stages"],
        divisible_by_16=frozenset({"table_ptr", "tile_ptr"}) if aligned else frozenset(),
        max_registers=168 if aligned else 255,
        **budget,
    )


@triton.jit
def load_address(ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of ``DTYPE`` stored at ``ptr``; ALIGNED promises that it is a multiple of 16 bytes."""
    address = tl.load(ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def load_size(ptr, MULTIPLE: tl.constexpr):
    """The size stored at ``ptr``, promised to be a multiple of ``MULTIPLE``."""
    return tl.multiple_of(tl.load(ptr).to(tl.int32), MULTIPLE)


@triton.jit
def load_float(ptr):
    """The number that ``float_bits`` stored at ``ptr``."""
    return tl.load(ptr).to(tl.int32).to(tl.float32, bitcast=True)


def float_bits(value: float) -> int:
    """The bits of ``value``, rounded to fp32, as an integer for a table."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def tile_pairs(counts: Sequence[int]) -> Tensor:
    """The (problem, tile within the problem) of every flat tile, in order: int32 [sum of counts, 2].

    Looking it up costs a program one load that the L2 cache serves; a binary search over prefix sums would cost
    log2(problems) of them, each waiting for the one before.
    """
    tiles = torch.tensor(counts, dtype=torch.int64)
    problem = torch.arange(len(counts)).repeat_interleave(tiles)
    first = (tiles.cumsum(0) - tiles)[problem]
    return torch.stack([problem, torch.arange(len(problem)) - first], dim=1).to(torch.int32)


def device_table(rows: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """One row of int64 numbers for each problem, on ``device``: [problems, columns]."""
    return _copy("table", tuple(rows), device, _stream(device))


def device_tiles(counts: Sequence[int], device: torch.device) -> Tensor:
    """``tile_pairs`` on ``device``."""
    return _copy("tiles", tuple(counts), device, _stream(device))


@functools.lru_cache(maxsize=CACHED_COPIES)
def _copy(kind: str, content: tuple, device: torch.device, stream: int) -> Tensor:
    """``stream`` is part of the key: a copy comes before what its own stream runs next, and before nothing else."""
    host = tile_pairs(content) if kind == "tiles" else torch.tensor(content, dtype=torch.int64)
    if device.type != "cuda":
        return host
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a grouped launch copies addresses to the device: it cannot be part of a captured CUDA graph"
        )
    return host.pin_memory().to(device, non_blocking=True)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
