"""The ``cpu`` provider of every operator: library GEMMs, arranged to touch activations and weights least.

Against the references: results are written where they belong, s_i goes into the small factor, nothing is copied
to be concatenated, and wide sums are made only of what is not wide already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prelora import ops
from prelora.ops.dropout import drop
from prelora.ops.gemm import product
from prelora.ops.slices import by_layer, split_b, split_lora
from prelora.ops.support import extension_cpu_refusal


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
    """See ``prelora.ops.lora_merge``; to a 16-bit dtype W is cast first, as autocast would, and added to in place."""
    merged = []
    layers = by_layer(slices, rows, ranks, scaling)
    for weight, a, b, (n, r, s) in zip(weights, lora_a, lora_b, layers, strict=True):
        wide = torch.promote_types(weight.dtype, torch.float32)
        narrow = wide == torch.float32 and dtype.itemsize < 4
        factors = dtype if narrow else wide
        base = weight.to(factors)
        # What was cast is ours to write into; a sum of its own saves no pass, but a tensor of the weight's size.
        out = base if base is not weight else torch.empty_like(base, memory_format=torch.contiguous_format)
        pairs = split_lora(a.to(factors), b.to(factors), n, r)
        for w_i, o_i, (a_i, b_i), s_i in zip(base.split(list(n)), out.split(list(n)), pairs, s, strict=True):
            torch.addmm(w_i, b_i, a_i, alpha=s_i, out=o_i)
        merged.append(out.to(dtype))
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
    """See ``prelora.ops.lora_merge``; of a 16-bit gradient the products are 16-bit, with fp32 sums."""
    gradients = []
    layers = by_layer(slices, rows, ranks, scaling)
    for grad, a, b, (n, r, s) in zip(grads, lora_a, lora_b, layers, strict=True):
        da, db = torch.empty_like(a), torch.empty_like(b)
        pairs, outs = split_lora(a, b, n, r), split_lora(da, db, n, r)
        for dw, (a_i, b_i), (da_i, db_i), s_i in zip(grad.split(list(n)), pairs, outs, s, strict=True):
            da_i.copy_(product((s_i * b_i).t().to(dw.dtype), dw.t()))
            db_i.copy_(product(dw, (s_i * a_i).to(dw.dtype)))
        gradients += [da, db]
    return gradients


def lora_linear(
    x: Tensor,
    w_eff: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
) -> Tensor:
    """See ``prelora.ops.lora_linear``."""
    y = product(_flat(x), w_eff, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], w_eff.shape[0])


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    w_eff: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    need: Sequence[bool],
) -> list[Tensor]:
    """See ``prelora.ops.lora_linear``."""
    need_x, need_weight, need_bias, need_a, need_b = need
    grads = []
    dy2, x2 = _flat(dy), None if x is None else _flat(x)
    if need_x:
        assert w_eff is not None
        grads.append(product(dy2, w_eff.t()).view(*dy.shape[:-1], w_eff.shape[1]))
    if need_weight:
        assert x2 is not None
        dw = torch.mm(dy2.t(), x2)
        grads.append(dw)
    if need_bias:
        grads.append(dy2.sum(0))
    if not (need_a or need_b):
        return grads
    if need_weight:
        da, db = ops.lora_merge_backward([dw], [lora_a], [lora_b], [len(rows)], rows, ranks, scaling)
        return grads + [grad for grad, needed in ((da, need_a), (db, need_b)) if needed]
    layout, s2 = (rows, ranks, scaling), None if s is None else _flat(s)
    return grads + _adapter_gradients(dy2, x2, s2, None, lora_a, lora_b, *layout, need_a, need_b)


def lora_two_path(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See ``prelora.ops.lora_two_path``."""
    x2 = _flat(x)
    h = product(drop(x2, seed, dropout), lora_a.to(x.dtype))
    # As nn.Linear does it: where B is zero, the result is nn.Linear's bit for bit.
    y = F.linear(x2, weight, None if bias is None else bias.to(x.dtype))
    blocks = split_b(lora_b.to(x.dtype), rows, ranks)
    shares = zip(y.split(list(rows), 1), h.split(list(ranks), 1), blocks, scaling, strict=True)
    for y_i, h_i, b_i, s_i in shares:
        y_i.addmm_(h_i, b_i.t(), alpha=s_i)
    return y.view(*x.shape[:-1], y.shape[1]), h.view(*x.shape[:-1], h.shape[1])


def lora_two_path_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    need: Sequence[bool],
) -> list[Tensor]:
    """See ``prelora.ops.lora_two_path``."""
    need_x, need_weight, need_bias, need_a, need_b = need
    grads = []
    dy2, x2 = _flat(dy), None if x is None else _flat(x)
    ds = None
    if need_x:
        assert weight is not None
        ds = _shrunk_gradient(dy2, lora_b, rows, ranks, scaling)
        dx = product(dy2, weight.t())
        a = lora_a.to(dy.dtype)
        if seed is None:
            dx.addmm_(ds, a)
        else:
            dx += drop(torch.mm(ds, a), seed, dropout)
        grads.append(dx.view(*dy.shape[:-1], dx.shape[1]))
    if need_weight:
        assert x2 is not None
        grads.append(torch.mm(dy2.t(), x2))
    if need_bias:
        grads.append(dy2.sum(0))
    if need_a:
        assert x2 is not None
        x2 = drop(x2, seed, dropout)
    if need_a or need_b:
        layout = rows, ranks, scaling
        grads += _adapter_gradients(dy2, x2, _flat(h), ds, lora_a, lora_b, *layout, need_a, need_b)
    return grads


def weight_norms(tensors: Sequence[Tensor], squared: bool) -> Tensor:
    """See ``prelora.ops.weight_norms``."""
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    out = torch.empty(len(tensors), dtype=wide)
    for i, tensor in enumerate(tensors):
        # Row by row first: over 4 million elements at once, the fp32 sum is off by 8e-5; so it is by 3e-8.
        partial = torch.linalg.vector_norm(tensor, dim=-1, dtype=wide) if tensor.dim() > 1 else tensor
        torch.linalg.vector_norm(partial, dtype=wide, out=out[i])
    return out.square_() if squared else out


def _flat(tensor: Tensor) -> Tensor:
    """[tokens, features], contiguous: every product that follows wants it so."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _shrunk_gradient(
    dy: Tensor, lora_b: Tensor, rows: Sequence[int], ranks: Sequence[int], scaling: Sequence[float]
) -> Tensor:
    """dS [tokens, sum of ranks], dS_i = s_i · dy_i · B_i."""
    parts = dy.split(list(rows), 1)
    if len(rows) > 1 and dy.shape[0] > 0 and extension_cpu_refusal(dy, lora_b) is None:
        # The library would copy each dy_i first, which takes several times as long as the product.
        ds = dy.new_empty((dy.shape[0], sum(ranks)))
        plain = [False] * len(rows)
        blocks, outs = split_b(lora_b.to(dy.dtype), rows, ranks), ds.split(list(ranks), 1)
        torch.ops.prelora_C.grouped_gemm_(parts, blocks, [], outs, list(scaling), [], plain, plain)
        return ds
    blocks = split_b(lora_b, rows, ranks)
    pairs = zip(parts, blocks, scaling, strict=True)
    shares = [product(dy_i, (s_i * b_i).to(dy_i.dtype).t()) for dy_i, b_i, s_i in pairs]
    return shares[0] if len(shares) == 1 else torch.cat(shares, 1)


def _adapter_gradients(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    ds: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    need_a: bool,
    need_b: bool,
) -> list[Tensor]:
    """The needed ones of dA = dSᵀ·x and dB_i = s_i · dy_iᵀ · S_i; dS and S where they are given, else computed."""
    activations = [tensor for tensor in (dy, x, s, ds) if tensor is not None]
    fits = all(tensor.dtype == dy.dtype for tensor in activations) and dy.shape[0] > 0 and 0 not in ranks
    if fits and extension_cpu_refusal(*activations, lora_a, lora_b) is None:
        # One pass over x and dy; the library's four products take 1.1 to 2.5 times as long (2 cores of a Xeon, 2026).
        a, b = lora_a.contiguous(), lora_b.contiguous()
        layout = list(rows), list(ranks), list(scaling)
        return torch.ops.prelora_C.adapter_gradients(dy, x, s, ds, a, b, *layout, need_a, need_b)
    grads = []
    if need_a:
        assert x is not None
        ds = _shrunk_gradient(dy, lora_b, rows, ranks, scaling) if ds is None else ds
        grads.append(product(ds.t(), x.t()).to(lora_a.dtype))
    if need_b:
        if s is None:
            assert x is not None
            s = product(x, lora_a.to(x.dtype))
        db = torch.empty_like(lora_b, memory_format=torch.contiguous_format)
        shares = zip(dy.split(list(rows), 1), s.split(list(ranks), 1), split_b(db, rows, ranks), scaling, strict=True)
        for dy_i, s_i, db_i, scale in shares:
            db_i.copy_(scale * product(s_i.t(), dy_i.contiguous().t()).t())
        grads.append(db)
    return grads
