"""Which plan a layer takes: by cost, by what it cannot do otherwise, or as it was told."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prelora.nn import LoRALinear
from prelora.nn.execution import choose_execution

VIT_L = {"in_features": 1024, "rows": (1024,), "ranks": (32,), "weight_bytes": 4}


def choice(**changes):
    options = {"tokens": 12608, "compute_bytes": 2, "device_type": "cuda", "work": "lora"} | VIT_L
    return choose_execution(**options | changes).execution


def test_a_training_step_of_many_tokens_merges():
    assert choice() == choice(work="warmup") == choice(device_type="cpu", compute_bytes=4) == "merged"


def test_few_tokens_take_the_second_path():
    assert choice(tokens=16, work="inference", compute_bytes=4) == "two_path"
    assert choice(tokens=16, work="lora", compute_bytes=4) == "two_path"


@given(
    tokens=st.integers(0, 100_000),
    more=st.integers(0, 100_000),
    rank=st.integers(1, 128),
    work=st.sampled_from(["inference", "warmup", "lora"]),
    compute_bytes=st.sampled_from([2, 4]),
    device_type=st.sampled_from(["cpu", "cuda"]),
)
def test_more_tokens_never_turn_from_merging(tokens, more, rank, **options):
    few = choice(tokens=tokens, ranks=(rank,), **options)
    many = choice(tokens=tokens + more, ranks=(rank,), **options)

    assert (few, many) != ("merged", "two_path")


def layer(dtype=torch.float32, **options):
    return LoRALinear(64, 64, rank=4, dtype=dtype, **options)


@pytest.mark.parametrize("asked", ["merged", "two_path"])
def test_what_was_asked_for_is_taken_at_any_size(asked):
    module = layer(execution=asked)

    for tokens in (1, 10_000):
        module(torch.randn(tokens, 64))
        assert (module.last_plan.execution, module.last_plan.reason) == (asked, "asked for")


def test_dropout_takes_the_second_path_while_training_only():
    module = layer(dropout=0.5)
    assert module.plan(10_000).reason == "dropout gives the low-rank path an input of its own"
    assert module.eval().plan(10_000).execution == "merged"


def test_a_base_without_an_fp32_copy_is_not_summed_into():
    plan = layer(torch.bfloat16).plan(10_000)

    assert (plan.execution, plan.reason) == ("two_path", "a sum in torch.bfloat16 would round LoRA's update away")


def test_the_reason_names_cost_and_tokens():
    assert layer().plan(10_000).reason.startswith("merging costs 0.")
    assert layer().plan(10_000).reason.endswith("of a second path at 10000 tokens")


def test_a_training_step_under_autocast_always_merges_for_that_is_the_cast():
    module = layer()
    assert not module.merges_always
    with torch.autocast("cpu", torch.bfloat16):
        assert module.merges_always
        assert module.compute_dtype == torch.bfloat16
        with torch.no_grad():
            assert not module.merges_always


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_what_merges_always_plans_to(tokens):
    with torch.autocast("cpu", torch.bfloat16):
        assert layer().plan(tokens).execution == "merged"


@pytest.mark.parametrize("execution", ["merged", "two_path"])
@pytest.mark.parametrize("trains", [True, False])
def test_both_plans_are_one_function_with_one_gradient(execution, trains):
    torch.manual_seed(0)
    module = layer(torch.float64, execution=execution)
    torch.nn.init.normal_(module.lora_B)
    module.weight.requires_grad_(trains)
    x = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)

    y = module(x)
    y.square().sum().backward()

    torch.testing.assert_close(y, torch.nn.functional.linear(x, module.merged_weight(), module.bias))
    dy = 2 * y.detach()
    s = module.scaling[0]
    torch.testing.assert_close(x.grad, dy @ module.merged_weight())
    torch.testing.assert_close(module.lora_A.grad, s * module.lora_B.T @ dy.T @ x)
    torch.testing.assert_close(module.lora_B.grad, s * dy.T @ (x @ module.lora_A.T))
    assert (module.weight.grad is not None) == trains


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"execution": "fused"}, "execution = 'fused': accepted are auto, merged, two_path"),
        ({"execution": "merged", "dropout": 0.1}, "execution = 'merged' with dropout = 0.1: .* accepted are 'auto'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)
