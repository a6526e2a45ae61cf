"""``torch.compile(fullgraph=True)`` of a ViT with LoRA: no break, the eager gradients, one compilation a phase."""

import models
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from prelora import surgery
from prelora.nn import merge_once
from prelora.targets import find_targets

PHASES = ["warmup", "lora", "lora with A frozen"]


def vit(phase):
    model = models.tiny_vit().double()
    targets = find_targets(model)
    surgery.inject(model, targets, {target.name: 2 + 3 * (i % 3) for i, target in enumerate(targets)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    if phase != "warmup":
        surgery.freeze(model, targets, train_lora_a=phase == "lora")
    return model


def gradients(call, model):
    model.zero_grad()
    F.cross_entropy(call(models.images(4).double()), models.labels(4)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("shared", [False, True], ids=["merged in forward", "merged once"])
def test_no_graph_break_and_the_eager_gradients(phase, shared):
    torch._dynamo.reset()
    model = vit(phase)
    expected = gradients(model, model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    if shared:
        with merge_once(model):
            actual = gradients(compiled, model)
    else:
        actual = gradients(compiled, model)

    assert counter.frame_count == 1
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)


@pytest.mark.parametrize("phase", PHASES)
def test_steps_of_one_phase_compile_once(phase):
    torch._dynamo.reset()
    model = vit(phase)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    for _ in range(4):
        with merge_once(model):
            gradients(compiled, model)
        optimizer.step()

    assert counter.frame_count == 1


def test_a_second_batch_size_makes_the_size_symbolic_and_computes_alike():
    torch._dynamo.reset()
    model = vit("lora")
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    for count in (4, 3, 5):
        torch.testing.assert_close(compiled(models.images(count).double()), model(models.images(count).double()))


def test_the_switch_and_the_freeze_compile_once_each():
    counter = CompileCounterWithBackend("aot_eager")
    pre = models.start(wrap=lambda model: torch.compile(model, backend=counter, fullgraph=True))
    counts = []
    for _ in range(5):
        models.train(pre)
        counts.append((pre.phase, counter.frame_count))
        pre.end_epoch(1.0)

    assert counts == [("full", 1), ("full", 1), ("warmup", 2), ("lora", 3), ("lora", 3)]
