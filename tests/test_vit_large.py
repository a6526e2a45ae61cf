"""ViT-L/16 itself, at its real size, goes through the switch: one step in each phase."""

import pytest
import timm
import torch
import torch.nn.functional as F

from prelora import PreLoRA, PreLoRAConfig


@pytest.fixture(scope="module")
def run():
    """Per phase: the event that led into it, and the loss of one real step in it."""
    torch.manual_seed(0)
    model = timm.create_model("vit_large_patch16_224")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    config = PreLoRAConfig(k=2, m=1, tau=1e6, zeta=1e6, warmup_epochs=1, log_updates=False)
    pre = PreLoRA(model, optimizer, config)
    images, labels = torch.randn(1, 3, 224, 224), torch.tensor([7])
    events, frozen = [], None
    for _ in range(4):
        loss = F.cross_entropy(pre.model(images), labels)
        loss.backward()
        pre.optimizer.step()
        pre.optimizer.zero_grad()
        events.append(pre.end_epoch(loss.item(), probe=images))
        if events[-1].action == "freeze":
            frozen = pre.base_model.blocks[23].mlp.fc1.weight.clone()
    return pre, events, frozen


def test_it_passes_through_all_three_phases(run):
    _, events, _ = run

    assert [event.phase for event in events] == ["full", "warmup", "lora", "lora"]


def test_its_frozen_weights_stay_bit_identical(run):
    pre, _, frozen = run

    assert torch.equal(pre.base_model.blocks[23].mlp.fc1.weight, frozen)


def test_its_lora_trains(run):
    pre, _, _ = run

    assert all(bool(block.mlp.fc1.lora_B.any()) for block in pre.base_model.blocks)


def test_the_freeze_releases_the_targets_gradients_and_momenta(run):
    _, events, _ = run

    target_bytes = 4 * 24 * (1024 * 3072 + 3072 + 1024 * 1024 + 1024 + 2 * 1024 * 4096 + 4096 + 1024)
    assert events[2].released == {"gradients": target_bytes, "optimizer_state": target_bytes}
