"""Predicted times: collectives, what backward hides of them, operators on a roofline, whole runs."""

import dataclasses

import pytest
import timm
import torch

from prelora.analysis.hardware import GPUS, Cluster
from prelora.analysis.network import (
    BUCKET,
    FIRST_BUCKET,
    all_reduce_seconds,
    bucket_bytes,
    exposed_seconds,
    gather_seconds,
)
from prelora.analysis.phases import phase_models
from prelora.analysis.plan import count_model
from prelora.analysis.planner import Setup, make_plan
from prelora.analysis.roofline import Reach, count_step, seconds
from prelora.analysis.run_time import Schedule, run_time
from prelora.config import PreLoRAConfig
from prelora.targets import find_targets

MIB = 2**20
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 10}
IMAGE = (3, 32, 32)


def cluster(gpus=8, **options):
    return Cluster(
        **{"gpus": gpus, "per_node": 4, "intra": 100e9, "inter": 10e9, "efficiency": 0.5, "latency": 1e-4} | options
    )


# The network.


def test_buckets_close_at_one_mebibyte_and_then_at_twenty_five():
    sizes = [FIRST_BUCKET // 2, FIRST_BUCKET // 2, BUCKET - 1, 1, BUCKET + 7, 3]

    assert bucket_bytes(sizes) == [FIRST_BUCKET, BUCKET, BUCKET + 7, 3]


def test_nothing_to_reduce_is_no_bucket():
    assert bucket_bytes([]) == []


def test_a_ring_sends_every_byte_twice_over_the_narrowest_link():
    assert all_reduce_seconds(1e9, cluster()) == pytest.approx(1e-4 + 2 * 7 / 8 * 1e9 / 5e9)
    assert all_reduce_seconds(1e9, cluster(gpus=4)) == pytest.approx(1e-4 + 2 * 3 / 4 * 1e9 / 50e9)


def test_a_gather_sends_it_once():
    assert gather_seconds(1e9, cluster()) == pytest.approx(1e-4 + 7 / 8 * 1e9 / 5e9)


def test_one_gpu_sends_nothing():
    assert (all_reduce_seconds(1e9, cluster(gpus=1)), gather_seconds(1e9, cluster(gpus=1))) == (0, 0)


@pytest.mark.parametrize(
    ("collectives", "computing", "exposed"),
    [
        ([1.0, 1.0], 10.0, 1.0),  # the last begins when backward ends
        ([10.0, 10.0], 10.0, 15.0),  # the network is the bottleneck from the first on
        ([3.0], 0.0, 3.0),
        ([], 10.0, 0.0),
    ],
)
def test_backward_hides_what_runs_beside_it(collectives, computing, exposed):
    assert exposed_seconds(collectives, computing) == pytest.approx(exposed)


@pytest.mark.parametrize("wrong", [{"gpus": 0}, {"inter": -1.0}, {"efficiency": float("nan")}])
def test_a_cluster_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="must be finite and above 0"):
        cluster(**wrong)


# Operators.


def test_an_operator_takes_the_longer_of_its_flops_and_its_bytes():
    gpu, reach = GPUS["A100-40GB"], Reach(compute=0.5, memory=0.25)
    flops, moved = 10**12, 10**9

    assert seconds([(flops, 0), (0, moved)], gpu, "bf16", reach) == pytest.approx(1 / 156 + 1 / 388.75)
    assert seconds([(flops, moved)], gpu, "bf16", reach) == pytest.approx(1 / 156)


@pytest.fixture(scope="module")
def tiny():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", **TINY)
    targets = find_targets(model)
    return model, targets, {target.name: 8 for target in targets}


def test_a_steps_flops_are_the_plans_with_merging_and_attentions_second_look_at_its_scores(tiny):
    model, targets, ranks = tiny
    counted = count_model(model, targets, torch.empty(1, *IMAGE, device="meta")).phases(ranks).as_dict()
    images, tokens, width, rank = 5, 17, 48, 8
    scores, merging = 2 * tokens * tokens * width, 2 * rank * 12 * width * width

    for name, phase in phase_models(model, targets, ranks, PreLoRAConfig()).items():
        work = count_step(phase, IMAGE, images, "fp32", 8.0, clips=False)
        done = sum(flops for flops, _ in [*work.forward, *work.backward])
        assert done == images * (counted[name] + scores) + (merging if name != "full" else 0)


def test_the_optimizer_reads_and_writes_what_trains(tiny):
    model, targets, ranks = tiny
    phase = phase_models(model, targets, ranks, PreLoRAConfig())["lora"]

    plain, clipped = (count_step(phase, IMAGE, 2, "fp32", 8.0, clips=clips).update for clips in (False, True))
    assert plain == [(0, 28 * phase.trainable)]  # w, m and v both ways, the gradient once
    assert clipped == [(0, 40 * phase.trainable)]


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_of_a_peak_is_one(share):
    with pytest.raises(ValueError, match=r"accepted in \(0, 1\]"):
        Reach(compute=share)


# Whole plans.


def plan_of(tiny, timed=False, **options):
    model, targets, ranks = tiny
    counted = count_model(model, targets, torch.empty(1, *IMAGE, device="meta"))
    setup = Setup(**{"batch": 8, "cluster": cluster()} | options)
    return make_plan(model, targets, ranks, PreLoRAConfig(), counted, setup, image=IMAGE, timed=timed)


@pytest.fixture(scope="module")
def plan(tiny):
    return plan_of(tiny, timed=True)


def test_a_run_is_its_epochs_and_its_ceiling_below_that_of_its_last_phase(plan):
    step = {name: phase.time.total for name, phase in plan.phases.items()}

    run = run_time(plan, Schedule(epochs=10, switch=4, warmup=2, images=640))

    assert run.steps_per_epoch == 10
    assert run.seconds == pytest.approx(10 * (4 * step["full"] + 2 * step["warmup"] + 4 * step["lora"]))
    assert run.baseline == pytest.approx(100 * step["full"])
    assert 1 < run.ceiling < plan.phases["full"].flops / plan.phases["lora"].flops


def test_a_switch_near_the_end_has_only_what_is_left():
    assert Schedule(epochs=10, switch=8, warmup=5).in_phase == {"full": 8, "warmup": 2, "lora": 0}


def test_a_switch_after_the_end_is_refused():
    with pytest.raises(ValueError, match="accepted are 0 to 10"):
        Schedule(epochs=10, switch=11)


def test_compressed_gradients_are_half_on_the_network(tiny, plan):
    assert plan_of(tiny, compressed=True).phases["full"].reduced == plan.phases["full"].reduced // 2


def test_warmup_reduces_no_gradient_of_lora(plan):
    assert plan.phases["warmup"].reduced == plan.phases["full"].reduced == 4 * plan.phases["full"].trainable


def test_fsdp_gathers_frozen_weights_too(tiny):
    phases = plan_of(tiny, strategy="fsdp").phases

    assert phases["lora"].gathered > phases["full"].gathered > 0
    assert phases["lora"].reduced < phases["full"].reduced


def test_accumulating_computes_more_and_updates_once(tiny, plan):
    once, twice = plan.phases["full"].time, plan_of(tiny, timed=True, accumulate=2).phases["full"].time

    assert (twice.forward, twice.backward) == (2 * once.forward, 2 * once.backward)
    assert (twice.update, twice.network) == (once.update, once.network)


def test_a_gpu_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="accepted are A100-40GB"):
        Setup(cluster=cluster(), gpu="TPU")
    assert dataclasses.replace(Setup(cluster=cluster()), gpu="H100-80GB").gpu == "H100-80GB"
