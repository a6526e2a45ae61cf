"""Leading singular values and directions of a matrix from a random sketch of it (Halko, Martinsson and Tropp, 2011).

The test matrix is drawn on the CPU in fp32 from a seed of its own: the same numbers on every device, and no global
random state moves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OVERSAMPLING = 8
"""Columns of the sketch beyond the rank asked for."""
ITERATIONS = 4
"""Of the power iteration, which draws the sketch towards the leading directions where the spectrum falls slowly."""


@torch.no_grad()
def truncated_svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Leading singular values [rank] and right singular vectors [rank, in] of ``matrix`` [out, in], in at least fp32.

    At most min(out, in) of each. A value is never above the true one but for rounding, and near it where the spectrum
    falls: within 4 % for the first one of pure noise, at 1536 × 384.

    Raises:
        ValueError: rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank = {rank}: must be at least 1")
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    columns = min(rank + OVERSAMPLING, *matrix.shape)
    drawn = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(seed))
    basis = _orthonormal(matrix @ drawn.to(matrix))
    for _ in range(ITERATIONS):
        basis = _orthonormal(matrix @ _orthonormal(matrix.t() @ basis))
    _, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return values[:rank], right[:rank]


@torch.no_grad()
def stable_rank(matrix: Tensor, seed: int) -> Tensor:
    """‖M‖_F² / σ₁², a scalar in fp64 on the matrix's device; NaN where M is zero or not finite.

    A matrix of rank r holds at most r / stable_rank of M's energy ‖M‖_F²: a stable rank above r rules out that rank r
    follows M, and one below it does not promise it. It is chosen over the rank that holds a share of the energy because
    a window's change carries noise of full rank that LoRA need not follow, and because two numbers suffice, not a
    spectrum as wide as the answer. The sketch's σ₁ is from below, and the rank from above.
    """
    scale = matrix.abs().amax()
    if not (math.isfinite(scale) and scale > 0):
        return torch.full((), math.nan, dtype=torch.float64, device=matrix.device)
    scaled = matrix.to(torch.promote_types(matrix.dtype, torch.float32)) / scale
    energy = torch.linalg.vector_norm(scaled, dtype=torch.float64).square()
    return (energy / truncated_svd(scaled, 1, seed)[0][0].double().square()).clamp_min(1.0)


@torch.no_grad()
def leading_directions(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Leading right singular vectors [found, in] of ``matrix`` [out, in], orthonormal, in at least fp32.

    Fewer than ``rank`` where the matrix's rank is lower, by the usual tolerance max(out, in)·ε·σ₁; none where it is
    zero or not finite.
    """
    scale = matrix.abs().amax()
    if not (math.isfinite(scale) and scale > 0):
        return matrix.new_empty(0, matrix.shape[1], dtype=torch.promote_types(matrix.dtype, torch.float32))
    values, right = truncated_svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)) / scale, rank, seed)
    tolerance = max(matrix.shape) * torch.finfo(values.dtype).eps * values[0]
    return right[: int((values > tolerance).sum())]


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q
