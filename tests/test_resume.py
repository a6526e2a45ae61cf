"""Interrupted anywhere and resumed, a run equals the uninterrupted one bit for bit (CPU)."""

import dataclasses
import json
import multiprocessing
import subprocess
import sys

import interrupt
import pytest
import torch

from prelora import PreLoRAConfig
from prelora.checkpoint import checkpoints, load_checkpoint
from prelora.train.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig, save_yaml

STOPPED, KILLED = 75, -9
MEASURED = {"seconds", "img_per_s", "peak_memory_bytes"}

# 4 steps an epoch; switch after epoch 2, freeze after epoch 4, 6 epochs: steps 0-7 FULL, 8-15 WARMUP, 16-23 LORA.
CONFIG = TrainConfig(
    epochs=6,
    ema_decay=0.9,
    prelora=PreLoRAConfig(k=2, m=1, tau=1e6, zeta=1e6, warmup_epochs=2, r_min=1, r_max=4, lora_dropout=0.1),
    model=ModelConfig(
        image_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.2, drop_rate=0.1
    ),
    data=DataConfig(batch_size=160, mixup=0.3, cutmix=0.3, label_smoothing=0.1),
    optim=OptimConfig(accumulate=2, clip_grad=1.0, warmup_epochs=1),
    checkpoint=CheckpointConfig(every_steps=3),
)


# Children are forked from a server that has torch, timm and the trainer loaded: real processes at a second each.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["interrupt", "timm", "prelora.train.__main__", "sklearn.datasets"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same number of threads in every run: sums round by it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def prepare(config, output):
    output.parent.mkdir(parents=True, exist_ok=True)
    save_yaml(dataclasses.replace(config, output=output, resume="auto"), output.with_suffix(".yaml"))
    return ["--config", str(output.with_suffix(".yaml"))]


def run(config, output, *interruption):
    """Train in a process of its own; returns the exit code, negative for the signal that killed it."""
    log = output.with_suffix(".log")
    child = FORKSERVER.Process(target=interrupt.train, args=(interruption, prepare(config, output), str(log)))
    child.start()
    child.join(timeout=120)
    print(log.read_text())  # pytest shows it with a failure
    assert child.exitcode is not None, "the run hangs"
    return child.exitcode


def torchrun(config, output, *interruption, options=()):
    """Train on two gloo ranks; returns torchrun's exit code."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *options]
    command = [*launch, interrupt.__file__, *map(str, interruption), "train", *prepare(config, output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    print(done.stdout, done.stderr)
    return done.returncode


def outcome(output):
    """Everything a run leaves that is not a measurement: every tensor of the last checkpoint, and the metrics."""
    tree = load_checkpoint(checkpoints(output / "checkpoints")[0])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
    return {"metrics": metrics, **{key: tree[key] for key in ("model", "ema", "optimizer", "phase", "step", "monitor")}}


def assert_equal(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}/{index}")
    else:
        assert one == other or (one != one and other != other), where


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(CONFIG, output) == 0
    return outcome(output)


def test_the_reference_run_takes_all_three_phases(uninterrupted):
    phases = [line["phase"] for line in uninterrupted["metrics"]]

    assert phases == ["full", "full", "warmup", "warmup", "lora", "lora"]


# Each chain is one run, interrupted again and again: by this signal, at the n-th call (counted in that process).
CHAINS = {
    "sigterm within FULL, WARMUP and LORA": [("SIGTERM", "step", 2), ("SIGTERM", "step", 7), ("SIGTERM", "step", 10)],
    "kill within FULL, WARMUP and LORA": [("SIGKILL", "step", 5), ("SIGKILL", "step", 8), ("SIGKILL", "step", 11)],
    "sigterm at the switch and the freeze": [("SIGTERM", "surgery", 1), ("SIGTERM", "rebuild", 2)],
    "kill at the switch and the freeze": [
        ("SIGKILL", "surgery", 1),
        ("SIGKILL", "rebuild", 1),
        ("SIGKILL", "rewrap", 1),
        ("SIGKILL", "surgery", 2),
        ("SIGKILL", "rebuild", 2),
    ],
    "at epoch boundaries": [("SIGTERM", "epoch_end", 1), ("SIGKILL", "epoch_end", 2), ("SIGINT", "epoch_end", 3)],
    # Logits are called once a micro-batch and once an evaluation batch, so this counts both.
    "within the evaluation": [("SIGTERM", "evaluation", 2), ("SIGKILL", "evaluation", 6), ("SIGINT", "evaluation", 9)],
    "between the record and its checkpoint": [
        ("SIGKILL", "record", 1),
        ("SIGTERM", "record", 2),
        ("SIGKILL", "record", 3),
    ],
    "in the middle of writing a checkpoint": [
        ("SIGKILL", "tensors", 2),
        ("SIGKILL", "manifest", 3),
        ("SIGKILL", "tensors", 12),
        ("SIGKILL", "prune", 3),
        ("SIGTERM", "tensors", 2),
    ],
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(chain, uninterrupted, tmp_path):
    output = tmp_path / "run"
    for interruption in chain:
        expected = KILLED if interruption[0] == "SIGKILL" else STOPPED
        assert run(CONFIG, output, *interruption) == expected, interruption

    assert run(CONFIG, output) == 0

    assert_equal(outcome(output), uninterrupted)


@pytest.fixture(scope="module")
def uninterrupted_ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("ranks") / "run"
    assert torchrun(TWO_RANKS, output) == 0
    return outcome(output)


TWO_RANKS = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, batch_size=80))


def test_two_ranks_stopped_in_warmup_by_a_signal_to_one_go_on_bit_for_bit(uninterrupted_ranks, tmp_path):
    output = tmp_path / "run"
    assert torchrun(TWO_RANKS, output, "SIGTERM", "step", 10) != 0
    assert load_checkpoint(checkpoints(output / "checkpoints")[0])["phase"] == "warmup"

    assert torchrun(TWO_RANKS, output) == 0

    assert_equal(outcome(output), uninterrupted_ranks)


def test_torchrun_restarts_a_killed_worker_where_it_stood(uninterrupted_ranks, tmp_path):
    output = tmp_path / "run"

    # The restarted worker counts anew and is past the twentieth step before it gets there again.
    assert torchrun(TWO_RANKS, output, "SIGKILL", "step", 18, options=["--max-restarts=1"]) == 0

    assert_equal(outcome(output), uninterrupted_ranks)
