"""Memory of one GPU by item, as formulas over one phase's model and what autograd saves of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from prelora.analysis.activations import Saved
from prelora.analysis.phases import PhaseModel
from prelora.analysis.plan import TargetCost
from prelora.nn import LoRALinear
from prelora.precision import DTYPES
from prelora.sharding import blocks

Strategy = Literal["ddp", "fsdp"]
FP32 = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU."""

    fixed: dict[str, int]
    """By item, whatever the batch."""
    per_image: dict[str, int] = field(default_factory=dict)
    """By item, for each image of the micro-batch."""

    def items(self, batch: int) -> dict[str, int]:
        """Bytes by item with ``batch`` images in the micro-batch."""
        return {name: self.fixed.get(name, 0) + batch * self.per_image.get(name, 0) for name in ITEMS}

    def total(self, batch: int) -> int:
        """Sum of the items."""
        return sum(self.items(batch).values())

    def largest_batch(self, memory: float) -> int:
        """Images that fit into ``memory`` bytes; 0 where not one does."""
        return max(0, int((memory - self.total(0)) // sum(self.per_image.values())))


ITEMS = (
    "weights",
    "lora",
    "gradients",
    "buckets",
    "optimizer",
    "ema",
    "snapshot",
    "gathered",
    "w_eff",
    "activations",
    "workspace",
)
"""gradients live in DDP's buckets where those are viewed; snapshot: of the targets' weights, for update norms
and ranks; gathered: what FSDP has unsharded; w_eff: W + s·B·A, and autocast's copies of other weights."""


@dataclass(frozen=True)
class Holding:
    """How a run holds what it trains."""

    strategy: Strategy
    gpus: int
    precision: str
    state_bytes: float
    """Of the optimizer, per trained parameter; see ``optimizer_state_bytes``."""
    bucket_view: bool = True
    """DDP's gradient_as_bucket_view: gradients are views of its buckets, not copies."""
    ema: bool = False
    snapshot: bool = True
    """The targets' weights of the last epoch are kept (``log_updates``)."""
    window_snapshot: bool = False
    """Those of the last window's end are kept, too, until the switch (``PreLoRAConfig.keeps_windows``)."""
    accumulates: bool = False
    """Several micro-batches a step: FSDP then holds whole gradients between them."""


def footprint(phase: PhaseModel, saved: Saved, costs: Mapping[str, TargetCost], holding: Holding) -> Footprint:
    """Memory of one GPU in one phase.

    Args:
        saved: of ``phase``, in ``holding.precision``.
        costs: sizes of the targets, by name.
    """
    base, lora, trained = phase.elements(lora=False), phase.elements(lora=True), phase.trainable
    reduced = sum(parameter.numel() for parameter in phase.reduced())
    shards = holding.gpus if holding.strategy == "fsdp" else 1
    copies = holding.snapshot + (holding.window_snapshot and not lora)
    fixed = {
        "weights": FP32 * base // shards,
        "lora": FP32 * lora // shards,
        "gradients": FP32 * trained // shards,
        "optimizer": round(holding.state_bytes * trained) // shards,
        "ema": FP32 * (base + lora) // shards if holding.ema else 0,
        "snapshot": copies * (FP32 * _adapted_elements(costs) // shards),
        "w_eff": saved.fixed,
    }
    if holding.strategy == "fsdp":
        fixed["w_eff"] -= _merged_bytes(phase.model, holding.precision)  # merged again in backward instead
        fixed["gathered"] = _gathered_bytes(phase.model) + (FP32 * trained if holding.accumulates else 0)
    elif holding.gpus > 1 and not holding.bucket_view:
        fixed["buckets"] = FP32 * reduced
    return Footprint(fixed, {"activations": saved.per_image, "workspace": _image_workspace(costs, holding.precision)})


def optimizer_state_bytes(name: str) -> float:
    """Bytes of state per parameter that timm's optimizer of this name keeps, read off one step on a matrix.

    Raises:
        ValueError: timm knows no such optimizer.
    """
    from timm.optim import create_optimizer_v2

    matrix = nn.Parameter(torch.zeros(256, 256))
    matrix.grad = torch.zeros_like(matrix)
    optimizer = create_optimizer_v2([matrix], opt=name, lr=0.0)
    optimizer.step()
    state = [value for value in optimizer.state[matrix].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in state if value.dim()) / matrix.numel()


def _adapted_elements(costs: Mapping[str, TargetCost]) -> int:
    return sum(cost.in_features * cost.out_features for cost in costs.values())


def _image_workspace(costs: Mapping[str, TargetCost], precision: str) -> int:
    """When backward begins: the gradient of the residual stream, in fp32, and that of the widest layer's input."""
    widest = max(cost.tokens * max(cost.in_features, cost.out_features) for cost in costs.values())
    stream = max(cost.tokens * min(cost.in_features, cost.out_features) for cost in costs.values())
    return round(DTYPES[precision].itemsize * widest + FP32 * stream)


def _merged_bytes(model: nn.Module, precision: str) -> int:
    element = DTYPES[precision].itemsize
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    return element * sum(layer.weight.numel() for layer in layers if layer.execution == "merged")


def _gathered_bytes(model: nn.Module) -> int:
    """FSDP2 on every block and the root: the root's parameters stay, two blocks' are there, with one's gradients."""
    units = blocks(model)
    root = _elements([model]) - _elements(units)
    largest = max((_elements([block]) for block in units), default=0)
    trained = max((_elements([block], trainable_only=True) for block in units), default=0)
    return FP32 * (root + 2 * largest + trained)


def _elements(modules: Sequence[nn.Module], trainable_only: bool = False) -> int:
    parameters = (parameter for module in modules for parameter in module.parameters())
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad or not trainable_only)
