"""``Specimen``: one way in which a kernel may be launched, as far as it decides the machine code.

Every kernel module has a function ``specimens()`` that yields one for each launch configuration its heuristic can
pick; ``prelora.kernels.inspect`` compiles them ahead of time, without a GPU, and holds them to their budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Specimen:
    """What ``triton.compile`` needs, and what its result is held to."""

    label: str
    """Kernel, dtype, rank and tile sizes, in a few words."""
    kernel: Any
    """The ``triton.jit`` function."""
    signature: Mapping[str, str]
    """Triton's type of each argument in order: ``"*bf16"``, ``"i32"``, ``"i64"``, ``"fp32"``, or ``"constexpr"``."""
    constants: Mapping[str, Any]
    """Values of the constexpr arguments, and of strides that are 1."""
    num_warps: int
    num_stages: int
    divisible_by_16: frozenset[str] = field(default_factory=frozenset)
    """Arguments known to be multiples of 16 (pointers: 16-byte aligned), as torch's allocations are."""
    tensor_cores: bool = True
    """Whether the inner loop must use tensor-core instructions."""
    asynchronous: bool = True
    """Whether tiles must be brought in by asynchronous copies."""
    wide_loads: bool = True
    """Whether what is aligned must be loaded 16 bytes at a time."""
    max_registers: int = 255
    max_shared: int = 99 * 1024
    """Bytes; 163 KiB are there on sm_80, 227 KiB on sm_90 and sm_100, and two programs should fit."""
