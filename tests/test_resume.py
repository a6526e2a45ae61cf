"""Interrupted anywhere and resumed, a run equals the uninterrupted one bit for bit (CPU)."""

import dataclasses
import os

import pytest
from launching import assert_equal, left, outcome, run, run_ranks, torchrun

from prelora import PreLoRAConfig
from prelora.checkpoint import newest_valid
from prelora.train.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig

STOPPED, KILLED = 75, -9

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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same number of threads in every run: sums round by it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(CONFIG, output) == 0
    return outcome(output)


def test_the_reference_run_takes_all_three_phases(uninterrupted):
    phases = [line["phase"] for line in uninterrupted["metrics"]]

    assert phases == ["full", "full", "warmup", "warmup", "lora", "lora"]


# Each chain is one run, interrupted again and again: by this signal, at the n-th call (counted in that process); last
# stands the checkpoint that it leaves to go on from.
CHAINS = {
    "sigterm within FULL, WARMUP and LORA": [
        ("SIGTERM", "step", 2, "3 full"),
        ("SIGTERM", "step", 7, "11 warmup"),
        ("SIGTERM", "step", 10, "22 lora"),
    ],
    "kill within FULL, WARMUP and LORA": [
        ("SIGKILL", "step", 5, "4 full"),
        ("SIGKILL", "step", 8, "11 warmup"),
        ("SIGKILL", "step", 11, "20 lora"),
    ],
    "sigterm at the switch and the freeze": [
        ("SIGTERM", "surgery", 1, "8-evaluating warmup"),
        ("SIGTERM", "rebuild", 2, "16-evaluating lora"),
    ],
    "kill at the switch, the freeze and in resuming": [
        ("SIGKILL", "surgery", 1, "7 full"),
        ("SIGKILL", "rebuild", 1, "7 full"),
        ("SIGKILL", "rewrap", 1, "7 full"),
        ("SIGKILL", "surgery", 2, "15 warmup"),
        ("SIGKILL", "rebuild", 2, "15 warmup"),
        ("SIGKILL", "surgery", 1, "15 warmup"),
    ],
    "at epoch boundaries": [
        ("SIGTERM", "epoch_end", 1, "4-evaluating full"),
        ("SIGKILL", "epoch_end", 2, "11 warmup"),
        ("SIGINT", "epoch_end", 3, "20-evaluating lora"),
    ],
    # Logits are called once an evaluation batch: 3 for the weights, 3 for their average.
    "within the evaluation": [
        ("SIGTERM", "evaluation", 2, "4-evaluating full"),
        ("SIGKILL", "evaluation", 6, "4-evaluating full"),
        ("SIGINT", "evaluation", 9, "8-evaluating warmup"),
    ],
    "before a record, and between it and its checkpoint": [
        ("SIGKILL", "record", 1, "3 full"),
        ("SIGKILL", "checkpoint", 1, "3 full"),
        ("SIGTERM", "record", 2, "8 warmup"),
        ("SIGKILL", "record", 3, "19 lora"),
    ],
    "in the middle of writing or removing a checkpoint": [
        ("SIGKILL", "tensors", 2, "nothing"),
        ("SIGKILL", "manifest", 3, "nothing"),
        ("SIGKILL", "tensors", 12, "7 full"),
        ("SIGKILL", "removal", 4, "11 warmup"),
        ("SIGKILL", "prune", 2, "15 warmup"),
        ("SIGTERM", "tensors", 2, "16 lora"),
    ],
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(chain, uninterrupted, tmp_path):
    output = tmp_path / "run"
    for *interruption, expected in chain:
        code = run(CONFIG, output, *interruption)
        assert (code, left(output)) == (KILLED if interruption[0] == "SIGKILL" else STOPPED, expected), interruption

    assert run(CONFIG, output) == 0

    assert_equal(outcome(output), uninterrupted)


def test_so_it_does_without_accumulation(tmp_path):
    whole = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, accumulate=1))
    run(whole, tmp_path / "uninterrupted")

    for interruption in [("SIGTERM", "step", 3), ("SIGKILL", "rebuild", 1), ("SIGTERM", "step", 20)]:
        assert run(whole, tmp_path / "run", *interruption) != 0
    assert run(whole, tmp_path / "run") == 0

    assert_equal(outcome(tmp_path / "run"), outcome(tmp_path / "uninterrupted"))


def test_a_second_sigterm_does_not_keep_it_from_writing_its_checkpoint(tmp_path):
    # Slurm signals every process, and torchrun hands its own on.
    assert run(CONFIG, tmp_path / "run", "SIGTERM+SIGTERM", "step", 5) == STOPPED

    assert left(tmp_path / "run") == "6 full"


def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    assert run(CONFIG, tmp_path / "run", "SIGINT+SIGINT", "step", 6) not in (0, STOPPED)

    assert left(tmp_path / "run") == "4 full"


def test_past_a_damaged_checkpoint_it_goes_on_from_the_one_before_and_stops_and_goes_on_again(uninterrupted, tmp_path):
    output = tmp_path / "run"
    run(CONFIG, output, "SIGTERM", "step", 10)
    damaged = newest_valid(output / "checkpoints")[0]
    os.truncate(damaged / "model.safetensors", 1000)

    assert run(CONFIG, output, "SIGTERM", "step", 1) == STOPPED  # while the damaged one would still be the newest

    assert left(output) == "10 warmup"
    assert f"passed over a damaged checkpoint: checkpoint {damaged}" in output.with_suffix(".log").read_text()
    assert damaged.with_name(f"{damaged.name}.damaged").is_dir()
    assert run(CONFIG, output) == 0
    assert_equal(outcome(output), uninterrupted)


def test_a_refused_resume_leaves_the_runs_own_config(tmp_path):
    output = tmp_path / "run"
    run(CONFIG, output, "SIGTERM", "step", 2)
    before = (output / "config.yaml").read_text()

    assert run(dataclasses.replace(CONFIG, seed=1), output) == 4

    assert (output / "config.yaml").read_text() == before


# Three ranks: with two, a sum cannot depend on its order.
RANKS = 3
ON_RANKS = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, batch_size=50))


@pytest.fixture(scope="module")
def uninterrupted_ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("ranks") / "run"
    assert run_ranks(ON_RANKS, output, ranks=RANKS) == [0] * RANKS
    return outcome(output)


def test_ranks_stopped_through_one_of_them_or_through_torchrun_go_on_bit_for_bit(uninterrupted_ranks, tmp_path):
    output = tmp_path / "run"

    assert run_ranks(ON_RANKS, output, "SIGTERM", "step", 10, ranks=RANKS) == [STOPPED] * RANKS
    assert left(output) == "11 warmup"
    assert torchrun(ON_RANKS, output, "SIGTERM+torchrun:SIGTERM", "step", 8, ranks=RANKS) != 0
    assert left(output) == "20-evaluating lora"
    assert run_ranks(ON_RANKS, output, ranks=RANKS) == [0] * RANKS

    assert_equal(outcome(output), uninterrupted_ranks)


def test_torchrun_restarts_a_killed_worker_where_it_stood(uninterrupted_ranks, tmp_path):
    output = tmp_path / "run"

    # The restarted worker counts anew: 16 steps are done, and it will not come to another eighteenth.
    assert torchrun(ON_RANKS, output, "SIGKILL", "step", 18, options=["--max-restarts=1"], ranks=RANKS) == 0

    assert_equal(outcome(output), uninterrupted_ranks)
