"""PreLoRA under Lightning: three phases, checkpoints that resume bit for bit, DDP, and what is refused."""

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from launching import assert_equal, run_example
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning_runs import (
    BATCHES,
    PHASES,
    Batches,
    Manual,
    Module,
    Recording,
    fit,
    fit_on_ranks,
    outcome,
    plain,
    refusal_of_static_graph,
    trainer,
)
from models import images
from torch import nn
from two_ranks import running

from prelora import CheckpointError, OptimizerError, TargetError, surgery
from prelora.integrations.lightning import KEY, PreLoRACallback
from prelora.nn import LoRALinear
from prelora.targets import from_dicts

KINDS = ("batch", "validation", "epoch")
RESUMED = [
    *[("batch", step) for step in (2, 6, 8, 11, 15)],  # within an epoch of each phase, and after a last batch
    *[("validation", step) for step in (6, 9)],  # before the switch and before the freeze that the epoch ends in
    *[("epoch", step) for step in (3, 6, 9)],
]


def read(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and every checkpoint that it could have been interrupted after."""
    folder = tmp_path_factory.mktemp("lightning")
    return folder, *fit(folder, KINDS)


def test_fit_goes_through_all_three_phases(whole):
    _, _, ours, events = whole

    assert [event.phase for event in events] == PHASES
    assert [event.action for event in events] == ["none", "switch", "freeze", "none", "none"]
    assert ours.pre.step == BATCHES * len(PHASES)


def test_every_layer_has_its_planned_rank(whole):
    _, module, ours, _ = whole

    assert surgery.realised_ranks(module.model, ours.pre.targets) == ours.pre.ranks
    assert len(set(ours.pre.ranks.values())) > 1


def test_a_frozen_weight_stays_as_it_was_and_lora_trains(whole):
    folder, *_ = whole
    first, last = (read(folder / f"epoch-{step}.ckpt")[KEY]["state"]["model"] for step in (9, 15))

    for path in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        assert torch.equal(first[f"{path}.weight"], last[f"{path}.weight"])
        assert not torch.equal(first[f"{path}.lora_B"], last[f"{path}.lora_B"])


def test_what_lightning_trains_with_is_the_controllers(whole):
    _, module, ours, _ = whole

    strategy = module.trainer.strategy
    assert strategy.optimizers == [ours.pre.optimizer]
    assert strategy.lr_scheduler_configs[0].scheduler is ours.pre.scheduler
    assert ours.pre.optimizer.param_groups[1]["lr"] == pytest.approx(ours.pre.scheduler.get_last_lr()[1])
    assert ours.pre.total_steps == BATCHES * len(PHASES)


@pytest.mark.parametrize(("kind", "step"), RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(whole, kind, step):
    folder, module, ours, _ = whole

    resumed = fit(ckpt_path=folder / f"{kind}-{step}.ckpt")

    assert_equal(outcome(*resumed[:2]), outcome(module, ours))


def test_rotation_keeps_the_newest_and_it_resumes(whole, tmp_path):
    _, module, ours, _ = whole
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=1, every_n_train_steps=2, save_last=True)

    fit(callbacks=[saver])
    resumed = fit(ckpt_path=tmp_path / "last.ckpt")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=14.ckpt"]
    assert_equal(outcome(*resumed[:2]), outcome(module, ours))


@pytest.mark.parametrize("step", [3, 6, 12])
def test_every_checkpoint_loads_into_the_plain_module(whole, step):
    folder, *_ = whole
    saved = read(folder / f"epoch-{step}.ckpt")
    state = saved[KEY]["state"]

    plain = Module(seed=1)
    plain.load_state_dict(saved["state_dict"], strict=True)

    trained = Module()
    if state["ranks"]:
        surgery.inject(trained.model, from_dicts(state["targets"]), state["ranks"])
    trained.model.load_state_dict(state["model"])
    torch.testing.assert_close(plain.model.eval()(images()), trained.model.eval()(images()))


def test_weights_only_checkpoints_load_into_the_plain_module(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    module, ours, _ = fit(callbacks=[saver])

    plain = Module.load_from_checkpoint(tmp_path / "weights.ckpt")

    merged = ours.pre.merged_state_dict()
    assert_equal(dict(plain.model.state_dict()), merged)
    assert not any(isinstance(layer, LoRALinear) for layer in plain.modules())
    torch.testing.assert_close(plain.eval()(images()), module.eval()(images()))


def test_an_earlier_checkpoint_can_be_evaluated_after_fit(whole):
    folder, *_ = whole
    module, _, _ = fit()
    path = folder / "epoch-6.ckpt"

    module.trainer.validate(module, Batches(1), ckpt_path=path, verbose=False)

    plain = Module()
    plain.load_state_dict(read(path)["state_dict"])
    torch.testing.assert_close(module.eval()(images()), plain.eval()(images()))


# Ways to train.


class Silent(Manual):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


def fp16():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "gradient_clip_val": 1.0}


WAYS = {
    "accumulated, clipped, bf16": (
        Recording,
        lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"},
    ),
    "fp16 with a scaler": (Recording, fp16),
    "manual": (Manual, dict),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_training_takes_all_phases_on_the_loss_of_training_step(way):
    build, options = WAYS[way]

    module, ours, events = fit(module=build(), options=options())

    assert [event.phase for event in events] == PHASES
    losses = torch.tensor(module.losses, dtype=torch.float64).view(-1, BATCHES)
    assert [event.loss for event in events] == pytest.approx(losses.mean(dim=1).tolist(), rel=1e-6)
    assert any((layer.lora_B != 0).any() for layer in ours.pre.base_model.modules() if isinstance(layer, LoRALinear))


def test_an_epoch_cut_short_is_not_ended():
    _, ours, _ = fit(options={"max_steps": BATCHES + 1})

    assert (ours.pre.epoch, ours.pre.step) == (1, BATCHES + 1)


class Failing(Module):
    """Breaks down in the second step of WARMUP."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 7:
            raise ArithmeticError
        return super().training_step(batch, batch_idx)


def test_an_exceptions_checkpoint_holds_the_learning_rates_without_loras_ramp(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="failed", save_top_k=0, save_on_exception=True)

    with pytest.raises(ArithmeticError):
        fit(module=Failing(), callbacks=[saver], options={"max_epochs": 1000})

    saved = read(tmp_path / "failed.ckpt")
    assert saved[KEY]["state"]["ramps"]["group0/lora"]["length"] > 2
    assert [group["lr"] for group in saved["optimizer_states"][0]["param_groups"]] == saved["lr_schedulers"][0][
        "_last_lr"
    ]


def test_loggers_get_phase_share_loss_and_norms(tmp_path):
    logger = CSVLogger(tmp_path)
    _, _, events = fit(callbacks=[LearningRateMonitor("step")], options={"logger": logger, "log_every_n_steps": 1})

    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["prelora/phase"]]
    assert [float(line["prelora/phase"]) for line in lines] == [0, 1, 2, 2, 2]
    assert [float(line["prelora/loss"]) for line in lines] == pytest.approx([event.loss for event in events])
    assert [float(line["prelora/trainable_share"]) for line in lines][-1] == pytest.approx(events[-1].trainable_share)
    assert {"prelora/norm/q", "prelora/norm/mlp_in"} <= set(lines[0])


# Two ranks.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with running(tmp_path_factory.mktemp("ranks"), preload=["lightning.pytorch"]) as started:
        yield started


@pytest.fixture(scope="module")
def whole_on_ranks(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return folder, ranks(fit_on_ranks, folder, KINDS)


def test_ranks_hold_the_same_bits_after_all_phases(whole_on_ranks, whole):
    _, (first, second) = whole_on_ranks

    assert first == second
    assert first["phase"] == "lora"
    assert first["model"] != plain(outcome(*whole[1:3]))["model"]  # of one rank alone: they did reduce


@pytest.mark.parametrize("name", ["batch-5", "batch-8", "batch-9", "batch-13", "validation-9", "epoch-3"])
def test_a_resumed_run_on_ranks_equals_the_uninterrupted_one(ranks, whole_on_ranks, name):
    folder, whole = whole_on_ranks

    assert ranks(fit_on_ranks, None, (), folder / f"{name}.ckpt") == whole


def test_a_run_on_two_ranks_goes_on_alone_with_the_mean_of_their_losses(whole_on_ranks):
    path = whole_on_ranks[0] / "batch-5.ckpt"
    (first, done), (second, _) = read(path)[KEY]["epoch"]

    module, ours, events = fit(module=Recording(), ckpt_path=path)

    rest = sum(module.losses[: BATCHES - done])
    assert done == 2
    assert events[0].loss == pytest.approx(((first + second) / 2 + rest) / BATCHES, rel=1e-6)
    assert ours.pre.phase == "lora"


# The example.


def test_the_example_runs_on_two_ranks(tmp_path):
    lines = run_example("lightning_train.py", "--output", str(tmp_path), "--devices", "2", "--epochs", "7").splitlines()

    phases = [line.split()[2] for line in lines if line.startswith("epoch")]
    assert list(dict.fromkeys(phases)) == ["full", "warmup", "lora"]
    assert "in a stock vit_tiny_patch16_224: logits differ by" in lines[-1]
    assert read(tmp_path / "last.ckpt")[KEY]["state"]["phase"] == "lora"


# What is refused.


def test_a_static_graph_under_manual_optimization_is_refused(ranks):
    message = "PreLoRACallback with static_graph=True under manual optimization: leave static_graph out"

    assert ranks(refusal_of_static_graph) == [message] * 2


def two_optimizers(module):
    halves = list(module.model.parameters()), [module.scale]
    module.automatic_optimization = False
    return [torch.optim.SGD(half, lr=0.1) for half in halves]


def two_schedulers(module):
    optimizer = torch.optim.SGD(module.model.parameters(), lr=0.1)
    return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)]


def lbfgs(module):
    return torch.optim.LBFGS(module.model.parameters())


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (two_optimizers, r"2 optimizers: give one, with parameter groups"),
        (two_schedulers, r"2 schedulers: chain them"),
        (lbfgs, r"LBFGS keeps one flat history"),
    ],
)
def test_optimizers_that_cannot_be_carried_are_refused(optimizers, message):
    module = Module()
    module.configure_optimizers = lambda: optimizers(module)

    with pytest.raises(OptimizerError, match=message):
        fit(module=module)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (StochasticWeightAveraging(1e-2), r"hold timm's ModelEmaV3 in the module, and pass ema="),
        (BackboneFinetuning(), r"PreLoRACallback decides what trains"),
        (LearningRateFinder(), r"run it with a Trainer of its own"),
    ],
)
def test_callbacks_that_the_switch_does_not_reach_are_refused(callback, message):
    with pytest.raises(TypeError, match=message):
        fit(callbacks=[callback])


def test_a_sharded_strategy_is_refused():
    run = trainer([PreLoRACallback()])
    run.strategy.__class__ = FSDPStrategy

    with pytest.raises(TypeError, match=r"under FSDPStrategy: accepted are one device and strategy='ddp'"):
        PreLoRACallback().setup(run, Module(), "fit")


def tied():
    module = Module()
    module.model.blocks[1].mlp.fc1.weight = module.model.blocks[0].mlp.fc1.weight
    del module.average
    return module


def without_vit():
    module = Module()
    module.vit = module.model
    del module.model, module.average
    module.forward = module.vit.forward
    return module


def convolutional():
    module = Module()
    module.model = nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten())
    del module.average
    return module


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (tied, TargetError, r"shares a parameter with others .*; untie it first"),
        (without_vit, AttributeError, r"give PreLoRACallback\(model=\.\.\.\); its modules: vit"),
        (convolutional, TargetError, r"no targets are known for torch\.nn\.modules\.container\.Sequential"),
        (Silent, RuntimeError, r"Silent\.training_step returned no loss"),
    ],
)
def test_modules_that_cannot_be_switched_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        fit(module=build())


def test_a_module_that_carries_lora_is_refused(whole):
    _, module, _, _ = whole

    with pytest.raises(RuntimeError, match=r"from an earlier fit: build it anew; to go on, pass ckpt_path="):
        fit(module=module)


def test_a_checkpoint_of_another_config_is_refused(whole):
    with pytest.raises(CheckpointError, match=r"saved with warmup_epochs = 1, the config says 2"):
        fit(ckpt_path=whole[0] / "epoch-6.ckpt", fields={"warmup_epochs": 2})


def test_a_checkpoint_without_prelora_is_refused(tmp_path):
    trainer([ModelCheckpoint(tmp_path, filename="plain")], epochs=1).fit(Module(), Batches())

    with pytest.raises(CheckpointError, match=r"load them into the module and call fit without ckpt_path"):
        fit(ckpt_path=tmp_path / "plain.ckpt")
