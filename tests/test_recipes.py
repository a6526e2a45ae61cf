"""Recipes say what the paper says, and their variants differ from it in what their name says."""

import dataclasses
from pathlib import Path

import pytest

from prelora import PreLoRAConfig
from prelora.train.config import to_dict
from prelora.train.recipes import PLANNED_GPUS, RECIPES

IMAGENET = 1_281_167
BASE = "vit_large_imagenet"


def flat(values, prefix=""):
    """``{"optim.lr": 0.001, …}``."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(name):
    """What a recipe has otherwise than ViT-L's, beside its name and folder."""
    base, other = (dict(flat(to_dict(RECIPES[recipe]()))) for recipe in (BASE, name))
    return {key: value for key, value in other.items() if value != base[key] and key not in ("recipe", "output")}


@pytest.mark.parametrize(
    ("variant", "changed"),
    [
        ("exp1", {"prelora.tau": 1.0, "prelora.zeta": 5.0}),
        ("exp2", {}),
        ("exp3", {"prelora.tau": 0.25, "prelora.zeta": 1.0}),
        ("w5", {"prelora.warmup_epochs": 5}),
        ("w10", {}),
        ("w15", {"prelora.warmup_epochs": 15}),
        ("full", {"method": "full"}),
    ],
)
def test_a_variant_changes_what_its_name_says_and_nothing_else(variant, changed):
    assert differences(f"{BASE}_{variant}") == changed


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_bears_its_name_and_writes_into_a_folder_of_its_own(name):
    config = RECIPES[name]()

    assert (config.recipe, config.output) == (name, Path("runs") / name)


def test_vit_large_is_the_papers_setting():
    expected = {
        "epochs": 300,
        "model.name": "vit_large_patch16_224",
        "data.rand_augment": [2, 15],
        "data.mixup": 0.5,
        "optim.lr": 1e-3,
        "optim.min_lr": 0.0,
        "optim.weight_decay": 0.1,
        "optim.clip_grad": 1.0,
        "prelora.k": 3,
        "prelora.m": 3,
        "prelora.tau": 0.5,
        "prelora.zeta": 2.5,
        "prelora.r_min": 8,
        "prelora.r_max": 64,
        "prelora.warmup_epochs": 10,
    }

    values = dict(flat(to_dict(RECIPES[BASE]())))

    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(("name", "global_batch"), [(BASE, 4096), ("vit_small_imagenet_90ep", 1024)])
def test_on_the_gpus_it_is_meant_for_a_recipe_warms_up_for_ten_thousand_steps(name, global_batch):
    config = RECIPES[name]()

    batch = config.data.batch_size * config.optim.accumulate * PLANNED_GPUS[name]
    steps = IMAGENET // batch
    assert batch == global_batch
    assert round(10_000 / steps) == config.optim.warmup_epochs
    assert config.prelora.monitor_from == config.optim.warmup_epochs


def test_the_ninety_epochs_have_the_papers_thresholds_scaled_to_their_schedule():
    long, short = (RECIPES[name]() for name in (BASE, "vit_small_imagenet_90ep"))

    scale = long.epochs / short.epochs
    assert short.prelora == dataclasses.replace(
        long.prelora,
        tau=round(long.prelora.tau * scale, 2),
        zeta=round(long.prelora.zeta * scale, 2),
        warmup_epochs=round(long.prelora.warmup_epochs / scale),
        monitor_from=short.optim.warmup_epochs,
        lora_lr_mult=PreLoRAConfig().lora_lr_mult,
    )
