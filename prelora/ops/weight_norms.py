"""``weight_norms``: Frobenius norms of many tensors in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prelora.ops.support import cpu_refusal, triton_refusal
from prelora.registry import autocast, define


@define
def weight_norms(tensors: Sequence[Tensor], squared: bool) -> Tensor:
    """Return ‖T‖ of each tensor, or ‖T‖², summed in at least fp32.

    Args:
        tensors: of any shapes and dtypes, one or more; a row slice is a view.
        squared: sums of squares, to be added up over shards before the root is taken.

    Returns:
        [number of tensors], fp32, or fp64 if any tensor is. No gradient.
    """
    squares = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square().sum() for tensor in tensors]
    wide = torch.float64 if any(square.dtype == torch.float64 for square in squares) else torch.float32
    sums = torch.stack([square.to(wide) for square in squares])
    return sums if squared else sums.sqrt()


autocast(weight_norms, lambda dtype, *args: args)
weight_norms.provider("cpu", "prelora.ops.cpu", cpu_refusal)
weight_norms.provider("triton", "prelora.kernels.weight_norms", triton_refusal)
