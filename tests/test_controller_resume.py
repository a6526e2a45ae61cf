"""Interrupted in any phase, inside an epoch or at its end, a run goes on bit for bit; no other run takes its state."""

import copy
import dataclasses

import models
import pytest
import timm.optim
import torch
from models import epochs, start, train, until
from timm.scheduler import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prelora import CheckpointError, PreLoRAWarning
from prelora.checkpoint import load_checkpoint, save_checkpoint


def sequential(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 20)], milestones=[3])


class TimmCosine(CosineLRScheduler):
    """Steps by itself, as torch's do."""

    def __init__(self, optimizer):
        super().__init__(optimizer, 30, warmup_t=3, t_in_epochs=False)
        self.updates = 0

    def step(self):
        self.updates += 1
        self.step_update(self.updates)


RUNS = {
    "adamw, cosine, timm's average": {
        "scheduler": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 30),
        "ema": lambda model: ModelEmaV3(model, decay=0.9),
    },
    "sgd, warm-up and cosine, torch's average": {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
        "scheduler": sequential,
        "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    },
    "lion, timm's cosine": {
        "optimizer": lambda p: timm.optim.create_optimizer_v2(list(p), "lion", lr=1e-4, weight_decay=0.1),
        "scheduler": TimmCosine,
    },
    "nadam, one cycle": {
        "optimizer": lambda p: torch.optim.NAdam(p, lr=1e-3),
        "scheduler": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=30),
    },
    "adamw, freeze all": {"fields": {"freeze": "all", "warmup_epochs": 2}},
    "adamw, two-epoch windows and a deadline": {"fields": {"m": 2, "tau": 1e-9, "deadline": 3, "window": "last"}},
    "adamw, update ranks and a LoRA along them": {
        "fields": {"criterion": "update_rank", "update_rank_max": 64, "lora_init": "window_update"},
        "ema": lambda model: ModelEmaV3(model, decay=0.9),
    },
    "sgd, forced inside a window, LoRA along what moved since the last": {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.05),
        "fields": {"m": 2, "criterion": "update_rank", "update_rank_max": 1, "lora_init": "window_update"}
        | {"deadline": 3, "log_updates": False},
    },
    "adamw, straight to lora": {"fields": {"warmup_epochs": 0, "alpha": 4.0, "log_updates": False}},
}


def begin(name="adamw, cosine, timm's average", **changes):
    """A run whose LoRA is ramped over 6 steps from the switch."""
    options = {"total_steps": 604} | RUNS[name] | changes
    return start(**options | {"fields": {"lora_lr_mult": 2.0} | options.get("fields", {})})


def assert_same(left, right, at=""):
    """Nested states, bit for bit."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, at
        assert torch.equal(left, right), at
    elif isinstance(left, dict):
        assert set(left) == set(right), at
        for key in left:
            assert_same(left[key], right[key], f"{at}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), at
        for i, below in enumerate(zip(left, right, strict=True)):
            assert_same(*below, f"{at}.{i}")
    else:
        assert left == right, at


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("done", "steps"), [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (5, 0)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, done, steps, tmp_path):
    pre = begin(run)
    epochs(pre, done)
    if steps:
        train(pre, steps)
    save_checkpoint(tmp_path / "step-000000001", pre.state_dict())

    resumed = begin(run)
    resumed.load_state_dict(load_checkpoint(tmp_path / "step-000000001"))
    assert (resumed.phase, resumed.epoch, resumed.step) == (pre.phase, done, 2 * done + steps)
    expected, found = epochs(pre, 4), epochs(resumed, 4)

    assert [dataclasses.asdict(event) for event in found] == [dataclasses.asdict(event) for event in expected]
    assert_same(resumed.state_dict(), pre.state_dict())
    assert expected[-1].phase == "lora"


def test_a_resumed_run_may_be_saved_and_resumed_at_once():
    """Also inside an epoch, where the snapshot for the update norm is an older one."""
    pre = begin()
    epochs(pre, 2)
    train(pre, 1)
    once, twice = begin(), begin()
    once.load_state_dict(copy.deepcopy(pre.state_dict()))
    twice.load_state_dict(copy.deepcopy(once.state_dict()))

    assert pre.state_dict()["snapshot"] is not None
    assert_same(twice.state_dict(), pre.state_dict())
    assert epochs(twice, 2) == epochs(pre, 2)


def test_at_an_epochs_end_no_snapshot_is_saved():
    pre = begin()
    epochs(pre, 1)

    assert pre.state_dict()["snapshot"] is None


@pytest.mark.parametrize("phase", ["warmup", "lora"])
def test_what_trains_and_what_is_frozen_is_as_it_was(phase):
    pre, resumed = begin(), begin()
    until(pre, phase)
    resumed.load_state_dict(pre.state_dict())

    trains = [{name for name, p in run.model.named_parameters() if p.requires_grad} for run in (pre, resumed)]
    assert trains[0] == trains[1]
    groups = [[(g["name"], len(g["params"])) for g in run.optimizer.param_groups] for run in (pre, resumed)]
    assert groups[0] == groups[1]
    assert resumed.ranks == pre.ranks
    assert resumed.switch_epoch == pre.switch_epoch == 2


def test_loading_shares_nothing_with_the_state():
    pre, resumed = begin(), begin()
    until(pre, "lora")
    state = copy.deepcopy(pre.state_dict())
    before = copy.deepcopy(state)
    resumed.load_state_dict(state)
    epochs(resumed, 2)

    assert_same(state, before)


def test_a_compiled_model_resumes_a_plain_ones_run():
    pre = begin("adamw, freeze all")
    until(pre, "lora")
    compiled = begin("adamw, freeze all", wrap=lambda model: torch.compile(model, backend="eager"))
    compiled.load_state_dict(copy.deepcopy(pre.state_dict()))

    assert epochs(compiled, 1) == epochs(pre, 1)
    assert_same(compiled.state_dict(), pre.state_dict())


def test_the_saved_seed_wins_with_a_warning():
    pre, resumed = begin(seed=3), begin(seed=4)
    epochs(pre, 1)
    with pytest.warns(PreLoRAWarning, match="seed 4 gives way to the saved 3"):
        resumed.load_state_dict(copy.deepcopy(pre.state_dict()))
    epochs(pre, 1)
    epochs(resumed, 1)

    assert torch.equal(resumed.model.blocks[0].mlp.fc1.lora_A, pre.model.blocks[0].mlp.fc1.lora_A)


@pytest.mark.parametrize("phase", ["full", "warmup", "lora"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"family": lambda: models.tiny_vit(num_classes=5)},
            r"head.weight is \(10, 64\) there and \(5, 64\) here",
        ),
        (
            {"family": lambda: models.tiny_vit(depth=2)},
            r"model or targets: they differ in blocks\.2\.attn\.proj",
        ),
        ({"family": models.layer_scale}, r"of another model: blocks\.0\.ls1\.gamma is None there and \(64,\) here"),
        ({"targets": "paper"}, r"another model or targets: they differ in blocks\.0\.attn"),
        ({"targets": {"q": "blocks.*.mlp.fc1"}}, "another model or targets"),
        ({"fields": {"tau": 3.0}}, r"saved with tau = 1000000\.0, the config says 3\.0: resume with the config"),
        ({"fields": {"r_max": 4}}, "saved with r_max = 8, the config says 4"),
        ({"fields": {"freeze": "all"}}, "saved with freeze = targets, the config says all"),
        ({"optimizer": torch.optim.Adam}, "optimizer is AdamW, not Adam"),
        (
            {"optimizer": lambda p: torch.optim.AdamW(list(p)[2:])},
            r"holds other parameters: they differ in \['cls_token', 'pos_embed'\]",
        ),
        ({"ema": ModelEmaV3}, "the state holds no EMA, unlike this run"),
        ({"scheduler": lr_scheduler.ConstantLR}, "the state holds no scheduler, unlike this run"),
    ],
)
def test_another_runs_state_is_refused_and_nothing_changed(other, message, phase):
    pre = start()
    until(pre, phase)
    resumed = start(**other)
    before = copy.deepcopy(resumed.state_dict())

    with pytest.raises(CheckpointError, match=message):
        resumed.load_state_dict(pre.state_dict())
    assert_same(resumed.state_dict(), before)


def test_a_state_from_before_a_setting_existed_was_saved_at_its_default():
    state = copy.deepcopy(start().state_dict())
    del state["config"]["criterion"], state["window_snapshot"], state["monitor"]["update_ranks"]
    resumed = start()
    resumed.load_state_dict(state)

    assert epochs(resumed, 3) == epochs(start(), 3)
    with pytest.raises(CheckpointError, match="saved with criterion = norm, the config says update_rank"):
        start(fields={"criterion": "update_rank"}).load_state_dict(state)


@pytest.mark.parametrize("what", ["ema", "scheduler"])
def test_a_state_with_more_than_the_run_has_is_refused(what):
    with pytest.raises(CheckpointError, match=f"the state holds an? {what}, unlike this run".replace("ema", "EMA")):
        begin(**{what: None}).load_state_dict(begin().state_dict())


@pytest.mark.parametrize("version", [0, 2, None])
def test_another_versions_state_is_refused(version):
    state = start().state_dict()
    state["version"] = version

    with pytest.raises(CheckpointError, match=f"state of version {version}; this prelora reads version 1"):
        start().load_state_dict(state)


@pytest.mark.parametrize("phase", ["warmup", "lora"])
def test_loading_into_a_run_that_has_switched_is_refused(phase):
    pre = start()
    until(pre, phase)

    with pytest.raises(RuntimeError, match=f"load_state_dict in phase '{phase}': load into a freshly built PreLoRA"):
        pre.load_state_dict(pre.state_dict())
