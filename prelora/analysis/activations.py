"""What autograd saves between forward and backward, counted on the model itself with fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prelora.analysis.hollow import hollow_copy
from prelora.controller import logits
from prelora.precision import autocast

DEVICE = "cpu"
"""Of the fake tensors: autograd runs without a driver there, and autocast saves for a ViT what it does on a GPU."""


@dataclass(frozen=True)
class Saved:
    """Bytes saved for backward, without parameters."""

    per_image: int
    fixed: int
    """Whatever the batch: W_eff, and autocast's copies of the other weights."""


def saved_for_backward(model: nn.Module, image: Sequence[int], precision: str) -> Saved:
    """Count what a training step's forward, up to its loss, leaves for backward; eager, without checkpointing.

    Args:
        model: one phase's model, on the meta device; it is not touched.
        image: [channels, height, width].
        precision: ``"fp32"``, or what autocast lowers to.
    """
    with FakeTensorMode():
        fake = hollow_copy(model, DEVICE)
        two, four = (_saved(fake, fake_batch(images, image), precision) for images in (2, 4))
    return Saved(per_image=(four - two) // 2, fixed=2 * two - four)


def fake_batch(images: int, image: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images [images, channels, height, width] and their labels; to be called inside a ``FakeTensorMode``."""
    return torch.empty(images, *image, device=DEVICE), torch.zeros(images, dtype=torch.int64, device=DEVICE)


def step_loss(model: nn.Module, batch: tuple[Tensor, Tensor], precision: str) -> Tensor:
    """The loss of one micro-batch, as the trainer's step takes it."""
    images, labels = batch
    with autocast(DEVICE, precision):
        return F.cross_entropy(logits(model(images)), labels)


def _saved(model: nn.Module, batch: tuple[Tensor, Tensor], precision: str) -> int:
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage  # held, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step_loss(model, batch, precision)
    return sum(storage.nbytes() for storage in kept.values())
