"""``csrc/tile_map.h`` in Python: which block makes which tile, how even that is and what it moves."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import numpy as np
from csrc.compiler import compile_cpp

HERE = Path(__file__).parent
FLOAT32 = (0, 0, 0, 0)
TO_BFLOAT16 = (0, 0, 1, 0)
"""Dtypes of A, B, C and D as ``prelora::Dtype`` numbers them."""
BLOCKS = 3
"""On one multiprocessor: ``kBlocksPerMultiprocessor``."""


class Size(NamedTuple):
    """Of a problem; ``beta`` is 0 where D is not read."""

    m: int
    n: int
    k: int
    beta: int = 0


def compile_map(folder: Path) -> ctypes.CDLL:
    """The header as a shared library, built in ``folder``."""
    shim = HERE / "tile_map_shim.cpp"
    library = ctypes.CDLL(str(compile_cpp(folder / "tile_map.so", "-O2", "-shared", "-fPIC", shim)))
    library.count_tiles.restype = ctypes.c_int64
    return library


def _arguments(problems, dtypes):
    flat = [number for size in problems for number in size]
    return (ctypes.c_int64 * len(flat))(*flat), ctypes.c_int64(len(problems)), (ctypes.c_int32 * 4)(*dtypes)


class Tile(NamedTuple):
    """What a block does in one step."""

    block: int
    flat: int
    problem: int
    row: int
    row_end: int
    column: int
    column_end: int
    k: int
    k_end: int


def walk(library, problems, blocks, dtypes=FLOAT32) -> list[Tile]:
    """Every tile that ``blocks`` blocks make, in the order of the blocks."""
    arguments = _arguments(problems, dtypes)
    count = library.count_tiles(*arguments)
    out = np.full((count, len(Tile._fields)), -1, dtype=np.int64)
    library.walk(*arguments, ctypes.c_int64(blocks), out.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
    return [Tile(*map(int, line)) for line in out]


def balance(library, problems, blocks, dtypes=FLOAT32) -> tuple[float, float, float]:
    """Idle shares: grouped, padded, a launch for each problem."""
    out = (ctypes.c_double * 3)()
    library.balance(*_arguments(problems, dtypes), ctypes.c_int64(blocks), out)
    return out[0], out[1], out[2]


def traffic(library, problems, dtypes=FLOAT32) -> tuple[int, int]:
    """Bytes that the grid moves, and those of every matrix once."""
    out = (ctypes.c_int64 * 2)()
    library.traffic(*_arguments(problems, dtypes), out)
    return out[0], out[1]
