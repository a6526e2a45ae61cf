"""``lora_merge``: W + s·B·A of every layer of a ViT, and A's and B's gradients from W's, once per step."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bounds import Bound, byte_bound, copy_of, gemm_of, roofline
from bench.interleave import NotRun, Variant
from bench.peers import peft_layer
from bench.precision import DEVICE, PRECISIONS
from bench.providers import forced, served_by
from prelora.config import PreLoRAConfig
from prelora.ops import lora_merge, lora_merge_backward
from prelora.ops.cases import WIDTHS, LinearCase, LinearTensors, linear_tensors, vit_layers
from prelora.ops.slices import split_lora
from prelora.ranks import LayerShape, assign_ranks

OPERATORS = ("lora_merge",)
DEPTHS = {"ViT-S": 12, "ViT-B": 12, "ViT-L": 24}
RANKS: tuple[int | str, ...] = (8, 16, 32, 64, "unequal")
"""``"unequal"``: Algorithm 2's, from random norm changes."""
DEFAULT = {("ViT-S", 16), ("ViT-L", "unequal")}
SECONDS = 20.0
COPY, GEMM = "copy", "fp32 GEMM"


def cells() -> Iterator[Any]:
    """Every model, rank and precision of W_eff."""
    for model in WIDTHS:
        for rank in RANKS:
            for precision in PRECISIONS:
                marks = [pytest.mark.default_cell] if (model, rank) in DEFAULT else []
                yield pytest.param(model, rank, precision, id=f"merge-{model}-r{rank}-{precision}", marks=marks)


@pytest.mark.parametrize(("model", "rank", "precision"), list(cells()))
def bench_merge(model: str, rank: int | str, precision: str, measure: Any, request: Any) -> None:
    """All target layers of one model; W, A and B are fp32, W_eff and its gradient are of the precision."""
    name = request.node.callspec.id.removeprefix("merge-")
    measure("merge", name, merge_variants(model_cases(model, rank), PRECISIONS[precision]), SECONDS)


def model_cases(model: str, rank: int | str) -> list[LinearCase]:
    """Every target layer of a model, at one rank or at those that Algorithm 2 gives its slices."""
    if isinstance(rank, int):
        return [*vit_layers(model, rank, 0).values()] * DEPTHS[model]
    draw = random.Random(0)
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    shapes: dict[str, LayerShape] = {}
    layers = [(block, name, case) for block in range(DEPTHS[model]) for name, case in vit_layers(model, 1, 0).items()]
    for block, name, case in layers:
        for i, rows in enumerate(case.rows):
            groups[f"{name} {i}"][f"{block} {name} {i}"] = draw.lognormvariate(0, 0.5)
            shapes[f"{block} {name} {i}"] = LayerShape(case.in_features, rows)
    ranks = assign_ranks(groups, shapes, PreLoRAConfig())
    return [
        LinearCase(0, case.in_features, case.rows, tuple(ranks[f"{block} {name} {i}"] for i in range(len(case.rows))))
        for block, name, case in layers
    ]


def merge_variants(cases: list[LinearCase], dtype: torch.dtype) -> list[Variant | NotRun]:
    """``merge`` gives every W_eff, ``gradients`` every dA and dB from dW."""
    layers = [linear_tensors(case, dtype, torch.float32, DEVICE, seed) for seed, case in enumerate(cases)]
    grads = [torch.randn_like(layer.weight, dtype=dtype) for layer in layers]
    bound, yardsticks = _bound(cases, layers, grads)

    def ours(name: str) -> Variant:
        return Variant(name, _our_parts(cases, layers, grads, dtype), bound=bound, summed=False, note=_served)

    return [
        *yardsticks,
        *_peers(cases, layers, grads, dtype, bound),
        ours("prelora"),
        *forced((lora_merge, lora_merge_backward), DEVICE, lambda name: ours(f"prelora [{name}]")),
    ]


def _bound(cases: list[LinearCase], layers: list[LinearTensors], grads: list[Tensor]) -> tuple[Bound, list[Variant]]:
    """What no merge can be faster than, and the two variants that say so."""
    wide = sum(layer.weight.nbytes for layer in layers)
    narrow = sum(grad.nbytes for grad in grads)
    adapters = sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in layers)
    moved = {"merge": wide + narrow + adapters, "gradients": narrow + 2 * adapters}
    flops = sum(2 * n * case.in_features * r for case in cases for n, r in zip(case.rows, case.ranks, strict=True))
    copy, copied = copy_of(max(moved.values()), DEVICE)
    gemm, multiplied = gemm_of(DEVICE)
    bound = roofline(byte_bound(COPY, moved, copied), GEMM, {"merge": flops, "gradients": 2 * flops}, multiplied)
    return bound, [
        Variant(COPY, {COPY: copy}, "yardstick", note=lambda: f"{copied / 2**20:,.0f} MiB read and written"),
        Variant(GEMM, {GEMM: gemm}, "yardstick", note=lambda: f"{multiplied / 1e9:,.0f} GFLOP"),
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

    def by_addmm() -> list[Tensor]:
        return [_addmm_layer(*pair).to(dtype) for pair in zip(cases, layers, strict=True)]

    def gradients() -> list[Tensor]:
        return [gradient for layer in zip(cases, layers, grads, strict=True) for gradient in _mm_layer(*layer)]

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
        Variant("PEFT", {"merge": _by_peft(cases, layers, dtype)}, "peer", bound),
        Variant("addmm loop", {"merge": by_addmm}, "peer", bound),
        Variant(
            "padded baddbmm",
            {"merge": _by_baddbmm(cases, layers, dtype)},
            "peer",
            bound,
            note=lambda: "weights and padded factors stacked by shape beforehand",
        ),
        Variant("mm loop", {"gradients": gradients}, "peer", bound, note=lambda: f"in {str(dtype)[6:]}"),
    ]
    if dtype != torch.float32:
        cast = {"merge": lambda: [weight.to(dtype) for weight in weights]}
        variants.append(Variant("cast alone", cast, "peer", bound, note=lambda: "what autocast does without LoRA"))
    return variants


def _slices(case: LinearCase, layer: LinearTensors) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """W_i, A_i, B_i and s_i of every slice."""
    pairs = split_lora(layer.lora_a, layer.lora_b, case.rows, case.ranks)
    for w, (a, b), scaling in zip(layer.weight.split(case.rows), pairs, case.scalings, strict=True):
        yield w, a, b, scaling


def _by_peft(cases: list[LinearCase], layers: list[LinearTensors], dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """Each slice as a Linear of its own, since PEFT knows none."""
    modules: list[Any] = []
    for case, layer in zip(cases, layers, strict=True):
        for w, a, b, scaling in _slices(case, layer):
            alone = LinearCase(0, case.in_features, (w.shape[0],), (a.shape[0],), bias=False, scaling=(scaling,))
            modules.append(peft_layer(alone, LinearTensors(layer.x, layer.dy, w, None, a, b), False))

    def merge() -> list[Tensor]:
        with torch.no_grad():
            return [(each.base_layer.weight + each.get_delta_weight("default")).to(dtype) for each in modules]

    return merge


def _by_baddbmm(cases: list[LinearCase], layers: list[LinearTensors], dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """One batched product for each shape, every factor padded with zeros to the largest rank."""
    widest = max(rank for case in cases for rank in case.ranks)
    by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    for case, layer in zip(cases, layers, strict=True):
        for w, a, b, scaling in _slices(case, layer):
            rest = widest - a.shape[0]
            padded = F.pad(a, (0, 0, 0, rest)), F.pad(scaling * b, (0, rest))
            by_shape[w.shape].append((w, *padded))
    stacks = [[torch.stack(tensors) for tensors in zip(*group, strict=True)] for group in by_shape.values()]
    return lambda: [torch.baddbmm(w, b, a).to(dtype) for w, a, b in stacks]


def _addmm_layer(case: LinearCase, layer: LinearTensors) -> Tensor:
    """One ``addmm`` for each row slice, written where it belongs."""
    out = torch.empty_like(layer.weight)
    for (w, a, b, scaling), out_i in zip(_slices(case, layer), out.split(case.rows), strict=True):
        torch.addmm(w, b, a, alpha=scaling, out=out_i)
    return out


def _mm_layer(case: LinearCase, layer: LinearTensors, grad: Tensor) -> list[Tensor]:
    """Two products for each row slice, in the gradient's dtype."""
    gradients = []
    for (_, a, b, scaling), dw in zip(_slices(case, layer), grad.split(case.rows), strict=True):
        a, b = a.to(grad.dtype), b.to(grad.dtype)
        gradients += [(scaling * (b.t() @ dw)).float(), (scaling * (dw @ a.t())).float()]
    return gradients
