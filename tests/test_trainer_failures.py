"""What the trainer refuses, survives and says: bad input, losses that are not finite, disks, damage, other configs."""

import errno
import json
import math

import pytest
import torch
from tiny_runs import (
    PHASES,
    STEPS,
    TINY,
    copied,
    damage,
    drop_newest,
    finished,
    metrics,
    names,
    newest,
    outcome,
    tiny,
    train,
)

from prelora import CheckpointError, checkpoint
from prelora.checkpoint import checkpoints, verify_checkpoint
from prelora.train import loop, run_dir
from prelora.train.__main__ import EXIT_BAD_INPUT, EXIT_CHECKPOINT, EXIT_NOT_FINITE
from prelora.train.config import load_yaml, to_dict
from prelora.train.resume import check_resumable

FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run; copy it before you harm it."""
    return finished(tmp_path_factory.mktemp("run") / "run")


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A config whose parts do not fit each other or this machine.

UNFIT = {
    "a model that is no ViT": ({"model": {"name": "resnet18"}}, "model.name = 'resnet18': timm cannot build it"),
    "a model that timm does not know": ({"model": {"name": "vit_tny"}}, "model.name = 'vit_tny': timm knows no such"),
    "heads that do not divide the width": ({"model": {"num_heads": 5}}, "timm cannot build it with image_size = 8"),
    "patches that do not cover the image": (
        {"model": {"image_size": 24, "patch_size": 16}},
        "model.image_size = 24: must be a multiple of the patch size 16",
    ),
    "a transformers ViT with heads that do not divide the width": (
        {"model": {"library": "transformers", "num_heads": 5}},
        "model.embed_dim = 32: must be a multiple of model.num_heads = 5",
    ),
    "a transformers ViT with patches that do not cover the image": (
        {"model": {"library": "transformers", "patch_size": 5}},
        "model.image_size = 8: must be a multiple of the patch size 5",
    ),
    "drop path in a transformers ViT": (
        {"model": {"library": "transformers", "drop_path_rate": 0.1}},
        "model.drop_path_rate = 0.1: transformers' ViT has none",
    ),
    "an image that the digits do not fill": ({"model": {"image_size": 12}}, "image_size = 12: the digits are 8×8"),
    "an optimizer that timm does not know": ({"optim": {"name": "adamz"}}, "adamz"),
    "an optimizer that cannot be rebuilt": ({"optim": {"name": "lookahead_adamw"}}, "Lookahead"),
    "a batch that is larger than the data": (
        {"data": {"batch_size": 1000}, "optim": {"accumulate": 2}},
        "the global batch of 2000 is larger than the 1437 images",
    ),
    "a path for the digits": ({"data": {"path": "here"}}, "data 'digits' takes no path, got here"),
    "images without a path": ({"data": {"name": "images"}}, "data 'images' needs a path"),
}


@pytest.mark.parametrize(("changes", "complaint"), UNFIT.values(), ids=UNFIT)
def test_a_config_that_does_not_fit_exits_with_2_naming_the_value(changes, complaint, tmp_path, capsys):
    assert train(tiny(tmp_path / "run", **changes)) == EXIT_BAD_INPUT

    error = capsys.readouterr().err
    assert error.startswith("prelora: error: ")
    assert complaint in error
    assert len(error.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_exits_with_2(tmp_path, capsys):
    assert train(tiny(tmp_path / "run", device="cuda")) == EXIT_BAD_INPUT

    assert "device = cuda: torch sees no CUDA device; accepted here is cpu" in capsys.readouterr().err


def test_a_refused_start_does_not_take_the_folder(tmp_path):
    assert train(tiny(tmp_path / "run", model={"num_heads": 5})) == EXIT_BAD_INPUT

    assert train(tiny(tmp_path / "run", epochs=1, optim={"warmup_epochs": 0})) == 0


# The run's folder.


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(run, capsys):
    before = files(run)

    assert train(tiny(run)) == EXIT_BAD_INPUT

    assert f"output = {run} already holds a run: give another, or --resume auto" in capsys.readouterr().err
    assert files(run) == before


def test_a_folder_below_a_file_exits_with_2_naming_it(tmp_path, capsys):
    (tmp_path / "file").touch()

    assert train(tiny(tmp_path / "file" / "run")) == EXIT_BAD_INPUT

    assert str(tmp_path / "file" / "run") in capsys.readouterr().err


def test_a_read_only_folder_exits_with_2_naming_it(tmp_path, capsys, monkeypatch):
    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(run_dir.Path, "mkdir", read_only)

    assert train(tiny(tmp_path / "run")) == EXIT_BAD_INPUT

    error = capsys.readouterr().err
    assert "Read-only file system" in error
    assert str(tmp_path / "run") in error


# A loss that is not finite.


def spoil(monkeypatch, epoch, step, value=math.nan):
    """The loss of this step (both from 1) is ``value`` times itself."""
    calls, loss = [], loop.Trainer._loss

    def spoilt(trainer, *batch):
        calls.append(batch)
        return loss(trainer, *batch) * (value if len(calls) == (epoch - 1) * STEPS + step else 1)

    monkeypatch.setattr(loop.Trainer, "_loss", spoilt)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("epoch", "step"), [(2, 3), (3, 1), (6, STEPS)])
def test_a_loss_that_is_not_finite_stops_the_run_with_3_saying_where(
    value, epoch, step, run, tmp_path, capsys, monkeypatch
):
    spoil(monkeypatch, epoch, step, value)

    assert train(tiny(tmp_path / "run")) == EXIT_NOT_FINITE

    error = capsys.readouterr().err
    assert f"not finite in epoch {epoch}, step {step}" in error
    assert "--on-nan skip" in error
    assert outcome(tmp_path / "run") == outcome(run)[: epoch - 1]
    assert names(tmp_path / "run")[0] == f"step-{STEPS * (epoch - 1):09d}"


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    """A run whose third step of epoch 2, at which it would switch, had a loss of NaN and was left out."""
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 2, 3)
        return finished(tmp_path_factory.mktemp("skipped") / "run", on_nan="skip")


def test_a_skipped_step_is_counted_and_its_epochs_loss_is_null(skipped):
    lines = metrics(skipped)

    assert [line["skipped_steps"] for line in lines] == [0, 1, 0, 0, 0, 0]
    assert [line["epoch"] for line in lines if line["loss"] is None] == [2]
    assert "NaN" not in (skipped / "metrics.jsonl").read_text()


def test_the_test_does_not_pass_a_window_whose_loss_was_not_finite(skipped):
    lines = metrics(skipped)

    # Windows of one epoch, compared in pairs: 1|2 and 2|3 hold the NaN, 3|4 is the first without it.
    assert [line["phase"] for line in lines] == ["full", "full", "full", "full", "warmup", "warmup"]
    for line in lines[1:3]:
        assert line["event"]["loss_changes"] == [None]
        assert "loss: change between windows 1 and 2 of 2 is undefined" in line["event"]["reason"]


def test_a_skipped_step_updates_nothing_and_the_run_goes_on(skipped, run):
    assert newest(skipped)["step"] == newest(run)["step"] - 1 == 6 * STEPS - 1
    assert all(bool(tensor.isfinite().all()) for tensor in newest(skipped)["model"].values())
    assert metrics(skipped)[5]["loss"] < metrics(skipped)[0]["loss"]


# A disk that is full.


def test_a_disk_full_while_a_checkpoint_is_written_exits_with_4_and_the_last_one_stands(
    run, tmp_path, capsys, monkeypatch
):
    save = checkpoint.save_file

    def full_from_the_third_epoch(tensors, path, *rest, **options):
        if f"step-{3 * STEPS:09d}" in str(path):
            raise FULL_DISK
        save(tensors, path, *rest, **options)

    monkeypatch.setattr(checkpoint, "save_file", full_from_the_third_epoch)
    assert train(tiny(tmp_path / "run")) == EXIT_CHECKPOINT

    error = capsys.readouterr().err
    assert f"step-{3 * STEPS:09d}" in error
    assert "No space left on device" in error
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == set(names(tmp_path / "run"))
    assert verify_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[0]).about["step"] == 2 * STEPS

    monkeypatch.undo()
    assert train(tiny(tmp_path / "run", resume="auto")) == 0
    assert outcome(tmp_path / "run") == outcome(run)


@pytest.mark.parametrize("write", ["write", "__init__"])
def test_a_disk_full_while_the_metrics_are_written_exits_with_4(write, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise FULL_DISK

    monkeypatch.setattr(run_dir.MetricsLog, write, full)

    assert train(tiny(tmp_path / "run")) == EXIT_CHECKPOINT

    assert "No space left on device" in capsys.readouterr().err


# Resuming with something else, or from damage.


def test_a_setting_that_is_younger_than_the_checkpoint_was_at_its_default():
    saved = {"config": to_dict(TINY), "world_size": 1}
    del saved["config"]["prelora"]["switch"], saved["config"]["optim"]["cooldown_epochs"]

    check_resumable(saved, to_dict(TINY))

    with pytest.raises(CheckpointError, match=r"prelora\.switch = together, the config says per_group"):
        check_resumable(saved, to_dict(tiny(TINY.output, prelora={"switch": "per_group"})))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"optim": {"lr": 0.5}}, "optim.lr = 0.001, the config says 0.5"),
        ({"model": {"depth": 3}}, "model.depth = 2, the config says 3"),
        ({"prelora": {"tau": 2.0}}, "prelora.tau = 10000.0, the config says 2.0"),
        ({"ema_decay": 0.9}, "ema_decay = None, the config says 0.9"),
        ({"epochs": 9}, "epochs = 6, the config says 9"),
        ({"seed": 1}, "seed = 0, the config says 1"),
        ({"method": "full"}, "method = prelora, the config says full"),
    ],
    ids=str,
)
def test_another_config_is_refused_naming_the_field_and_the_run_stays_as_it_is(changes, complaint, run, capsys):
    before = files(run)

    assert train(tiny(run, resume="auto", **changes)) == EXIT_CHECKPOINT

    assert f"the checkpoint was written with {complaint}: resume with the same" in capsys.readouterr().err
    assert files(run) == before


def test_another_global_batch_is_refused_with_the_reason(run, capsys):
    before = files(run)

    assert train(tiny(run, resume="auto", data={"batch_size": 80})) == EXIT_CHECKPOINT

    error = capsys.readouterr().err
    assert "a global batch of 160 = 160 images × 1 accumulated × 1 rank(s), this run's is 80 = 80 images" in error
    assert files(run) == before


def test_the_same_global_batch_may_be_split_in_another_way_on_resume(run, tmp_path):
    output = copied(run, tmp_path / "run")
    drop_newest(output)

    assert train(tiny(output, resume="auto", data={"batch_size": 80}, optim={"accumulate": 2})) == 0

    again, whole = metrics(output)[-1], metrics(run)[-1]
    assert again["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert again["images"] == whole["images"]


def test_how_checkpoints_are_kept_may_change_on_resume(run, tmp_path):
    moved = copied(run, tmp_path / "moved")
    drop_newest(moved)

    assert train(tiny(moved, resume="auto", checkpoint={"keep_last": 1, "every_steps": 4})) == 0

    assert outcome(moved) == outcome(run)
    assert load_yaml(moved / run_dir.CONFIG).checkpoint.every_steps == 4


def test_a_finished_run_resumed_is_finished(run, tmp_path):
    again = copied(run, tmp_path / "again")

    assert train(tiny(again, resume="auto")) == 0

    assert metrics(again) == metrics(run)


def test_resuming_where_nothing_is_starts_anew(run, tmp_path):
    assert train(tiny(tmp_path / "run", resume="auto")) == 0

    assert outcome(tmp_path / "run") == outcome(run)


def test_a_damaged_latest_gives_way_to_the_one_before_and_says_so(run, tmp_path, capsys):
    damaged = copied(run, tmp_path / "damaged")
    latest, before = checkpoints(damaged / "checkpoints")[:2]
    damage(latest)

    assert train(tiny(damaged, resume="auto")) == 0

    said = capsys.readouterr().out
    assert f"passed over a damaged checkpoint: checkpoint {latest} is damaged: model.safetensors" in said
    assert f"resume: going on from {before} (epoch 5, step 0, phase lora)" in said
    assert outcome(damaged) == outcome(run)
    assert verify_checkpoint(latest).about["step"] == 6 * STEPS


def test_where_every_checkpoint_is_damaged_it_exits_with_4_and_touches_nothing(run, tmp_path, capsys):
    damaged = copied(run, tmp_path / "damaged")
    for path in checkpoints(damaged / "checkpoints"):
        damage(path)
    before = files(damaged)

    assert train(tiny(damaged, resume="auto")) == EXIT_CHECKPOINT

    shown = capsys.readouterr()
    assert shown.out.count("passed over a damaged checkpoint") == len(names(damaged))
    assert f"no checkpoint under {damaged / 'checkpoints'} is intact" in shown.err
    assert files(damaged) == before


def test_metrics_of_a_future_that_a_resume_gave_up_are_gone(run, tmp_path):
    resumed = copied(run, tmp_path / "run")
    with (resumed / run_dir.METRICS).open("a") as file:
        file.write(json.dumps(metrics(run)[5] | {"epoch": 7}) + "\n" + '{"epoch": 8, "cut o')
    drop_newest(resumed)

    assert train(tiny(resumed, resume="auto")) == 0

    assert outcome(resumed) == outcome(run)
    assert [line["phase"] for line in metrics(resumed)] == PHASES
