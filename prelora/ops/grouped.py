"""Providers that are grouped products by ``prelora._C``, on CPU and CUDA: one call for all slices of all layers.

Layers of different dtypes or devices, and products whose factors are swapped in dtype, take a call each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prelora import _ext
from prelora.ops.group_checks import check_groups, check_overlaps
from prelora.ops.slices import by_layer, split_lora

_ext.reason()  # loads what is called here; where it cannot be, no provider is served


def grouped_gemm(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    alpha: Sequence[float],
    beta: Sequence[float],
    trans_a: Sequence[bool],
    trans_b: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """See ``prelora.ops.grouped_gemm``."""
    check_groups(a, b, d, alpha, beta, trans_a, trans_b)
    sizes = zip(a, b, trans_a, trans_b, strict=True)
    out = [
        torch.empty(a_i.shape[1 if ta else 0], b_i.shape[0 if tb else 1], dtype=dtype, device=a_i.device)
        for a_i, b_i, ta, tb in sizes
    ]
    if out:
        torch.ops.prelora_C.grouped_gemm_(a, b, d, out, alpha, beta, trans_a, trans_b)
    return out


def grouped_gemm_(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    out: Sequence[Tensor],
    alpha: Sequence[float],
    beta: Sequence[float],
    trans_a: Sequence[bool],
    trans_b: Sequence[bool],
) -> None:
    """See ``prelora.ops.grouped_gemm_``."""
    check_groups(a, b, d, alpha, beta, trans_a, trans_b, out)
    check_overlaps(a, b, d, out)
    if out:
        torch.ops.prelora_C.grouped_gemm_(a, b, d, out, alpha, beta, trans_a, trans_b)


def lora_merge(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    slices: Sequence[int],
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    dtype: torch.dtype,
) -> list[Tensor]:
    """See ``prelora.ops.lora_merge``; every W is read once and every result written once, in ``dtype``."""
    merged = [_new(w, dtype) for w in weights]
    calls = _Calls()
    layers = by_layer(slices, rows, ranks, scaling)
    for w, out, a, b, (n, r, s) in zip(weights, merged, lora_a, lora_b, layers, strict=True):
        pairs = _pairs(a, b, n, r)
        calls.of(b, a, w).extend(
            (b_i, a_i, w_i, out_i, s_i, False, False)
            for w_i, out_i, (a_i, b_i), s_i in zip(_rows(w, n), _rows(out, n), pairs, s, strict=True)
        )
    for left, right, d, outs, alpha, *trans in calls.columns():
        torch.ops.prelora_C.grouped_gemm_(left, right, d, outs, alpha, [1.0] * len(d), *trans)
    return merged


def lora_merge_backward(
    grads: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    slices: Sequence[int],
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
) -> list[Tensor]:
    """See ``prelora.ops.lora_merge``; a slice's two products stand side by side, so that the second finds dW cached.

    To a 16-bit dW, A and B are cast: two factors of one dtype are one call, and 16-bit instructions multiply them.
    """
    gradients: list[Tensor] = []
    calls = _Calls()
    layers = by_layer(slices, rows, ranks, scaling)
    for grad, a, b, (n, r, s) in zip(grads, lora_a, lora_b, layers, strict=True):
        da, db = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, b))
        a, b = (x.to(grad.dtype) if grad.dtype.itemsize < 4 else x for x in (a, b))
        of_a, of_b = calls.of(b, grad, da), calls.of(grad, a, db)
        pairs, outs = _pairs(a, b, n, r), _pairs(da, db, n, r)
        for dw_i, (a_i, b_i), (da_i, db_i), s_i in zip(_rows(grad, n), pairs, outs, s, strict=True):
            of_a.append((b_i, dw_i, None, da_i, s_i, True, False))
            of_b.append((dw_i, a_i, None, db_i, s_i, False, True))
        gradients += [da, db]
    for left, right, _, written, alpha, *trans in calls.columns():
        torch.ops.prelora_C.grouped_gemm_(left, right, [], written, alpha, [], *trans)
    return gradients


def merged_norms(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    slices: Sequence[int],
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    squared: bool,
) -> Tensor:
    """See ``prelora.ops.merged_norms``; the sums are squared as they are made, and never written."""
    calls = _Calls()
    layers = by_layer(slices, rows, ranks, scaling)
    index = 0
    for w, a, b, (n, r, s) in zip(weights, lora_a, lora_b, layers, strict=True):
        call = calls.of(b, a, w)
        for w_i, (a_i, b_i), s_i in zip(_rows(w, n), _pairs(a, b, n, r), s, strict=True):
            call.append((b_i, a_i, w_i, index, s_i, False, False))
            index += 1
    order: list[int] = []
    squares: list[Tensor] = []
    for left, right, d, indices, alpha, *trans in calls.columns():
        order += indices
        squares.append(torch.ops.prelora_C.grouped_squares(left, right, d, alpha, [1.0] * len(d), *trans))
    sums = torch.cat(squares)
    if len(squares) > 1:
        sums = sums[torch.tensor(order, device=sums.device).argsort()]
    return (sums if squared else sums.sqrt()).float()


def _new(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for an effective weight; a CPU keeps it for the next step's, as torch does on CUDA."""
    if weight.device.type != "cpu":
        return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.ops.prelora_C.empty_kept(*weight.shape, dtype)


class _Calls:
    """Groups (A, B, D, C, alpha, trans_a, trans_b), gathered into one call for each device and choice of dtypes."""

    def __init__(self) -> None:
        self.groups: dict[tuple, list[tuple]] = {}

    def of(self, *tensors: Tensor) -> list[tuple]:
        """The groups of the call that products of tensors like these belong to."""
        return self.groups.setdefault((tensors[0].device, *(tensor.dtype for tensor in tensors)), [])

    def columns(self) -> Iterator[list[list]]:
        """The lists that a core takes, of each call."""
        for groups in self.groups.values():
            yield [list(column) for column in zip(*groups, strict=True)]


# A view takes a microsecond and ``Tensor.split`` four: a layer of one slice, as most are, does with one view.


def _pairs(lora_a: Tensor, lora_b: Tensor, rows: Sequence[int], ranks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """As ``split_lora``, each A_i with contiguous rows."""
    lora_a = _row_major(lora_a)
    if len(rows) == 1:
        return [(lora_a, lora_b.reshape(rows[0], ranks[0]))]
    return split_lora(lora_a, lora_b, rows, ranks)


def _rows(tensor: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    """The row slices of a matrix, which is copied if its rows are not contiguous."""
    tensor = _row_major(tensor)
    return [tensor] if len(rows) == 1 else torch.split_with_sizes(tensor, list(rows))


def _row_major(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()
