"""GPUs by their data sheets, and how many of them stand in which network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Gpu:
    """Peaks of one kind of GPU."""

    memory: float
    """Bytes; the sheet's GB are taken as 10^9 of them."""
    bandwidth: float
    """Bytes per second, read and written together."""
    peak: Mapping[str, float]
    """FLOP/s of dense matrix products by precision; fp32 without TF32, as torch's default is."""
    link: float
    """NVLink, bytes per second and direction."""
    source: str


def _gpu(memory: float, bandwidth: float, fp32: float, half: float, link: float, source: str) -> Gpu:
    peak = {"fp32": fp32 * TERA, "bf16": half * TERA, "fp16": half * TERA}
    return Gpu(memory * GIGA, bandwidth * GIGA, peak, link * GIGA, source)


_A100 = "NVIDIA A100 Tensor Core GPU data sheet, nvidia-1758950-r4, SXM4 column"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet, SXM column; dense, which is half of the figure with sparsity"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet, SXM column; dense, which is half of the figure with sparsity"

GPUS: dict[str, Gpu] = {
    "A100-40GB": _gpu(40, 1555, 19.5, 312, 300, _A100),
    "A100-80GB": _gpu(80, 2039, 19.5, 312, 300, _A100),
    "H100-80GB": _gpu(80, 3350, 67, 989.5, 450, _H100),
    "H200-141GB": _gpu(141, 4800, 67, 989.5, 450, _H200),
}

PAPERS_GPU: Final = "A100-40GB"
PAPERS_PER_NODE, PAPERS_INTER = 4, 50 * GIGA
"""The paper's machine, which plans are made for unless told otherwise: two adapters of 200 Gb/s a node."""


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes, and what moves bytes between them.

    Raises:
        ValueError: a size that is not positive.
    """

    gpus: int
    per_node: int
    intra: float
    """Bytes per second and direction of one GPU's links inside a node."""
    inter: float
    """Bytes per second and direction of all of a node's adapters together."""
    efficiency: float = 0.8
    """Share of the links' bandwidth that a collective reaches."""
    latency: float = 50e-6
    """Seconds before a collective's first byte has gone round."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value}: must be finite and above 0")

    @property
    def bus(self) -> float:
        """Bytes per second that pass any one point of a ring through all GPUs."""
        narrowest = self.intra if self.gpus <= self.per_node else min(self.intra, self.inter)
        return narrowest * self.efficiency
