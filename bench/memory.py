"""Memory of one training step, by item and at its peak; run as a program, in a process of its own.

python -m bench.memory '{"way": "prelora LORA", "model": "ViT-L", "batch": 4, "rank": 16, …}'
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import StepCell, Trained, base_model, trained
from bench.precision import DEVICE
from prelora import optim
from prelora.train.memory import gradient_bytes, peak_bytes, reset_peak

MIB = 2**20


def measure(way: str, cell: StepCell) -> dict[str, Any]:
    """MiB of each item and at the peak of a step; the first item is what the process held before the model."""
    for library in ("timm", "peft"):
        importlib.import_module(library)  # for every way alike: they take more memory than some of the items
    before = peak_bytes(DEVICE)
    base = base_model(cell.model)
    run = trained(way, cell, base, image_size=base.patch_embed.img_size[0])
    del base
    items = {"interpreter and libraries": before, **probe(run)}
    run.step()  # the step above left no gradients, but everything else that stays
    reset_peak(DEVICE)
    run.step()
    return {
        "peak": peak_bytes(DEVICE) / MIB,
        "items": {name: size / MIB for name, size in items.items()},
        "plans": run.plans(),
    }


def probe(run: Trained) -> dict[str, int]:
    """Bytes by item, counted during one step of its own."""
    saved = SavedTensors(run.model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        run.forward_and_backward()
    gradients = gradient_bytes(run.optimizer)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    named = list(run.model.named_parameters())
    return {
        "weights": sum(parameter.nbytes for name, parameter in named if "lora_" not in name),
        "LoRA": sum(parameter.nbytes for name, parameter in named if "lora_" in name),
        "gradients": gradients,
        "optimizer": sum(optim.state_bytes(run.optimizer).values()),
        "activations": saved.activations,
        "W_eff or cast weights": saved.weights,
    }


class SavedTensors:
    """What autograd keeps for backward, each storage once; parameters are kept anyway and not counted."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        shapes = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear)}
        self._weight_shapes = shapes | {shape[::-1] for shape in shapes}
        self._sizes: dict[int, tuple[bool, int]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """The hook: count, and keep the tensor itself."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            # A ViT's activations are three-dimensional, and flattened ones have no weight's shape.
            self._sizes[storage.data_ptr()] = tuple(tensor.shape) in self._weight_shapes, storage.nbytes()
        return tensor

    @property
    def activations(self) -> int:
        """Bytes that grow with the batch."""
        return sum(size for is_weight, size in self._sizes.values() if not is_weight)

    @property
    def weights(self) -> int:
        """Bytes of W_eff, or of the copies of W that autocast makes."""
        return sum(size for is_weight, size in self._sizes.values() if is_weight)


def arguments(way: str, cell: StepCell) -> str:
    """The program's one argument."""
    return json.dumps({"way": way, **asdict(cell)})


def main(argument: str) -> None:
    """Measure, and print the result as the last line."""
    settings = json.loads(argument)
    way = settings.pop("way")
    print(json.dumps(measure(way, StepCell(**settings))))


if __name__ == "__main__":
    main(sys.argv[1])
