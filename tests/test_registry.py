"""Providers: the first that can serve is taken, one that was asked for serves or raises with the reason."""

import subprocess
import sys

import pytest
import torch

from prelora import _ext
from prelora.errors import ProviderError
from prelora.ops import lora_linear_backward, lora_merge, lora_two_path, weight_norms
from prelora.registry import OPERATORS, REFERENCE, use_provider

TENSORS = [torch.ones(2, 2)]


def test_on_the_cpu_a_provider_for_it_is_chosen_before_the_interpreter():
    chosen = {operator.chosen(TENSORS) for operator in OPERATORS.values()}

    assert chosen <= ({"cpu", "grouped"} if _ext.reason() is None else {"cpu", REFERENCE})


def test_operators_have_their_providers_in_order():
    providers = {name: tuple(p.name for p in operator.providers) for name, operator in OPERATORS.items()}

    assert {name for name, names in providers.items() if names == ("grouped", "cpu", "triton", "cuda")} == {
        "lora_merge",
        "lora_merge_backward",
    }
    assert {name for name, names in providers.items() if names == ("cpu", "cuda")} == {
        "grouped_gemm",
        "grouped_gemm_",
        "merged_norms",
    }
    assert set(providers.values()) == {("grouped", "cpu", "triton", "cuda"), ("cpu", "cuda"), ("cpu", "triton")}


@pytest.mark.parametrize("name", ["cpu", "triton", REFERENCE])
def test_a_provider_that_was_asked_for_serves(name):
    with use_provider(name):
        assert weight_norms.chosen(TENSORS, False) == name
        assert weight_norms(TENSORS, False).item() == pytest.approx(2)


def test_a_provider_that_cannot_serve_raises_with_every_reason():
    doubles = [torch.ones(2, 2, dtype=torch.float64)]

    with use_provider("triton"), pytest.raises(ProviderError) as error:
        weight_norms(doubles, False)

    assert "'triton' was asked for and cannot serve weight_norms: float64 has no Triton kernel" in str(error.value)
    assert "cpu: would serve" in str(error.value)


def test_left_alone_the_operator_serves_what_triton_cannot():
    assert weight_norms([torch.ones(2, 2, dtype=torch.float64)], False).item() == 2


def test_the_choice_holds_inside_compiled_code():
    compiled = torch.compile(lambda tensor: weight_norms([tensor], False), backend="aot_eager", fullgraph=True)
    doubles = torch.ones(2, 2, dtype=torch.float64)
    assert compiled(doubles).item() == 2

    with use_provider("triton"), pytest.raises(ProviderError, match="float64 has no Triton kernel"):
        compiled(doubles)


def test_choices_nest_and_end_with_their_block():
    with use_provider("triton"):
        with use_provider(None):
            assert weight_norms.chosen(TENSORS, False) == "cpu"
        assert weight_norms.chosen(TENSORS, False) == "triton"
    assert weight_norms.chosen(TENSORS, False) == "cpu"


def test_backward_runs_under_the_choice_too():
    a, b = torch.ones(1, 2, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    merged = lora_merge(TENSORS, [a], [b], [1], [2], [1], [1.0], torch.float32)[0]

    with use_provider(REFERENCE):
        merged.sum().backward()

    assert torch.equal(a.grad, torch.full((1, 2), 2.0))


def test_an_unknown_provider_is_refused_with_the_known_ones():
    with (
        pytest.raises(ValueError, match="provider 'tritonn': accepted are cpu, cuda, grouped, reference, triton"),
        use_provider("tritonn"),
    ):
        pass


def test_a_provider_whose_module_does_not_load_gives_that_as_its_reason(monkeypatch):
    monkeypatch.setattr(weight_norms, "providers", [])
    weight_norms.provider("broken", "prelora.kernels.no_such_module", lambda *_: None)

    assert weight_norms.chosen(TENSORS, False) == REFERENCE
    monkeypatch.setattr("prelora.registry._asked", ["broken"])
    with pytest.raises(ProviderError, match=r"kernels\.no_such_module cannot be imported: No module named"):
        weight_norms(TENSORS, False)


def test_the_environment_asks_for_the_whole_process():
    code = "import torch, prelora.ops as o; o.weight_norms([torch.ones(1, dtype=torch.float64)], False)"
    environment = {"PRELORA_PROVIDER": "triton", "PATH": ""}

    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert "ProviderError: provider 'triton' was asked for and cannot serve weight_norms" in result.stderr


def test_info_prints_every_operator_and_provider_with_its_reason():
    environment = {"PATH": "", "HOME": "/tmp"}
    result = subprocess.run(
        [sys.executable, "-m", "prelora.info"], env=environment, capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name in OPERATORS:
        rows = [line.split(None, 3) for line in lines if line.split()[:1] == [name]]
        assert [row[1] for row in rows] == [*(p.name for p in OPERATORS[name].providers), REFERENCE]
    if not torch.cuda.is_available():
        assert any("no CUDA device is available" in line for line in lines)


def linear_backward(rank, slices=1, need=(True, False, False, True, True)):
    x, w_eff = torch.ones(2, 4), torch.ones(slices * 3, 4)
    lora_a, lora_b = torch.ones(slices * rank, 4), torch.ones(slices * 3 * rank)
    layout = ([3] * slices, [rank] * slices, [1.0] * slices)
    return [torch.ones(2, slices * 3), x, None, w_eff, lora_a, lora_b, *layout, list(need)]


def two_path(rank):
    tensors = [torch.ones(2, 4), torch.ones(3, 4), None, torch.ones(rank, 4), torch.ones(3 * rank)]
    return [*tensors, [3], [rank], [1.0], 0.0, None]


TOO_MUCH = {
    "rank": (lora_linear_backward, linear_backward(129), r"ranks \(129,\): the kernels take 1 to 128"),
    "slices": (lora_linear_backward, linear_backward(2, 4), "4 row slices: the kernels take 1 to 3"),
    "two_path": (lora_two_path, two_path(129), r"ranks \(129,\): the kernels take 1 to 128"),
    "second tensor": (weight_norms, [[torch.ones(2), torch.ones(2).double()], False], "float64 has no Triton kernel"),
}


@pytest.mark.parametrize(("operator", "arguments", "reason"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_the_kernels_cannot_take_they_refuse_beforehand(operator, arguments, reason, monkeypatch):
    with use_provider("triton"), pytest.raises(ProviderError, match=reason):
        operator(*arguments)
    monkeypatch.setattr(operator, "providers", [p for p in operator.providers if p.name == "triton"])
    assert operator.chosen(*arguments) == REFERENCE


def test_while_the_weight_trains_any_rank_is_taken():
    with use_provider("triton"):
        assert lora_linear_backward.chosen(*linear_backward(129, need=[True] * 5)) == "triton"
