"""A's and B's gradients from those of the weights, once per step: what backward gives, without its work."""

import models
import pytest
import torch
import torch.nn.functional as F

from prelora.nn.deferred_grads import defer_lora_grads, lora_grads_from_weights, lora_grads_pending
from prelora.surgery import freeze, inject, is_lora
from prelora.targets import find_targets


def vit():
    model = models.tiny_vit()
    targets = find_targets(model)
    inject(model, targets, {target.name: 2 + 3 * (i % 3) for i, target in enumerate(targets)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model.double(), targets


def backward(model, micro_batches=2):
    for x, y in zip(models.images().double().chunk(micro_batches), models.labels().chunk(micro_batches), strict=True):
        F.cross_entropy(model(x), y).backward()


def test_they_are_what_backward_gives():
    (deferred, _), (plain, _) = vit(), vit()
    defer_lora_grads(deferred)
    backward(deferred)
    backward(plain)
    assert lora_grads_pending(deferred)

    lora_grads_from_weights(deferred)

    assert not lora_grads_pending(deferred)
    for (name, mine), other in zip(deferred.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


def test_backward_leaves_a_and_b_alone_until_then():
    model, _ = vit()
    defer_lora_grads(model)
    backward(model)

    assert all((p.grad is None) == is_lora(name) for name, p in model.named_parameters())


def test_made_again_they_replace_and_do_not_add():
    model, _ = vit()
    defer_lora_grads(model)
    backward(model)
    lora_grads_from_weights(model)
    first = {name: p.grad.clone() for name, p in model.named_parameters() if is_lora(name)}

    lora_grads_from_weights(model)

    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in first.items())


def test_layers_with_dropout_are_not_deferred():
    model = models.tiny_vit()
    targets = find_targets(model)
    inject(model, targets, {target.name: 2 for target in targets}, dropout=0.1)

    assert defer_lora_grads(model) == []
    backward(model.double())
    assert all(p.grad is not None for p in model.parameters())


def test_once_the_base_is_frozen_backward_makes_them():
    model, targets = vit()
    defer_lora_grads(model)
    freeze(model, targets)
    backward(model)

    assert all(p.grad is not None for name, p in model.named_parameters() if is_lora(name))
    assert not lora_grads_pending(model)


@pytest.mark.parametrize("call", ["finish_gradients", "nothing", "finish_gradients twice"])
def test_the_optimizer_steps_with_them_whether_or_not_the_loop_asks(call):
    steps = {}
    for defer in (True, False):
        pre = models.start(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), defer_lora_grads=defer)
        models.until(pre, "warmup")
        for _ in range(2):
            F.cross_entropy(pre.model(models.images()), models.labels()).backward()
            for _ in range({"finish_gradients": 1, "nothing": 0, "finish_gradients twice": 2}[call]):
                pre.finish_gradients()
            pre.optimizer.step()
            pre.optimizer.zero_grad()
        steps[defer] = pre.base_model.state_dict()

    for name, tensor in steps[True].items():
        torch.testing.assert_close(tensor, steps[False][name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(steps[True][name].any() for name in steps[True] if name.endswith("lora_B"))


def test_a_step_that_was_left_out_leaves_no_old_gradient_behind():
    pre = models.start(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), defer_lora_grads=True)
    models.until(pre, "warmup")
    (lora_b,) = [p for name, p in pre.base_model.named_parameters() if name == "blocks.0.mlp.fc1.lora_B"]
    F.cross_entropy(1e6 * pre.model(models.images()), models.labels()).backward()
    pre.finish_gradients()
    pre.optimizer.zero_grad()  # as a loop does that leaves out a step whose loss is not finite

    F.cross_entropy(pre.model(models.images()), models.labels()).backward()
    pre.optimizer.step()

    assert lora_b.grad.abs().max() < 1
