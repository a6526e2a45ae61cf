"""transformers' Trainer through all three phases: resumed bit for bit, on ranks, rotated, a stock folder at the end."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from launching import run_example
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    ViTForImageClassification,
)
from transformers_runs import CONFIG, EPOCHS, NEVER, PHASES, STEPS, arguments, build, images, trained, vit
from two_ranks import bits, running

from prelora import CheckpointError, PreLoRAWarning, distributed, surgery
from prelora.checkpoint import load_checkpoint
from prelora.integrations.transformers import PreLoRATrainer
from prelora.nn import LoRALinear
from prelora.targets import find_targets

torch.set_num_threads(1)


def logged(trainer):
    """The log without what is measured in seconds."""
    return [
        {key: value for key, value in line.items() if not key.endswith(("runtime", "per_second", "flos"))}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]


class Spy(TrainerCallback):
    """What a user's callback is handed at each step's and each epoch's end."""

    def __init__(self):
        self.trainer = None
        self.layers, self.rates, self.current, self.optimizers = [], [], [], []

    def on_step_end(self, args, state, control, model, optimizer, **_):
        self.layers.append(sum(isinstance(module, LoRALinear) for module in model.modules()))
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups if "name" in group})

    def on_epoch_end(self, args, state, control, model, optimizer, lr_scheduler, **_):
        pre = self.trainer.pre
        held = (pre.base_model, pre.optimizer, pre.scheduler)
        self.current.append([a is b for a, b in zip((model, optimizer.optimizer, lr_scheduler), held, strict=True)])
        self.optimizers.append(optimizer.optimizer)


SAVING = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module")
def spy():
    return Spy()


@pytest.fixture(scope="module")
def whole(spy, tmp_path_factory):
    """An uninterrupted run with a checkpoint every second step: in the middle and at the end of every epoch."""
    spy.trainer = build(tmp_path_factory.mktemp("whole"), callbacks=[spy], **SAVING)
    spy.trainer.train()
    return spy.trainer


@pytest.fixture(scope="module")
def never(tmp_path_factory):
    """A run that does not switch."""
    return trained(tmp_path_factory.mktemp("never"), config=NEVER)


@pytest.fixture
def folder(whole):
    return Path(whole.args.output_dir)


def test_all_three_phases_are_taken_and_the_plan_is_realised(whole):
    assert [event.phase for event in whole.events] == PHASES
    assert whole.pre.ranks == surgery.realised_ranks(whole.model, whole.pre.targets)
    assert len(set(whole.pre.ranks.values())) > 1


def test_an_epochs_loss_is_the_mean_of_its_steps(whole):
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]

    means = [sum(losses[i : i + STEPS]) / STEPS for i in range(0, len(losses), STEPS)]

    assert [event.loss for event in whole.events] == pytest.approx(means, rel=1e-6)


def test_every_epochs_end_is_logged_as_numbers(whole):
    lines = [line for line in whole.state.log_history if "prelora_phase" in line]
    ranks = whole.pre.ranks.values()

    assert [(line["epoch"], line["prelora_phase"]) for line in lines] == [(1, 0), (2, 1), (3, 2), (4, 2)]
    assert [line["prelora_trainable_share"] for line in lines] == [event.trainable_share for event in whole.events]
    assert "prelora_rank_mean" not in lines[0]
    assert lines[1]["prelora_rank_mean"] == pytest.approx(sum(ranks) / len(ranks))
    assert (lines[1]["prelora_rank_min"], lines[1]["prelora_rank_max"]) == (min(ranks), max(ranks))


def test_a_frozen_weight_stays_bit_identical(whole, folder):
    frozen_at = load_checkpoint(folder / "checkpoint-12" / "prelora")
    assert frozen_at["phase"] == "lora"
    names = [f"{target.path}.weight" for target in whole.pre.targets]

    assert bits({n: whole.model.state_dict()[n] for n in names}) == bits({n: frozen_at["model"][n] for n in names})


# Steps 2, 4: FULL, within an epoch and at its end. 8: switched there. 10: WARMUP. 12: frozen there. 14: LORA.
@pytest.mark.parametrize("step", [2, 4, 8, 10, 12, 14])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(step, whole, folder, tmp_path):
    resumed = trained(tmp_path, resume=str(folder / f"checkpoint-{step}"), **SAVING | {"save_strategy": "no"})

    assert resumed.events == whole.events[step // STEPS :]
    assert bits(resumed.pre.state_dict()) == bits(whole.pre.state_dict())
    assert logged(resumed) == logged(whole)


def test_callbacks_see_what_is_current(whole, spy):
    assert spy.current == [[True, True, True]] * EPOCHS
    assert len(set(map(id, spy.optimizers))) == 3
    assert spy.layers == [0] * 7 + [12] * 9  # at the last step of epoch 2 already


def test_the_schedule_goes_on_and_loras_rate_is_its_multiple(whole, spy, never):
    rates = [line["learning_rate"] for line in never.state.log_history if "learning_rate" in line]

    switched = spy.rates[8:-1]

    assert [lrs["group1"] for lrs in switched] == pytest.approx(rates[9:])
    assert [lrs["group0/lora"] for lrs in switched] == pytest.approx([2 * rate for rate in rates[9:]])


def test_until_it_switches_it_is_the_stock_trainer(never, tmp_path):
    stock = Trainer(vit(), arguments(tmp_path), train_dataset=images(), eval_dataset=images(8))
    stock.train()

    assert bits(dict(never.model.state_dict())) == bits(dict(stock.model.state_dict()))
    assert [line for line in logged(never) if "loss" in line] == logged(stock)


# Settings that change what is wrapped, stepped or scheduled.

SETTINGS = {
    "bf16": {"bf16": True},
    "plateau, sgd": {
        "lr_scheduler_type": "reduce_lr_on_plateau", "optim": "sgd", "learning_rate": 0.1, "warmup_steps": 0,
        "eval_strategy": "epoch", "metric_for_best_model": "loss", "lr_scheduler_kwargs": {"patience": 0},
    },
    "adafactor, activation checkpointing": {"optim": "adafactor", "activation_checkpointing": True},
    "adagrad, cut off within an epoch": {"optim": "adagrad", "max_steps": 14},
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_other_settings_take_all_phases_and_resume_bit_for_bit(setting, tmp_path):
    changes = SETTINGS[setting] | {"save_strategy": "steps", "save_steps": 10}
    run = trained(tmp_path / "run", **changes)

    resumed = trained(tmp_path / "resumed", resume=str(tmp_path / "run" / "checkpoint-10"), **SETTINGS[setting])

    assert [event.phase for event in run.events] == PHASES[: run.state.global_step // STEPS]
    assert bits(resumed.pre.state_dict()) == bits(run.pre.state_dict())


def test_a_compiled_model_takes_all_phases(tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "per_device_train_batch_size": 16}
    run = trained(tmp_path, num_train_epochs=3, **settings)

    assert [event.phase for event in run.events] == PHASES[:3]
    assert run.model_wrapped._orig_mod is run.model


def test_an_epoch_that_a_callback_ends_early_is_one(tmp_path):
    class Hasty(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_epoch_stop = state.global_step == 2

    run = trained(tmp_path, callbacks=[Hasty()], num_train_epochs=2)
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]

    assert [event.loss for event in run.events] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 4])


def test_model_init_trains_anew(tmp_path):
    args = arguments(tmp_path, num_train_epochs=2)
    trainer = PreLoRATrainer(args=args, train_dataset=images(), prelora_config=CONFIG, model_init=lambda: vit())
    trainer.train()
    once = trainer.pre.state_dict()
    trainer.train()

    assert bits(trainer.pre.state_dict()) == bits(once)


# Folders.


def loaded(folder):
    """The stock model in a folder, which loads without a key missing or left over."""
    model, found = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert {name: list(keys) for name, keys in found.items() if keys} == {}
    assert type(model) is ViTForImageClassification
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.stack([sample["pixel_values"] for sample in images(8)])).logits


@pytest.mark.parametrize("step", [4, 10, 14])
def test_a_checkpoint_of_each_phase_is_a_stock_folder_of_the_merged_model(step, folder):
    tree = load_checkpoint(folder / f"checkpoint-{step}" / "prelora")
    model = vit()
    if tree["ranks"]:
        surgery.inject(model, find_targets(model), tree["ranks"])
    model.load_state_dict(tree["model"], strict=True)

    stock = loaded(folder / f"checkpoint-{step}")

    torch.testing.assert_close(logits(stock), logits(model.eval()), rtol=1e-4, atol=1e-5)


def test_what_save_model_writes_is_a_stock_folder(whole, tmp_path):
    whole.save_model(tmp_path)

    stock = loaded(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "training_args.bin"}
    torch.testing.assert_close(logits(stock), logits(whole.model.eval()), rtol=1e-4, atol=1e-5)
    base = whole.model.state_dict()["vit.layers.0.mlp.fc1.weight"]
    assert not torch.allclose(stock.state_dict()["vit.layers.0.mlp.fc1.weight"], base, atol=1e-4)


@pytest.mark.parametrize("only_model", [False, True])
def test_old_checkpoints_go_and_the_best_is_loaded_at_the_end(only_model, tmp_path):
    run = trained(
        tmp_path, save_strategy="epoch", eval_strategy="epoch", save_total_limit=2, load_best_model_at_end=True,
        save_only_model=only_model, learning_rate=3e-2,
    )  # fmt: skip
    best = Path(run.state.best_model_checkpoint)
    evaluated = {line["step"]: line["eval_loss"] for line in run.state.log_history if "eval_loss" in line}

    assert {path.name for path in tmp_path.iterdir()} == {best.name, "checkpoint-16"}
    assert best.name != "checkpoint-16"
    assert bits(dict(run.model.state_dict())) == bits(dict(loaded(best).state_dict()))
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluated.values()), rel=1e-4)


def test_a_folder_used_again_holds_the_newer_runs_state(tmp_path):
    trained(tmp_path, num_train_epochs=1, save_strategy="epoch", seed=3)
    newer = trained(tmp_path, num_train_epochs=1, save_strategy="epoch", seed=4)

    assert bits(load_checkpoint(tmp_path / "checkpoint-4" / "prelora")["model"]) == bits(dict(newer.model.state_dict()))


# Which checkpoint.


@pytest.fixture
def copied(folder, tmp_path):
    """Two checkpoints of the whole run, in a folder of their own."""
    for step in (10, 12):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "a flipped bit": (lambda path: flip(path / "prelora" / "model.safetensors"), "does not match its SHA-256"),
    "killed in PreLoRA's state": (lambda path: shutil.rmtree(path / "prelora"), "manifest.json is missing"),
    "killed before the last file": (lambda path: (path / "trainer_state.json").unlink(), "trainer_state.json"),
    "killed within the last file": (lambda path: (path / "trainer_state.json").write_text('{"ep'), "Unterminated"),
}


class OneStep(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = True


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_gives_way_to_the_one_before_and_says_so(damage, copied):
    harm, message = DAMAGES[damage]
    harm(copied / "checkpoint-12")

    with pytest.warns(PreLoRAWarning, match=f"passed over .* for .*checkpoint-10: checkpoint-12: .*{message}"):
        resumed = trained(copied, resume=True, callbacks=[OneStep()])

    assert resumed.state.global_step == resumed.pre.step == 11


def test_an_intact_newest_is_taken_without_a_word(copied):
    resumed = trained(copied, resume=True, callbacks=[OneStep()])

    assert resumed.state.global_step == resumed.pre.step == 13


def test_without_an_intact_one_nothing_is_resumed(copied):
    for path in copied.iterdir():
        flip(path / "prelora" / "optimizer.safetensors")

    with pytest.raises(CheckpointError, match=r"no intact checkpoint under .*checkpoint-12: .*checkpoint-10: "):
        trained(copied, resume=True)


def test_without_any_the_trainer_says_so(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trained(tmp_path, resume=True)


def test_a_damaged_one_named_is_refused(copied):
    flip(copied / "checkpoint-12" / "prelora" / "optimizer.safetensors")

    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors does not match its SHA-256"):
        trained(copied, resume=str(copied / "checkpoint-12"))


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path):
    trained(tmp_path, num_train_epochs=1, save_strategy="epoch", save_only_model=True)

    with pytest.raises(CheckpointError, match="checkpoint-4 holds no prelora/: accepted is a checkpoint that"):
        trained(tmp_path, resume=str(tmp_path / "checkpoint-4"))


def test_another_configs_checkpoint_is_refused(copied):
    with pytest.raises(CheckpointError, match="saved with r_max = 8, the config says 4"):
        trained(copied, resume=str(copied / "checkpoint-12"), config=dataclasses.replace(CONFIG, r_max=4))


def test_a_second_train_is_refused(whole):
    with pytest.raises(RuntimeError, match=r"train\(\) was called before.*or give model_init"):
        whole.train()


# Two gloo ranks.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with running(tmp_path_factory.mktemp("ranks")) as started:
        yield started


def on_a_rank(output, resume, evaluate_first=False):
    rank, world = distributed.rank(), distributed.world_size()
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}", "LOCAL_WORLD_SIZE": f"{world}"}
    trainer = build(output, save_strategy="steps", save_steps=1)
    if evaluate_first:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume and f"{output}/checkpoint-{resume}")
    return {
        "state": bits(trainer.pre.state_dict()),
        "phases": [event.phase for event in trainer.events],
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "ranks": surgery.realised_ranks(trainer.model, trainer.pre.targets) == trainer.pre.ranks,
    }


@pytest.fixture(scope="module")
def on_two(ranks, tmp_path_factory):
    """A whole run of two steps an epoch, with a checkpoint at each."""
    output = tmp_path_factory.mktemp("two")
    return output, ranks(on_a_rank, str(output), None, True)


def test_two_ranks_end_with_the_same_bits_also_after_an_evaluation_first(on_two):
    _, (one, other) = on_two

    assert one == other
    assert one["phases"] == PHASES
    assert one["wrapped"]
    assert one["ranks"]


# FULL in the first and in a later epoch, WARMUP, LORA.
@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_two_ranks_resume_bit_for_bit(step, on_two, ranks):
    output, (whole, _) = on_two

    for resumed in ranks(on_a_rank, str(output), step):
        assert resumed["phases"] == whole["phases"][step // 2 :]
        assert resumed["state"] == whole["state"]


# The example.


def test_the_example_takes_all_phases_on_two_ranks(tmp_path):
    said = run_example("transformers_train.py", "--output", str(tmp_path), ranks=2)

    assert re.findall(r"epoch \d: (\w+)", said) == ["full", "full", "warmup", "lora", "lora"]
    loaded(tmp_path / "final")
