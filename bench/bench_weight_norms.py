"""``weight_norms``: the Frobenius norm of every target of a ViT, as the monitor wants them once an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.bounds import byte_bound, copy_of
from bench.interleave import NotRun, Variant
from bench.precision import DEVICE, PRECISIONS
from bench.providers import forced, served_by
from prelora.ops import weight_norms
from prelora.ops.cases import WIDTHS, norm_tensors

OPERATORS = ("weight_norms",)
DEPTHS = {"ViT-S": 12, "ViT-B": 12, "ViT-L": 24}
COPY, PART = "copy", "norms"
SECONDS = 10.0


def cells() -> Iterator[Any]:
    """Every model, with weights in fp32 or bf16."""
    for model in WIDTHS:
        for precision in PRECISIONS:
            marks = [pytest.mark.default_cell] if precision == "fp32" else []
            yield pytest.param(model, precision, id=f"weight_norms-{model}-{precision}", marks=marks)


@pytest.mark.parametrize(("model", "precision"), list(cells()))
def bench_weight_norms(model: str, precision: str, measure: Any, request: Any) -> None:
    """All targets of one model, of qkv the three row slices; every variant ends with the numbers on the host."""
    tensors = norm_tensors(model, DEPTHS[model], DEVICE)
    if precision != "fp32":
        tensors = [tensor.to(PRECISIONS[precision]) for tensor in tensors]
    name = request.node.callspec.id.removeprefix("weight_norms-")
    measure("weight_norms", name, norm_variants(tensors), SECONDS)


def norm_variants(tensors: list[Tensor]) -> list[Variant | NotRun]:
    """Ours and the peers; a 16-bit ``.norm()`` is asked for a sum in fp32, as ours is."""
    read = sum(tensor.nbytes for tensor in tensors)
    copy, copied = copy_of(read, DEVICE)
    bound = byte_bound(COPY, {PART: read}, copied)

    def peer(name: str, call: Callable[[], object]) -> Variant:
        return Variant(name, {PART: call}, "peer", bound)

    def ours(name: str) -> Variant:
        return Variant(name, {PART: norms}, bound=bound, note=lambda: served_by((weight_norms,), DEVICE))

    def norms() -> list[float]:
        return weight_norms(tensors, False).tolist()

    def one_by_one() -> list[float]:
        return [torch.linalg.vector_norm(tensor, dtype=torch.float32).item() for tensor in tensors]

    def stacked() -> list[float]:
        return torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]).tolist()

    def foreach() -> list[float]:
        return torch.stack(torch._foreach_norm(tensors, dtype=torch.float32)).tolist()

    return [
        Variant(COPY, {COPY: copy}, "yardstick", note=lambda: f"{copied / 2**20:,.0f} MiB read and written"),
        peer(".norm().item() loop", one_by_one),
        peer(".norm() loop", stacked),
        peer("torch._foreach_norm", foreach),
        ours("prelora"),
        *forced((weight_norms,), DEVICE, lambda name: ours(f"prelora [{name}]")),
    ]
