"""``lora_merge``: W + s·B·A of every layer of a ViT, and A's and B's gradients from W's, once per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.bounds import Bound, byte_bound, copy_of
from bench.interleave import NotRun, Variant
from bench.peers import peft_layer
from bench.precision import DEVICE, PRECISIONS
from bench.providers import forced, served_by
from prelora.ops import lora_merge, lora_merge_backward
from prelora.ops.cases import WIDTHS, LinearCase, LinearTensors, linear_tensors, vit_layers
from prelora.ops.slices import by_layer, split_lora

OPERATORS = ("lora_merge",)
DEPTHS = {"ViT-S": 12, "ViT-B": 12, "ViT-L": 24}
RANKS = (8, 16, 32, 64)
DEFAULT = {("ViT-S", 16), ("ViT-L", 32)}
SECONDS = 20.0
COPY = "copy"


def cells() -> Iterator[Any]:
    """Every model, rank and precision of W_eff."""
    for model in WIDTHS:
        for rank in RANKS:
            for precision in PRECISIONS:
                marks = [pytest.mark.default_cell] if (model, rank) in DEFAULT else []
                yield pytest.param(model, rank, precision, id=f"merge-{model}-r{rank}-{precision}", marks=marks)


@pytest.mark.parametrize(("model", "rank", "precision"), list(cells()))
def bench_merge(model: str, rank: int, precision: str, measure: Any, request: Any) -> None:
    """All target layers of one model at one rank; W, A and B are fp32, W_eff is of the precision."""
    cases = [*vit_layers(model, rank, 0).values()] * DEPTHS[model]
    name = request.node.callspec.id.removeprefix("merge-")
    measure("merge", name, merge_variants(cases, PRECISIONS[precision]), SECONDS)


def merge_variants(cases: list[LinearCase], dtype: torch.dtype) -> list[Variant | NotRun]:
    """``merge`` gives every W_eff, ``gradients`` every dA and dB from dW; the peers go layer by layer."""
    layers = [linear_tensors(case, dtype, torch.float32, DEVICE, seed) for seed, case in enumerate(cases)]
    grads = [torch.randn_like(layer.weight, dtype=dtype) for layer in layers]
    wide = sum(layer.weight.nbytes for layer in layers)
    narrow = sum(grad.nbytes for grad in grads)
    adapters = sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in layers)
    moved = {"merge": wide + narrow + adapters, "gradients": narrow + 2 * adapters}
    copy, copied = copy_of(max(moved.values()), DEVICE)
    bound = byte_bound(COPY, moved, copied)

    def ours(name: str) -> Variant:
        return Variant(name, _our_parts(cases, layers, grads, dtype), bound=bound, summed=False, note=_served)

    return [
        Variant(COPY, {COPY: copy}, "yardstick", note=lambda: f"{copied / 2**20:,.0f} MiB read and written"),
        *_peers(cases, layers, grads, dtype, bound),
        ours("prelora"),
        *forced((lora_merge, lora_merge_backward), DEVICE, lambda name: ours(f"prelora [{name}]")),
    ]


def _served() -> str:
    return served_by((lora_merge, lora_merge_backward), DEVICE)


def _our_parts(
    cases: list[LinearCase], layers: list[LinearTensors], grads: list[Tensor], dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    adapters = ([layer.lora_a for layer in layers], [layer.lora_b for layer in layers])
    layout = _layout(cases)
    weights = [layer.weight for layer in layers]
    return {
        "merge": lambda: lora_merge(weights, *adapters, *layout, dtype),
        "gradients": lambda: lora_merge_backward(grads, *adapters, *layout),
    }


def _layout(cases: list[LinearCase]) -> tuple[list[int], list[int], list[int], list[float]]:
    """slices, rows, ranks and scaling, as ``lora_merge`` takes them."""
    return (
        [len(case.rows) for case in cases],
        [rows for case in cases for rows in case.rows],
        [rank for case in cases for rank in case.ranks],
        [scaling for case in cases for scaling in case.scalings],
    )


def _peers(
    cases: list[LinearCase], layers: list[LinearTensors], grads: list[Tensor], dtype: torch.dtype, bound: Bound
) -> list[Variant]:
    adapters = ([layer.lora_a for layer in layers], [layer.lora_b for layer in layers])
    layout = _layout(cases)
    weights = [layer.weight for layer in layers]
    peft: list[Any] = [peft_layer(case, layer, False) for case, layer in zip(cases, layers, strict=True)]

    def by_peft() -> list[Tensor]:
        with torch.no_grad():
            return [(each.base_layer.weight + each.get_delta_weight("default")).to(dtype) for each in peft]

    def by_addmm() -> list[Tensor]:
        return [_addmm_layer(*layer).to(dtype) for layer in zip(weights, *adapters, by_layer(*layout), strict=True)]

    variants = [
        Variant(
            "reference",
            {
                "merge": lambda: lora_merge.reference(weights, *adapters, *layout, dtype),
                "gradients": lambda: lora_merge_backward.reference(grads, *adapters, *layout),
            },
            "peer",
            bound,
            summed=False,
        ),
        Variant("PEFT", {"merge": by_peft}, "peer", bound),
        Variant("addmm loop", {"merge": by_addmm}, "peer", bound),
    ]
    if dtype != torch.float32:
        cast = {"merge": lambda: [weight.to(dtype) for weight in weights]}
        variants.append(Variant("cast alone", cast, "peer", bound, note=lambda: "what autocast does without LoRA"))
    return variants


def _addmm_layer(weight: Tensor, lora_a: Tensor, lora_b: Tensor, layer: tuple[Any, ...]) -> Tensor:
    """One ``addmm`` for each row slice, written where it belongs."""
    rows, ranks, scaling = layer
    out = torch.empty_like(weight)
    pairs = split_lora(lora_a, lora_b, rows, ranks)
    for w_i, out_i, (a_i, b_i), s_i in zip(weight.split(rows), out.split(rows), pairs, scaling, strict=True):
        torch.addmm(w_i, b_i, a_i, alpha=s_i, out=out_i)
    return out
