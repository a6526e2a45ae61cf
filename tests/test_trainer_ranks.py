"""The trainer on several gloo ranks: real images, sharding, another number of ranks, faults."""

import dataclasses
import re
import subprocess
import time

import pytest
from clipart import make_clipart, needs_clipart
from launching import ENVIRONMENT, assert_equal, launch, left, outcome, prepare, run, run_ranks, torchrun
from tiny_runs import PHASES, finished, metrics, tiny, train

from prelora.exits import EXIT_CHECKPOINT, EXIT_DATA

STOPPED = 75
# 3 steps an epoch on 2 ranks: steps 1-6 FULL, 7-12 WARMUP, 13-18 LORA.
IMAGES = {
    "model": {"image_size": 32, "patch_size": 8, "drop_path_rate": 0.1},
    "data": {"name": "images", "batch_size": 8, "rand_augment": (2, 15.0), "mixup": 0.5, "workers": 1},
    "checkpoint": {"every_steps": 2},
}


@pytest.fixture(scope="module")
def clipart(tmp_path_factory):
    return make_clipart(tmp_path_factory.mktemp("clipart") / "jpegs", train=12)


def on_images(output, path, **data):
    return tiny(output, **IMAGES | {"data": IMAGES["data"] | {"path": path, **data}})


def harm(file):
    """Cut a JPEG off in its middle."""
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 3])
    return file


@needs_clipart
def test_real_images_go_through_all_phases_on_two_ranks_killed_and_resumed_bit_for_bit(clipart, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is an extra: pip install 'prelora[dali-cu13]'")
    config = on_images(tmp_path / "whole", clipart, loader="dali")
    assert run_ranks(config, tmp_path / "whole", ranks=2) == [0, 0]

    # In the middle of an epoch; the restarted process counts anew and does not come to another twelfth step.
    kill = ("SIGKILL", "step", 12)
    assert torchrun(config, tmp_path / "run", *kill, ranks=2, options=["--max-restarts=1"]) == 0

    assert "(epoch 3, step 2, phase warmup)" in (tmp_path / "run.log").read_text()
    assert [line["phase"] for line in metrics(tmp_path / "run")] == PHASES
    assert_equal(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


# Files that cannot be read.


@needs_clipart
@pytest.mark.parametrize("loader", ["dali", "plain"])
def test_a_corrupt_file_in_training_and_one_in_evaluation_are_named_and_counted(loader, tmp_path, capsys):
    pytest.importorskip("nvidia.dali", reason="DALI is an extra: pip install 'prelora[dali-cu13]'")
    path = make_clipart(tmp_path / "jpegs", classes=("animals", "food"), train=16, val=6)
    harmed = [harm(path / "train" / "food" / "0003.jpg"), harm(path / "val" / "animals" / "0001.jpg")]

    assert train(on_images(tmp_path / "run", path, loader=loader, batch_size=16)) == 0

    last = metrics(tmp_path / "run")[-1]
    assert len(last["quarantined"]) == 2
    assert all(any(str(file.relative_to(path)) in name for name in last["quarantined"]) for file in harmed)
    assert last["images"] == 32
    assert last["eval"]["images"] == 11
    assert "2 files cannot be used" in capsys.readouterr().out


@needs_clipart
def test_when_one_ranks_loader_gives_up_the_whole_job_ends_naming_rank_and_file(tmp_path):
    path = make_clipart(tmp_path / "jpegs", classes=("animals", "food"), train=16, val=2)
    harm(path / "train" / "food" / "0003.jpg")
    config = on_images(tmp_path / "run", path, max_quarantined=0)
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [*launch(2), "-m", "prelora.train", *prepare(config, tmp_path / "run")],
            stdout=log,
            stderr=log,
            env=ENVIRONMENT,
        )

    def told():
        found = re.search(r"prelora: error: rank (\d): .*food/0003\.jpg", (tmp_path / "log").read_text())
        return found and found[1]

    while job.poll() is None and not told():
        time.sleep(0.05)
    said = time.monotonic()
    job.wait(timeout=60)

    assert time.monotonic() - said < 10
    assert job.returncode != 0
    log = (tmp_path / "log").read_text()
    assert re.search(rf"rank +: {told()} .*\n +exitcode +: {EXIT_DATA} ", log), log


# Sharded, and with another number of ranks.

DIGITS = {"data": {"batch_size": 80}, "checkpoint": {"every_steps": 3}, "ema_decay": 0.9}


def split(config, **changes):
    """The same global batch in another way."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_a_sharded_run_stopped_in_the_warm_up_goes_on_on_one_rank_and_learns_what_one_process_does(tmp_path):
    config = tiny(tmp_path / "run", **DIGITS, distributed={"strategy": "fsdp"})
    alone = finished(tmp_path / "alone", **DIGITS | {"data": {"batch_size": 160}})

    # Not held to be 75: torch caches DTensors' meshes for good, and with them gloo's threads, which are reported as 1.
    assert 0 not in run_ranks(config, tmp_path / "run", "SIGTERM", "step", 20, ranks=2)
    assert left(tmp_path / "run") == "21 warmup"
    assert run(split(config, batch_size=160), tmp_path / "run") == 0

    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(alone), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["ema_eval"]["loss"] == pytest.approx(theirs["ema_eval"]["loss"], rel=1e-4)
        assert mine["event"]["ranks"] == theirs["event"]["ranks"]
    full, *_, lora = metrics(tmp_path / "run")
    # Blocks are gathered twice, the root's own parameters once; all in fp32.
    assert full["communication"]["reduce_scatter"] == 4 * full["trainable"]
    assert 4 * full["trainable"] < full["communication"]["all_gather"] < 8 * full["trainable"]
    assert lora["communication"] == {}


def test_another_number_of_ranks_without_the_same_global_batch_is_refused_with_the_reason(tmp_path):
    config = tiny(tmp_path / "run", **DIGITS)
    assert run(split(config, batch_size=160), tmp_path / "run", "SIGTERM", "step", 2) == STOPPED

    assert run_ranks(config, tmp_path / "run", "SIGTERM", "step", 2, ranks=2) == [STOPPED] * 2
    assert left(tmp_path / "run") == "6 full"
    assert run(config, tmp_path / "run") == EXIT_CHECKPOINT

    assert "this run's is 80 = 80 images × 1 accumulated × 1 rank(s)" in (tmp_path / "run.log").read_text()


def test_gradients_in_bf16_send_half_the_bytes_through_every_phase(tmp_path):
    config = tiny(tmp_path / "run", data={"batch_size": 80}, distributed={"compress": "bf16"})

    assert run_ranks(config, tmp_path / "run", ranks=2) == [0, 0]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1  # rank 0's alone

    full, *_, lora = metrics(tmp_path / "run")
    assert full["communication"] == {"all_reduce": 2 * full["trainable"]}
    assert lora["communication"] == {"all_reduce": 2 * lora["trainable"]}
