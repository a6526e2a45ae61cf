"""One of 64 GPUs on fake tensors, under the real DDP and switch, holds the closed form of ``prelora plan``."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist

from prelora.analysis import plan_command
from prelora.analysis.hardware import Cluster
from prelora.analysis.plan import count_model
from prelora.analysis.planner import Setup, make_plan
from prelora.analysis.simulation import SimulatedPhase, simulate
from prelora.analysis.simulation_table import describe_simulation
from prelora.cli import main
from prelora.config import PreLoRAConfig
from prelora.exits import EXIT_BAD_INPUT
from prelora.targets import find_targets

IMAGE, BATCH, RANK = (3, 32, 32), 16, 16
PHASES = ("full", "warmup", "lora")


def simulated_and_planned(**options):
    """A short ViT-S, whose gradients fill more than one of DDP's buckets."""
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    targets = find_targets(model)
    ranks, config = {target.name: RANK for target in targets}, PreLoRAConfig(**options)
    simulated = simulate(
        model,
        targets,
        ranks,
        config,
        image=IMAGE,
        batch=BATCH,
        precision="bf16",
        gpus=64,
        build_optimizer=lambda plain: torch.optim.AdamW(plain.parameters()),
    )
    counted = count_model(model, targets, torch.empty(1, *IMAGE, device="meta"), freeze=config.freeze)
    setup = Setup(batch=BATCH, cluster=Cluster(gpus=64, per_node=4, intra=300e9, inter=50e9))
    return simulated, make_plan(model, targets, ranks, config, counted, setup, image=IMAGE, timed=False)


@pytest.fixture(scope="module")
def both():
    return simulated_and_planned()


@pytest.mark.parametrize("phase", PHASES)
def test_ddp_reduces_the_planned_bytes_in_as_many_buckets(both, phase):
    simulated, plan = both

    buckets = simulated[phase].buckets
    assert sum(buckets) == plan.phases[phase].reduced
    assert len(buckets) == len(plan.phases[phase].buckets) > 1


@pytest.mark.parametrize("phase", PHASES)
def test_weights_moments_and_gradients_weigh_what_is_planned(both, phase):
    simulated, plan = both
    held, memory = simulated[phase], plan.phases[phase].memory

    assert held.parameters == memory["weights"] + memory["lora"]
    assert held.optimizer == pytest.approx(memory["optimizer"], rel=1e-3)  # Adam counts its steps, too
    assert held.gradients == pytest.approx(memory["gradients"], rel=1e-3)


@pytest.mark.parametrize("phase", PHASES)
def test_forward_leaves_what_was_counted(both, phase):
    simulated, plan = both
    memory = plan.phases[phase].memory

    assert simulated[phase].forward == pytest.approx(memory["w_eff"] + memory["activations"], rel=0.01)


@pytest.mark.parametrize("phase", PHASES)
def test_the_peak_is_the_planned_total(both, phase):
    simulated, plan = both
    memory = plan.phases[phase].memory

    assert simulated[phase].peak == pytest.approx(sum(memory.values()) - memory["snapshot"], rel=0.05)


def test_with_everything_but_b_frozen_less_is_kept_and_sent(both):
    simulated, _ = both
    alone, plan = simulated_and_planned(freeze="all", train_lora_a=False)

    assert alone["lora"].forward < simulated["lora"].forward
    assert sum(alone["lora"].buckets) == plan.phases["lora"].reduced < sum(simulated["lora"].buckets)
    assert alone["full"] == simulated["full"]


def test_the_largest_batch_fills_memory_from_the_simulated_peak():
    phase = SimulatedPhase(1, 1, 1, 40, 7, peak=50, per_image=10, buckets=())

    assert [phase.largest_batch(4, memory) for memory in (50, 79, 80, 9)] == [4, 6, 7, 0]


def test_the_process_is_left_without_a_group(both):
    assert not dist.is_initialized()


def test_a_process_that_is_in_a_group_is_not_taken_out_of_it(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="in a process group already"):
            simulated_and_planned()
    finally:
        dist.destroy_process_group()


def test_the_table_says_what_is_simulated_and_by_how_much_it_differs(both):
    simulated, plan = both

    heading, *rows = describe_simulation(plan, simulated)[1:]

    assert "simulated on fake tensors, rank 0 of 64" in heading
    assert [row.count("%") for row in rows[1:]] == [3] * len(rows[1:])


# The command.


def test_the_command_prints_a_plan_and_its_simulation_as_json(capsys):
    options = "--model test_vit --image-size 32 --batch 2 --rank 8 --simulate --json"

    assert main(["plan", *options.split()]) == 0

    written = json.loads(capsys.readouterr().out)
    for phase in PHASES:
        assert written["phases"][phase]["reduced_bytes"] == sum(written["simulated"][phase]["buckets"])
    assert written["global_batch"] == 128
    assert 0 < written["run"]["seconds"] < written["run"]["baseline"]


def test_a_runs_own_ranks_are_planned(monkeypatch, capsys):
    with torch.device("meta"):
        targets = find_targets(timm.create_model("test_vit"))
    ranks = {target.name: 8 if target.group == "q" else 32 for target in targets}
    monkeypatch.setattr(plan_command, "load_run", lambda path: SimpleNamespace(ranks=ranks))

    assert main(["plan", "--model", "test_vit", "--image-size", "32", "--run", "runs/x"]) == 0

    printed = capsys.readouterr().out
    assert "36 targets, ranks 8 to 32, mean 28.0" in printed
    assert "its ceiling by FLOPs" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("--model test_vit --rank 0", "rank = 0: must be at least 1"),
        ("--model test_vit --run /nowhere", "/nowhere"),
        ("--model test_vit --inter 0", "inter = 0.0: must be finite and above 0"),
        ("--model test_vit --switch-epoch 400", "accepted are 0 to 300"),
    ],
)
def test_a_plan_that_cannot_be_made_says_what_is_accepted(options, said, capsys):
    assert main(["plan", *options.split()]) == EXIT_BAD_INPUT

    assert said in capsys.readouterr().err


def test_a_run_that_has_not_switched_has_no_ranks(monkeypatch, capsys):
    monkeypatch.setattr(plan_command, "load_run", lambda path: SimpleNamespace(ranks={}))

    assert main(["plan", "--model", "test_vit", "--run", "runs/x"]) == EXIT_BAD_INPUT

    assert "has not switched yet" in capsys.readouterr().err
