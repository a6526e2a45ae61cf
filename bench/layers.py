"""Every variant of one LoRA layer, on the same tensors: ours, the peers, and what bounds them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from bench.bounds import layer_bounds
from bench.interleave import NotRun, Variant
from bench.peers import Accumulate, Reference, linear, peft_layer
from bench.precision import DEVICE, PRECISIONS, autocast
from bench.providers import forced, served_by
from prelora.config import Execution
from prelora.nn import LoRALinear, merge_once
from prelora.nn.linear import merged_weights
from prelora.ops import lora_linear, lora_linear_backward, lora_merge
from prelora.ops.cases import LinearCase, LinearTensors, linear_tensors

FULL, FROZEN = "full", "frozen"
OURS = "prelora merged"
OPERATORS = (lora_merge, lora_linear, lora_linear_backward)


def layer_variants(
    case: LinearCase, precision: str, no_compile: str | None, opened: ExitStack
) -> list[Variant | NotRun]:
    """All variants of ``case``; ``forward`` and ``backward`` of each compute the same, but for what trains.

    Args:
        no_compile: why compiled variants are left out; None: they are not.
        opened: holds open what keeps W_eff merged, until the cell is done.
    """
    tensors = linear_tensors(case, PRECISIONS[precision], torch.float32, DEVICE)
    return [
        *_peers(case, tensors, precision, no_compile),
        *_ours(case, tensors, precision, opened),
    ]


def _peers(case: LinearCase, tensors: LinearTensors, precision: str, no_compile: str | None) -> list[Variant | NotRun]:
    bounds = layer_bounds(case, FROZEN)

    def peer(name: str, layer: Callable[[Tensor], Tensor] | nn.Module, trained: nn.Module, bound: str) -> Variant:
        parts = call_parts(layer, trained, tensors, precision)
        return Variant(name, parts, "peer", bound=None if name == FROZEN else bounds[bound])

    plain = {trains: linear(case, tensors, trains) for trains in (True, False)}
    peft, accumulate, reference = (
        peft_layer(case, tensors, False),
        Accumulate(case, tensors),
        Reference(case, tensors),
    )
    joint = peft_layer(case, tensors, True)
    variants: list[Variant | NotRun] = [
        peer(FULL, plain[True], plain[True], "full"),
        peer(FROZEN, plain[False], plain[False], "frozen"),
        peer("PEFT", peft, peft, "lora"),
        peer("PEFT joint", joint, joint, "full"),
        peer("accumulate", accumulate, accumulate, "lora"),
        peer("reference", reference, reference, "lora"),
    ]
    for name, module in (("PEFT compiled", peft), ("reference compiled", reference)):
        if no_compile is None:
            variants.append(peer(name, torch.compile(module, dynamic=False), module, "lora"))
        else:
            variants.append(NotRun(name, no_compile, "peer"))
    return variants


def _ours(case: LinearCase, tensors: LinearTensors, precision: str, opened: ExitStack) -> list[Variant | NotRun]:
    bounds = layer_bounds(case, FROZEN)

    def ours(name: str, layer: LoRALinear, bound: str, note: Callable[[], str] = str) -> Variant:
        return Variant(name, call_parts(layer, layer, tensors, precision), bound=bounds[bound], note=note)

    def kept(layer: LoRALinear) -> LoRALinear:
        with autocast(precision):
            opened.enter_context(merge_once(layer))
        return layer

    merged, b_only = kept(lora_layer(case, tensors)), kept(lora_layer(case, tensors, train_a=False))
    merging = lora_layer(case, tensors)
    return [
        ours(OURS, merged, "lora", lambda: served_by(OPERATORS, DEVICE)),
        ours(f"{OURS} + merge", merging, "lora"),
        Variant(
            "prelora merge alone",
            {"merge": lambda: merged_weights([merging], PRECISIONS[precision])},
            within_whole=True,
            note=lambda: "once per step; the ratios are to a whole layer",
        ),
        ours(f"{OURS}, A frozen", b_only, "lora, A frozen"),
        ours("prelora two_path", lora_layer(case, tensors, execution="two_path"), "lora"),
        ours("prelora joint + merge", lora_layer(case, tensors, base_trains=True), "full"),
        *forced(OPERATORS, DEVICE, lambda name: ours(f"{OURS} [{name}]", merged, "lora")),
    ]


def lora_layer(
    case: LinearCase,
    tensors: LinearTensors,
    *,
    base_trains: bool = False,
    train_a: bool = True,
    execution: Execution = "merged",
) -> LoRALinear:
    """A ``LoRALinear`` on the case's own W, b, A and B."""
    layer = LoRALinear.from_linear(linear(case, tensors, base_trains), case.ranks, rows=case.rows, execution=execution)
    layer.scaling = tuple(case.scalings)
    layer.lora_A = nn.Parameter(tensors.lora_a, requires_grad=train_a)
    layer.lora_B = nn.Parameter(tensors.lora_b.view(layer.lora_B.shape))
    return layer


def call_parts(
    layer: Callable[[Tensor], Tensor] | nn.Module, trained: nn.Module, tensors: LinearTensors, precision: str
) -> dict[str, Callable[[], object]]:
    """Forward under autocast, and backward to x and to every parameter of ``trained`` that trains."""
    x = tensors.x.detach().requires_grad_()
    leaves = [x, *(parameter for parameter in trained.parameters() if parameter.requires_grad)]
    outputs: list[Tensor] = []

    def forward() -> None:
        with autocast(precision):
            outputs.append(layer(x))

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs.pop(), leaves, tensors.dy)

    return {"forward": forward, "backward": backward}
