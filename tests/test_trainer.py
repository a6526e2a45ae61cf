"""A whole run in this process: what it writes, how it ends, and what it refuses."""

import dataclasses
import errno
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import tiny

from prelora.checkpoint import checkpoints, read_manifest, verify_checkpoint
from prelora.train.__main__ import train
from prelora.train.config import load_yaml


def metrics(config):
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = tiny(tmp_path_factory.mktemp("finished") / "run")
    assert train(config) == 0
    return config


def test_a_line_an_epoch_with_all_phases_in_order(finished):
    assert [line["phase"] for line in metrics(finished)] == ["full", "full", "warmup", "lora"]


def test_every_target_has_its_norm_in_every_line(finished):
    targets = {target["name"] for target in json.loads((finished.output / "run.json").read_text())["targets"]}

    assert all(set(line["norms"]) == set(line["base_norms"]) == targets for line in metrics(finished))
    assert [set(line["lora_norms"]) for line in metrics(finished)] == [set(), set(), targets, targets]


def test_memory_by_item_falls_at_the_freeze_by_what_was_released(finished):
    lines = metrics(finished)
    released = lines[2]["event"]["released"]

    warmup, lora = lines[2]["memory"], lines[3]["memory"]

    assert warmup["gradients"] - lora["gradients"] == released["gradients"] > 0
    assert warmup["optimizer"] - lora["optimizer"] >= released["optimizer_state"] > 0


def test_tensorboard_holds_the_losses(finished):
    events = EventAccumulator(str(finished.output / "tensorboard")).Reload()

    scalars = [event.value for event in events.Scalars("train/loss")]

    assert scalars == pytest.approx([line["loss"] for line in metrics(finished)], rel=1e-6)


def test_saved_config_is_the_whole_config(finished):
    assert load_yaml(finished.output / "config.yaml") == finished


def test_last_n_checkpoints_and_the_best_are_kept(finished):
    scored = [read_manifest(path).about["metric"] for path in checkpoints(finished.output / "checkpoints")]

    assert len(scored) in (2, 3)
    assert max(scored) == max(line["eval"]["top1"] for line in metrics(finished))


def test_the_same_seed_gives_the_same_run(finished, tmp_path):
    again = tiny(tmp_path / "run")
    train(again)

    assert [line["loss"] for line in metrics(again)] == [line["loss"] for line in metrics(finished)]


def test_accumulated_halves_equal_the_whole_batch(finished, tmp_path):
    halves = tiny(tmp_path / "run", data={"batch_size": 160}, optim={"accumulate": 2})
    train(halves)

    ours, theirs = (torch.tensor([line["loss"] for line in metrics(config)]) for config in (halves, finished))
    assert torch.allclose(ours, theirs, rtol=1e-4)


def test_full_method_never_switches_but_logs_norms(tmp_path):
    config = tiny(tmp_path / "run", method="full")
    train(config)

    assert {line["phase"] for line in metrics(config)} == {"full"}
    assert all(line["norms"] for line in metrics(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"data": {"batch_size": 320, "mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1}},
        {"optim": {"name": "sgd", "accumulate": 1}},
        {"model": {"library": "transformers"}},
        {"targets": "paper", "ema_decay": None},
    ],
    ids=["bf16", "fp16", "mixup", "sgd", "transformers", "paper groups"],
)
def test_all_phases_run_with(changes, tmp_path):
    config = tiny(tmp_path / "run", **changes)

    assert train(config) == 0

    assert [line["phase"] for line in metrics(config)] == ["full", "full", "warmup", "lora"]


@pytest.fixture
def nan_in_step_5(monkeypatch):
    """The fifth loss of the run is NaN."""
    from prelora.train.loop import Trainer

    original, calls = Trainer._loss, []

    def loss(self, images, labels):
        calls.append(1)
        value = original(self, images, labels)
        return value * float("nan") if len(calls) == 5 else value

    monkeypatch.setattr(Trainer, "_loss", loss)


@pytest.mark.usefixtures("nan_in_step_5")
def test_nan_stops_the_run_with_code_3_and_says_where(tmp_path, capsys):
    config = tiny(tmp_path / "run")

    assert train(config) == 3

    assert "not finite in epoch 2, step 1" in capsys.readouterr().err


@pytest.mark.usefixtures("nan_in_step_5")
def test_nan_skipped_is_reported_and_keeps_the_test_from_passing(tmp_path):
    config = tiny(tmp_path / "run", on_nan="skip")

    assert train(config) == 0

    second = metrics(config)[1]
    assert (second["loss"], second["skipped_steps"], second["event"]["action"]) == (None, 1, "none")
    assert "undefined" in second["event"]["reason"]


def test_a_folder_that_holds_a_run_is_refused(finished, capsys):
    assert train(finished) == 2

    assert "already holds a run" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    assert train(tiny(tmp_path / "file" / "run")) == 2

    assert "file" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    from prelora import checkpoint

    original, calls = checkpoint.save_file, []

    def full(tensors, file):
        calls.append(file)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    config = tiny(tmp_path / "run")

    assert train(config) == 4

    assert "No space left on device" in capsys.readouterr().err
    assert all(verify_checkpoint(path) for path in checkpoints(config.output / "checkpoints"))


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"optim": {"lr": 0.5}}, "optim.lr"), ({"model": {"depth": 3}}, "model.depth"), ({"seed": 9}, "seed")],
)
def test_resuming_with_another_config_is_refused_by_name(changes, name, finished, capsys):
    code = train(tiny(finished.output, resume="auto", **changes))

    assert code == 4
    assert f"was written with {name} = " in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused(tmp_path, capsys):
    assert train(tiny(tmp_path / "run", data={"batch_size": 5000})) == 2

    assert "global batch of 5000" in capsys.readouterr().err


def test_an_unknown_model_is_refused_with_others_like_it(tmp_path, capsys):
    assert train(tiny(tmp_path / "run", model={"name": "vit_tinny_patch16_224"})) == 2

    assert "timm knows no such model; like it: vit_tiny_patch16_224" in capsys.readouterr().err


class TestDamagedCheckpoints:
    def run(self, tmp_path, damage):
        config = tiny(tmp_path / "run")
        train(config)
        for path in checkpoints(config.output / "checkpoints")[:damage]:
            file = path / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
        return dataclasses.replace(config, resume="auto")

    def test_the_previous_one_is_taken_and_said_so(self, tmp_path, capsys):
        config = self.run(tmp_path, damage=1)
        lines = metrics(config)
        capsys.readouterr()

        assert train(config) == 0

        assert "passed over a damaged checkpoint" in capsys.readouterr().out
        assert [line["loss"] for line in metrics(config)] == [line["loss"] for line in lines]

    def test_none_intact_is_an_error_not_a_new_start(self, tmp_path, capsys):
        config = self.run(tmp_path, damage=9)

        assert train(config) == 4

        assert "is intact" in capsys.readouterr().err
