"""Sketched singular values, directions and stable ranks are those of a float64 SVD, on any shape."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelora.sketch import leading_directions, stable_rank, truncated_svd


@st.composite
def planted(draw, noise):
    """(matrix of odd shape in float64, its planted rank); the planted values fall from 1 to about 0.1."""
    out, inside = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    rank = draw(st.integers(1, min(out, inside, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    left, right = (
        torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q for n in (out, inside)
    )
    matrix = left * torch.linspace(1, 0.1, rank, dtype=torch.float64) @ right.t()
    strength = draw(st.sampled_from(noise))
    return matrix + strength * torch.randn(out, inside, generator=generator, dtype=torch.float64), rank


@given(
    planted(noise=[0.0, 1e-3, 0.1, 10.0]), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**63 - 1)
)
@settings(max_examples=60, deadline=None)
def test_the_stable_rank_is_never_below_the_true_one_and_little_above(case, dtype, seed):
    matrix = case[0].to(dtype)
    values = torch.linalg.svdvals(matrix.double())
    expected = (values.square().sum() / values[0] ** 2).item()

    found = stable_rank(matrix, seed).item()

    assert expected * (1 - 1e-5) <= found <= expected * 1.15


@given(planted(noise=[0.0]), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_values_and_directions_of_a_low_rank_matrix_are_the_svds(case, dtype, wanted):
    matrix, rank = case
    kept = min(rank, wanted)

    values, right = truncated_svd(matrix.to(dtype), wanted, seed=1)

    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert len(values) == len(right) == min(wanted, *matrix.shape)
    assert torch.allclose(values[:kept].double(), torch.linalg.svdvals(matrix)[:kept], atol=tolerance, rtol=0)
    # Each planted value is apart from the others, so that each direction is defined, up to its sign.
    expected = torch.linalg.svd(matrix).Vh[:kept]
    assert torch.allclose((right[:kept].double() * expected).sum(1).abs(), torch.ones(kept).double(), atol=tolerance)


@given(planted(noise=[0.0]), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_as_many_directions_as_the_matrix_has_span_its_rows(case, wanted):
    matrix, rank = case

    found = leading_directions(matrix, wanted, seed=2)

    assert len(found) == min(rank, wanted)
    assert torch.allclose(found @ found.t(), torch.eye(len(found)).double(), atol=1e-9)
    if wanted >= rank:
        assert torch.allclose(matrix @ found.t() @ found, matrix, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_stable_rank_does_not_hang_on_the_scale(scale):
    matrix = torch.randn(17, 29, generator=torch.Generator().manual_seed(0))

    assert stable_rank(matrix * scale, 3).item() == pytest.approx(stable_rank(matrix, 3).item(), rel=1e-4)
    assert len(leading_directions(matrix * scale, 5, 3)) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_sketched_in_fp32(dtype):
    matrix = torch.randn(33, 21, generator=torch.Generator().manual_seed(0)).to(dtype)

    assert stable_rank(matrix, 0).item() == pytest.approx(stable_rank(matrix.float(), 0).item())
    assert leading_directions(matrix, 4, 0).dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_matrix_that_is_zero_or_not_finite_has_neither_rank_nor_directions(value):
    matrix = torch.zeros(5, 7)
    matrix[2, 3] = value

    assert math.isnan(stable_rank(matrix, 0))
    assert leading_directions(matrix, 3, 0).shape == (0, 7)


def test_a_seed_is_the_same_sketch_every_time_and_no_global_random_state_moves():
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()

    first, again, other = (truncated_svd(matrix, 3, seed)[0] for seed in (5, 5, 6))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank = {rank}: must be at least 1"):
        truncated_svd(torch.ones(3, 3), rank, 0)
