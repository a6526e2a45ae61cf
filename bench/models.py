"""Whole ViTs and their optimizers, one for each way to train, all on the same weights in the same memory."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.precision import DEVICE, autocast
from prelora import surgery
from prelora.nn import LoRALinear, merge_once
from prelora.targets import TIMM_VIT, Target, base_parameters, find_targets

NAMES = {"ViT-S": "vit_small_patch16_224", "ViT-B": "vit_base_patch16_224", "ViT-L": "vit_large_patch16_224"}
FULL, FROZEN = "full", "frozen"
WARMUP, LORA, B_ONLY = "prelora WARMUP", "prelora LORA", "prelora LORA, A frozen"
PEFT, PEFT_JOINT = "PEFT", "PEFT joint"
WAYS = (FULL, FROZEN, PEFT, PEFT_JOINT, WARMUP, LORA, B_ONLY)
"""What trains, and whose code: the whole model; all but the targets; all but the targets, and LoRA; everything."""
OURS = (WARMUP, LORA, B_ONLY)
FUSED = {
    "qkv": "blocks.*.attn.qkv",
    "attn_out": "blocks.*.attn.proj",
    "mlp_in": "blocks.*.mlp.fc1",
    "mlp_out": "blocks.*.mlp.fc2",
}
LR = 1e-5


@dataclass(frozen=True)
class StepCell:
    """A model, a batch, and one rank for every target."""

    model: str
    batch: int
    rank: int
    precision: str
    qkv: str
    """``"sliced"``: q, k and v have an adapter each; PEFT, which cannot, gets one of the three ranks together, the
    least that can express the same updates. ``"fused"``: one adapter over all of qkv, in PEFT and in prelora."""

    @property
    def name(self) -> str:
        """As in the test's id."""
        return f"{self.model}-b{self.batch}-r{self.rank}-{self.precision}-{self.qkv}"

    def targets(self, model: nn.Module) -> tuple[Target, ...]:
        """What carries LoRA."""
        return find_targets(model, FUSED if self.qkv == "fused" else TIMM_VIT)


def base_model(name: str, image_size: int = 224, **settings: Any) -> nn.Module:
    """A timm ViT/16 with random weights, the same every time."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(NAMES.get(name, name), pretrained=False, img_size=image_size, **settings)
    return model.to(DEVICE)


def build(way: str, cell: StepCell, base: nn.Module) -> nn.Module:
    """A model of its own that computes with ``base``'s parameters: the memory is the same, what trains is not."""
    targets = cell.targets(base)
    memo: dict[int, Any] = {id(parameter): nn.Parameter(parameter.detach()) for parameter in base.parameters()}
    model = copy.deepcopy(base, memo).train()
    frozen = base_parameters(targets)
    if way in OURS:
        surgery.inject(model, targets, {target.name: cell.rank for target in targets})
        if way != WARMUP:
            surgery.freeze(model, targets, train_lora_a=way != B_ONLY)
    elif way in (PEFT, PEFT_JOINT):
        model = _peft(model, cell)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(way == PEFT_JOINT or plain_name(name) not in frozen)
    elif way == FROZEN:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
    return model


def _peft(model: nn.Module, cell: StepCell) -> nn.Module:
    """PEFT's model, its scaling 1 as prelora's is by default."""
    from peft import LoraConfig, get_peft_model

    fused = {"qkv": 3 * cell.rank if cell.qkv == "sliced" else cell.rank}
    config = LoraConfig(
        r=cell.rank,
        lora_alpha=cell.rank,
        target_modules=r"blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)",
        rank_pattern=fused,
        alpha_pattern=fused,
    )
    return get_peft_model(model, config)


def plain_name(name: str) -> str:
    """A parameter's name without what PEFT puts around it; one of LoRA's stays one of no plain model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


class Moments:
    """AdamW's moments of the base's parameters, one pair for all models: three ViT-L would not fit otherwise."""

    def __init__(self) -> None:
        self._shared: dict[tuple[str, str], Tensor] = {}

    def share(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Have ``optimizer`` go on with the moments of those before it, wherever it trains the same parameter."""
        for name, parameter in model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                if "lora_" not in name and key in optimizer.state.get(parameter, ()):
                    state = optimizer.state[parameter]
                    state[key] = self._shared.setdefault((plain_name(name), key), state[key])


@dataclass
class Trained:
    """A model, its optimizer and one fixed batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    called: Callable[[Tensor], Tensor]
    """What computes the logits: the model, or what ``torch.compile`` made of it."""
    images: Tensor
    labels: Tensor
    precision: str

    def step(self) -> None:
        """Forward, backward, AdamW; no gradient is left behind."""
        self.forward_and_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def forward_and_backward(self) -> None:
        """As the trainer does it: W_eff lives as long as the step."""
        with self._merged():
            with autocast(self.precision):
                loss = F.cross_entropy(self.called(self.images), self.labels)
            loss.backward()

    @contextlib.contextmanager
    def _merged(self) -> Iterator[None]:
        if not any(isinstance(module, LoRALinear) for module in self.model.modules()):
            yield
            return
        with contextlib.ExitStack() as opened:
            with autocast(self.precision):
                opened.enter_context(merge_once(self.model))
            yield

    def plans(self) -> str:
        """How many of prelora's layers took which execution in the last step."""
        layers = [module for module in self.model.modules() if isinstance(module, LoRALinear)]
        plans = Counter(layer.last_plan.execution for layer in layers if layer.last_plan is not None)
        return ", ".join(f"{count} layers {plan}" for plan, count in sorted(plans.items()))


def trained(way: str, cell: StepCell, base: nn.Module, compile_it: bool = False, image_size: int = 224) -> Trained:
    """Model, fused AdamW over all that trains, and random images and labels."""
    model = build(way, cell, base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(cell.batch, 3, image_size, image_size, generator=generator).to(DEVICE)
    labels = torch.randint(10, (cell.batch,), generator=generator).to(DEVICE)
    called = torch.compile(model, dynamic=False) if compile_it else model
    return Trained(model, optimizer, called, images, labels, cell.precision)
