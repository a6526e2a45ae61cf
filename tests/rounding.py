"""How far a result of ``prelora._C`` may lie from float64's."""

import torch

HALF_STEP = {torch.float32: 6e-8, torch.bfloat16: 3.95e-3, torch.float16: 4.9e-4}
"""The largest relative error of one rounding."""
DTYPES = [*HALF_STEP]


def assert_rounded(actual, expected, sizes):
    """Up to one rounding to the result's dtype, and fp32's error in a sum of the terms' sizes."""
    error = (actual.double() - expected).abs()

    assert (error <= HALF_STEP[actual.dtype] * expected.abs() + 1e-6 * sizes + 6e-8).all()
