"""FLOPs per image of each phase, and from them the ceiling on the speed-up over FULL.

A multiply-add is two FLOPs. Only matrix products, attention and convolutions are counted, forward and backward.
What happens once per optimizer step (the optimizer itself, merging W + s·B·A, gradient communication) is left out.
With M tokens, k inputs, n outputs and rank r, per target:

- FULL: its weight gradient costs 2·M·n·k, and that alone is what freezing the target removes;
- WARMUP: ``two_path`` adds 6·M·r·(n + k) to FULL; ``merged`` adds nothing per image;
- LORA: ``merged`` adds 4·M·r·(n + k) to the frozen model, ``two_path`` 6·M·r·(n + k).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from prelora.analysis.hollow import hollow_copy
from prelora.config import Freeze, PreLoRAConfig

Execution = Literal["merged", "two_path"]


def planned_execution(config: PreLoRAConfig) -> Execution:
    """How LoRA layers compute while they train, as a plan counts them; each layer decides for itself in the end.

    A step is taken to be large enough for merging to be cheaper.
    """
    return "two_path" if config.execution == "two_path" or config.lora_dropout > 0 else "merged"


class TargetLike(Protocol):
    """What of a ``prelora.targets.Target`` is needed here."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def rows(self) -> tuple[int, int] | None: ...


@dataclass(frozen=True)
class TargetCost:
    """The sizes of one target that set the FLOPs of its weight gradient and of its LoRA."""

    tokens: float
    """M, rows that pass through the layer, per image."""
    in_features: int
    out_features: int
    input_grad: bool
    """Whether its input gets a gradient in FULL and WARMUP."""
    frozen_input_grad: bool
    """The same in LORA; with ``freeze="all"`` the first layer's input gets none."""

    @property
    def weight_grad_flops(self) -> float:
        """FLOPs per image of the weight's gradient."""
        return 2 * self.tokens * self.in_features * self.out_features

    def merged_flops(self, rank: int, train_lora_a: bool = True) -> float:
        """FLOPs per image of LoRA's gradients alone, in LORA: x·Aᵀ and dyᵀ·S for dB, dy·B and dSᵀ·x for dA."""
        products = 2 if train_lora_a else 1
        return 2 * products * self.tokens * rank * (self.in_features + self.out_features)

    def two_path_flops(self, rank: int, input_grad: bool, train_lora_a: bool = True) -> float:
        """FLOPs per image of the low-rank path, forward and backward."""
        outputs = 3 if input_grad or train_lora_a else 2
        inputs = 1 + input_grad + train_lora_a
        return 2 * self.tokens * rank * (outputs * self.out_features + inputs * self.in_features)


@dataclass(frozen=True)
class PhaseFlops:
    """FLOPs per image, forward and backward, of each phase."""

    full: float
    warmup: float
    lora: float

    @property
    def ceiling(self) -> float:
        """Largest speed-up of LORA over FULL on one compute-bound device."""
        return self.full / self.lora

    def as_dict(self) -> dict[str, float]:
        """``{"full": …, "warmup": …, "lora": …}``, FLOPs per image."""
        return asdict(self)


@dataclass(frozen=True)
class ModelFlops:
    """What was counted of a model before any rank is known; ``phases`` adds the ranks."""

    full: float
    """FLOPs per image, forward and backward, all parameters trainable."""
    frozen: float
    """FLOPs per image with the base frozen, before LoRA's are added."""
    targets: dict[str, TargetCost]

    def phases(
        self, ranks: Mapping[str, int], execution: Execution = "merged", train_lora_a: bool = True
    ) -> PhaseFlops:
        """FLOPs per image of each phase under ``ranks`` (by target name).

        Args:
            train_lora_a: whether A trains in LORA, as well as B.

        Raises:
            ValueError: the ranks' names are not the targets', or no such execution.
        """
        if ranks.keys() != self.targets.keys():
            names = sorted(ranks.keys() ^ self.targets.keys())
            raise ValueError(f"ranks and targets differ in {len(names)} names: {', '.join(names[:8])}")
        costs = [(cost, ranks[name]) for name, cost in self.targets.items()]
        if execution == "merged":
            warmup = 0.0
            lora = sum(cost.merged_flops(rank, train_lora_a) for cost, rank in costs)
        elif execution == "two_path":
            warmup = sum(cost.two_path_flops(rank, cost.input_grad) for cost, rank in costs)
            lora = sum(cost.two_path_flops(rank, cost.frozen_input_grad, train_lora_a) for cost, rank in costs)
        else:
            raise ValueError(f"execution {execution!r}: accepted are merged, two_path")
        return PhaseFlops(full=self.full, warmup=self.full + warmup, lora=self.frozen + lora)

    def mixture(
        self,
        phases: Mapping[str, str],
        ranks: Mapping[str, int],
        execution: Execution = "merged",
        train_lora_a: bool = True,
    ) -> float:
        """FLOPs per image while targets are in different phases and what is no target trains.

        Args:
            phases: ``"full"``, ``"warmup"`` or ``"lora"`` by target name.
            ranks: of the targets that have left FULL.
            train_lora_a: whether A trains in LORA, as well as B.
        """
        total = self.full
        for name, cost in self.targets.items():
            if phases[name] == "lora":
                total -= cost.weight_grad_flops
            if phases[name] != "full" and execution == "two_path":
                trains_a = train_lora_a or phases[name] == "warmup"
                total += cost.two_path_flops(ranks[name], cost.input_grad, trains_a)
            elif phases[name] == "lora":
                total += cost.merged_flops(ranks[name], train_lora_a)
        return total


def count_flops(
    model: nn.Module,
    targets: Sequence[TargetLike],
    ranks: Mapping[str, int],
    inputs: Tensor,
    *,
    execution: Execution = "merged",
    freeze: Freeze = "targets",
) -> PhaseFlops:
    """FLOPs per image of FULL, WARMUP and LORA; ``count_model`` and ``ModelFlops.phases`` in one call."""
    return count_model(model, targets, inputs, freeze=freeze).phases(ranks, execution)


def count_model(
    model: nn.Module, targets: Sequence[TargetLike], inputs: Tensor, *, freeze: Freeze = "targets"
) -> ModelFlops:
    """Count a model's FLOPs per image on the meta device: nothing is computed and ``model`` is not touched.

    Args:
        model: the model without LoRA, on any device; neither compiled nor wrapped.
        targets: the linear layers, or row slices of them, that will carry LoRA.
        inputs: (images, …), what the model is called with; only its shape and dtype are read.
        freeze: what is frozen in LORA; ``"all"`` also removes every other weight gradient.

    Raises:
        ValueError: a target's path is not an ``nn.Linear``, or no input passes through it.
    """
    meta = hollow_copy(model)
    linears = {target.path: _linear(meta, target) for target in targets}
    images = inputs.shape[0]
    meta.requires_grad_(True)
    full, seen = _count(meta, linears, inputs)
    removed = sum(2 * seen[t.path].rows * _outputs(linears, t) * linears[t.path].in_features for t in targets)
    frozen, seen_frozen = full - removed, seen
    if freeze == "all":
        meta.requires_grad_(False)
        for linear in linears.values():
            linear.requires_grad_(True)
        frozen, seen_frozen = _count(meta, linears, inputs)
        frozen -= sum(2 * seen[path].rows * linear.weight.numel() for path, linear in linears.items())
    costs = {
        target.name: TargetCost(
            tokens=seen[target.path].rows / images,
            in_features=linears[target.path].in_features,
            out_features=_outputs(linears, target),
            input_grad=seen[target.path].input_grad,
            frozen_input_grad=seen_frozen[target.path].input_grad,
        )
        for target in targets
    }
    return ModelFlops(full=full / images, frozen=frozen / images, targets=costs)


@dataclass
class _Seen:
    """What passed through a linear layer in one forward."""

    rows: int = 0
    input_grad: bool = False


def _count(model: nn.Module, linears: Mapping[str, nn.Linear], inputs: Tensor) -> tuple[int, dict[str, _Seen]]:
    """FLOPs of one forward and backward of the whole batch, and what passed through each target's module."""
    batch = torch.empty(inputs.shape, dtype=inputs.dtype, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), counter:
        # Hooks are gone before backward: activation checkpointing runs the forward again there.
        with _observed(linears) as seen:
            outputs = model(batch)
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.autograd.backward(leaves, [torch.empty_like(leaf) for leaf in leaves])
    unused = [path for path, found in seen.items() if not found.rows]
    if unused:
        raise ValueError(f"no input passes through target {unused[0]!r}: its FLOPs are unknown")
    return counter.get_total_flops(), seen


@contextmanager
def _observed(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, _Seen]]:
    seen = {path: _Seen() for path in linears}

    def record(found: _Seen, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.rows += args[0].numel() // args[0].shape[-1]
        found.input_grad |= args[0].requires_grad

    handles = [linear.register_forward_pre_hook(partial(record, seen[path])) for path, linear in linears.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _linear(model: nn.Module, target: TargetLike) -> nn.Linear:
    module = model.get_submodule(target.path)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"target {target.name!r}: {target.path} is a {type(module).__name__}, not an nn.Linear")
    return module


def _outputs(linears: Mapping[str, nn.Linear], target: TargetLike) -> int:
    if target.rows is None:
        return linears[target.path].out_features
    start, stop = target.rows
    return stop - start
