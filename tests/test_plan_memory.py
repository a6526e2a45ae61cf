"""The closed form of memory and communication, held to the paper's figures and to models that say it themselves."""

import pytest
import timm
import torch

from prelora.analysis.activations import Saved, saved_for_backward
from prelora.analysis.footprint import Footprint, Holding, footprint, optimizer_state_bytes
from prelora.analysis.phases import phase_models
from prelora.analysis.plan import count_model
from prelora.config import PreLoRAConfig
from prelora.targets import find_targets

GB = 1e9
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 10}
IMAGE = (3, 32, 32)
NOTHING_SAVED = Saved(per_image=0, fixed=0)


def meta_model(name="vit_tiny_patch16_224", **sizes):
    with torch.device("meta"):
        return timm.create_model(name, **sizes)


def tiny_phases(rank=4, **options):
    model = meta_model(**TINY)
    targets = find_targets(model)
    return phase_models(model, targets, {target.name: rank for target in targets}, PreLoRAConfig(**options))


@pytest.fixture(scope="module")
def vit_large():
    """Its phases at rank 64 and the sizes of its targets."""
    model = meta_model("vit_large_patch16_224")
    targets = find_targets(model)
    phases = phase_models(model, targets, {target.name: 64 for target in targets}, PreLoRAConfig())
    return phases, count_model(model, targets, torch.empty(1, 3, 224, 224, device="meta")).targets


def static(phase, costs, **options):
    """Bytes of weights, gradients, DDP's buckets and AdamW's state, without what depends on activations."""
    holding = Holding("ddp", 64, "fp32", state_bytes=8, snapshot=False, **options)
    items = footprint(phase, NOTHING_SAVED, costs, holding).fixed
    return sum(items.values())


def test_vit_large_trains_the_papers_tenth_at_rank_64(vit_large):
    phases, _ = vit_large

    trainable, total = phases["lora"].trainable, phases["full"].trainable
    assert (round(trainable / 1e6, 2), f"{100 * trainable / total:.2f}") == (30.43, "10.00")


@pytest.mark.parametrize(("bucket_view", "freed"), [(True, 3.2), (False, 4.3)])
def test_vit_large_frees_the_digests_gigabytes(vit_large, bucket_view, freed):
    phases, costs = vit_large

    full, lora = (static(phases[name], costs, bucket_view=bucket_view) for name in ("full", "lora"))
    assert round((full - lora) / GB, 1) == freed


def test_fsdp_shards_what_ddp_replicates(vit_large):
    phases, costs = vit_large

    whole, shard = (
        footprint(phases["full"], NOTHING_SAVED, costs, Holding(strategy, 64, "fp32", state_bytes=8)).fixed
        for strategy in ("ddp", "fsdp")
    )
    for item in ("weights", "gradients", "optimizer", "snapshot"):
        assert shard[item] == whole[item] // 64


def test_the_windows_copy_is_held_until_the_switch(vit_large):
    phases, costs = vit_large
    own = 4 * sum(cost.in_features * cost.out_features for cost in costs.values())
    holding = Holding("ddp", 64, "fp32", state_bytes=8, window_snapshot=True)

    held = [footprint(phase, NOTHING_SAVED, costs, holding).fixed["snapshot"] for phase in phases.values()]

    assert held == [2 * own, own, own]


# What autograd saves.


@pytest.fixture(scope="module")
def saved():
    """Bytes saved per image and whatever the batch, by phase, in bf16."""
    models = tiny_phases() | {"lora_fa": tiny_phases(train_lora_a=False)["lora"]}
    return {name: saved_for_backward(phase.model, IMAGE, "bf16") for name, phase in models.items()}


def test_merged_lora_saves_every_targets_input_as_full_does(saved):
    assert saved["full"].per_image == saved["warmup"].per_image == saved["lora"].per_image


def test_without_a_to_train_only_products_of_its_rank_are_saved(saved):
    tokens, width, rank, bf16 = 17, 48, 4, 2
    # An input of qkv, proj and fc1 each, and fc2's, four times as wide; against S of each slice.
    inputs = bf16 * tokens * (3 * width + 4 * width)
    products = bf16 * tokens * rank * 6
    kept_by_others = bf16 * tokens * width  # proj's input is the attention's output, which its backward reads

    assert saved["lora"].per_image - saved["lora_fa"].per_image == inputs - kept_by_others - products


def test_the_effective_weight_takes_the_place_of_autocasts_copies(saved):
    assert saved["full"].fixed == saved["warmup"].fixed == saved["lora"].fixed


def test_in_fp32_full_keeps_no_copy_of_a_weight_and_lora_its_effective_ones():
    phases = tiny_phases()
    full, lora = (saved_for_backward(phases[name].model, IMAGE, "fp32") for name in ("full", "lora"))

    adapted = 4 * 12 * 48 * 48
    assert lora.fixed - full.fixed == adapted
    assert full.fixed < 64


def test_two_paths_save_no_effective_weight():
    merged, two_path = (
        saved_for_backward(tiny_phases(execution=execution)["lora"].model, IMAGE, "fp32")
        for execution in ("merged", "two_path")
    )

    assert two_path.fixed < merged.fixed


# The optimizer, and the batch that fits.


@pytest.mark.parametrize(("name", "state"), [("adamw", 8), ("sgd", 4), ("lion", 4), ("adam", 8)])
def test_an_optimizers_state_is_read_off_the_optimizer(name, state):
    assert optimizer_state_bytes(name) == state


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="adamwow"):
        optimizer_state_bytes("adamwow")


@pytest.mark.parametrize(("memory", "images"), [(1000, 9), (999, 8), (100, 0), (0, 0)])
def test_the_largest_batch_is_the_last_that_fits(memory, images):
    held = Footprint({"weights": 100}, {"activations": 70, "workspace": 30})

    assert held.largest_batch(memory) == images
    assert memory < 100 or held.total(images) <= memory < held.total(images + 1)
