"""Every operator × provider × case is what the reference is in float64; registration holds under ``opcheck``."""

import pytest
import torch
from torch.library import opcheck

from prelora.nn import LoRALinear
from prelora.ops import (
    grouped_gemm,
    grouped_gemm_,
    lora_linear,
    lora_linear_backward,
    lora_merge,
    lora_merge_backward,
    lora_two_path,
    lora_two_path_backward,
    merged_norms,
    weight_norms,
)
from prelora.ops.cases import GROUPS, SMALL, group_arguments, linear_tensors, merge_arguments
from prelora.registry import OPERATORS, REFERENCE, use_provider

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.float16: 9.8e-4, torch.bfloat16: 7.9e-3}
ALL = [True] * 5
NEEDS = [[bool(mask >> bit & 1) for bit in range(5)] for mask in range(32)]


def skip_what_has_no_provider(provider, dtype):
    if provider == "triton" and dtype in (torch.float64, torch.bfloat16):
        pytest.skip("float64 has no Triton kernel, and Triton's interpreter keeps bf16 as integers")


def skip_what_is_not_built(operator, provider, arguments):
    """The extension has no float64, may be without CUDA, or not be there at all: the rest must serve."""
    for candidate in operator.providers:
        built = candidate.name != provider or candidate.module != "prelora.ops.grouped"
        if reason := None if built else candidate.refusal() or candidate.refusal(*arguments):
            pytest.skip(reason)


def providers_of(*operators):
    """A test for each provider that these operators have."""
    names = dict.fromkeys([REFERENCE, *(p.name for operator in operators for p in operator.providers)])
    return pytest.mark.parametrize("provider", names)


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def double(value):
    """Floating tensors, also in lists, as float64 leaves off the graph."""
    if isinstance(value, torch.Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return [double(item) for item in value]
    return torch.float64 if isinstance(value, torch.dtype) else value


def magnitude(value):
    """As ``double``, without signs: what the result's terms add up to where nothing cancels."""
    if isinstance(value, torch.Tensor):
        return value.abs() if value.is_floating_point() else value
    signed = isinstance(value, list) and value and isinstance(value[0], (torch.Tensor, float))
    return [abs(item) for item in value] if signed else value


def assert_serves(operator, provider, arguments, dtype, roundings=8):
    """The provider's results are the float64 reference's, up to a few roundings of the sum of the terms' sizes."""
    wide = [double(argument) for argument in arguments]
    expected = flat(operator.reference(*wide))
    scale = flat(operator.reference(*[magnitude(argument) for argument in wide]))
    skip_what_is_not_built(operator, provider, arguments)
    with use_provider(provider):
        actual = flat(operator(*arguments))
    assert len(actual) == len(expected)
    for mine, right, size in zip(actual, expected, scale, strict=True):
        assert mine.shape == right.shape
        assert ((mine.double() - right).abs() <= roundings * EPS[dtype] * size + 1e-300).all()


def linear_arguments(case, dtype, wide=None):
    tensors = linear_tensors(case, dtype, wide)
    w_eff = lora_merge.reference(
        [tensors.weight], [tensors.lora_a], [tensors.lora_b], [len(case.rows)], case.rows, case.ranks, case.scalings,
        dtype,
    )[0]  # fmt: skip
    layout = (case.rows, case.ranks, case.scalings)
    forward = [tensors.x, w_eff, tensors.weight, tensors.bias, tensors.lora_a, tensors.lora_b, *layout]
    backward = [tensors.dy, tensors.x, None, w_eff, tensors.lora_a, tensors.lora_b, *layout]
    return forward, backward


def two_path_arguments(case, dtype, wide=None, dropout=0.0):
    tensors = linear_tensors(case, dtype, wide)
    seed = torch.tensor([987654321]) if dropout else None
    layout = (case.rows, case.ranks, case.scalings, dropout, seed)
    weight = tensors.weight.to(dtype)
    forward = [tensors.x, weight, tensors.bias, tensors.lora_a, tensors.lora_b, *layout]
    h = lora_two_path.reference(*forward)[1]
    return forward, [tensors.dy, tensors.x, h, weight, tensors.lora_a, tensors.lora_b, *layout]


matrix = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


@matrix
@providers_of(lora_linear)
@dtypes
class TestValues:
    def test_lora_linear(self, case, provider, dtype):
        skip_what_has_no_provider(provider, dtype)
        assert_serves(lora_linear, provider, linear_arguments(case, dtype)[0], dtype)

    def test_lora_linear_backward_of_a_frozen_weight(self, case, provider, dtype):
        skip_what_has_no_provider(provider, dtype)
        arguments = linear_arguments(case, dtype)[1]
        assert_serves(lora_linear_backward, provider, [*arguments, [True, False, True, True, True]], dtype)

    def test_lora_linear_backward_of_a_training_weight(self, case, provider, dtype):
        skip_what_has_no_provider(provider, dtype)
        assert_serves(lora_linear_backward, provider, [*linear_arguments(case, dtype)[1], ALL], dtype)

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_lora_two_path(self, case, provider, dtype, dropout):
        skip_what_has_no_provider(provider, dtype)
        assert_serves(lora_two_path, provider, two_path_arguments(case, dtype, dropout=dropout)[0], dtype)

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_lora_two_path_backward(self, case, provider, dtype, dropout):
        skip_what_has_no_provider(provider, dtype)
        arguments = two_path_arguments(case, dtype, dropout=dropout)[1]
        assert_serves(lora_two_path_backward, provider, [*arguments, ALL], dtype)


@providers_of(lora_merge)
@dtypes
@pytest.mark.parametrize("wide", [torch.float64, torch.float32, torch.float16], ids=str)
def test_lora_merge_sums_wide(provider, dtype, wide):
    skip_what_has_no_provider(provider, dtype)
    skip_what_has_no_provider(provider, wide)
    arguments = merge_arguments([*SMALL.values()], dtype, wide)
    skip_what_is_not_built(lora_merge, provider, arguments)

    wide_arguments = [double(argument) for argument in arguments]
    expected = lora_merge.reference(*wide_arguments)
    bases = wide_arguments[0]
    with use_provider(provider):
        actual = lora_merge(*arguments)
    for mine, right, base in zip(actual, expected, bases, strict=True):
        update = (right - base).abs()
        allowed = EPS[dtype] / 2 * right.abs() + 8 * EPS[torch.promote_types(wide, torch.float32)] * (1 + update)
        if provider == "cpu" and wide != torch.float64 and EPS[dtype] > EPS[torch.float32]:
            # W, A and B are rounded as well.
            allowed += EPS[dtype] / 2 * base.abs() + 3 * EPS[dtype] * update.clamp(min=update.mean())
        assert mine.dtype == dtype
        assert ((mine.double() - right).abs() <= 1.01 * allowed + 6e-8).all()


@providers_of(lora_merge_backward)
@dtypes
def test_lora_merge_backward(provider, dtype):
    skip_what_has_no_provider(provider, dtype)
    weights, *adapters, _ = merge_arguments([*SMALL.values()], dtype, dtype)
    assert_serves(lora_merge_backward, provider, [weights, *adapters], dtype)


@providers_of(weight_norms)
@pytest.mark.parametrize("squared", [True, False])
def test_weight_norms_of_mixed_shapes_dtypes_and_strides(provider, squared):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(n, k, generator=generator) for n, k in [(48, 33), (1, 1), (7, 1000), (0, 4), (300, 5)]]
    tensors = [*draw, draw[0][5:20], draw[2][:, 3:60], draw[0].half(), draw[0].flatten(), draw[4].view(3, 100, 5)]

    with use_provider(provider):
        actual = weight_norms(tensors, squared)

    expected = torch.stack([tensor.double().square().sum() for tensor in tensors])
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected if squared else expected.sqrt(), rtol=1e-6, atol=0)


@providers_of(weight_norms)
def test_weight_norms_of_four_million_elements_are_right_to_a_millionth(provider):
    if provider == "triton":
        pytest.skip("millions of elements take minutes in Triton's interpreter")
    if provider == REFERENCE:
        pytest.skip("the reference is exact in float64, which is how it is used")
    weight = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0)) * 0.02

    with use_provider(provider):
        norm = weight_norms([weight], False)

    assert norm.item() == pytest.approx(weight.double().norm().item(), rel=1e-6)


@providers_of(merged_norms)
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("wide", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merged_norms_of_every_slice_are_right_to_a_millionth(provider, squared, wide):
    arguments = [*merge_arguments([*SMALL.values()], wide, wide)[:-1], squared]
    skip_what_is_not_built(merged_norms, provider, arguments)

    with use_provider(provider):
        actual = merged_norms(*arguments)

    assert actual.dtype == (torch.float64 if wide == torch.float64 else torch.float32)
    torch.testing.assert_close(actual.double(), merged_norms.reference(*map(double, arguments)), rtol=1e-6, atol=0)


@providers_of(grouped_gemm)
@dtypes
@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS)
def test_grouped_gemm(case, provider, dtype):
    assert_serves(grouped_gemm, provider, group_arguments(case, [dtype] * 4), dtype)


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # which fills it
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("case", ["odd sizes, rank 3", "slices of unequal rows", "no rows"])
def test_the_cpu_provider_writes_every_element(case):
    case = SMALL[case]
    merged = merge_arguments([case], torch.float32, torch.float32)
    backward = linear_arguments(case, torch.float32)[1]

    assert_serves(lora_linear_backward, "cpu", [*backward, [True, False, True, True, True]], torch.float32)
    assert_serves(lora_two_path, "cpu", two_path_arguments(case, torch.float32)[0], torch.float32)
    assert_serves(lora_merge, "cpu", merged, torch.float32)
    assert_serves(lora_merge_backward, "cpu", merged[:-1], torch.float32)


# Registration


def needs_grad(arguments, dtype=torch.float64):
    """The arguments with every floating tensor but W_eff a leaf that needs a gradient."""
    return [
        a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]


SLICED = SMALL["slices of unequal rows"]


def samples():
    forward, backward = linear_arguments(SLICED, torch.float64)
    trained = needs_grad(forward)
    trained[1] = trained[1].detach()
    yield lora_linear, trained
    yield lora_linear_backward, [*backward, ALL]
    for dropout in (0.0, 0.3):
        forward, backward = two_path_arguments(SLICED, torch.float64, dropout=dropout)
        yield lora_two_path, needs_grad(forward)
        yield lora_two_path_backward, [*backward, [True, False, True, False, True]]
    for dtype in (torch.float64, torch.float32):  # the extension has no float64
        merged = merge_arguments([SLICED, SMALL["rank 1"]], dtype, dtype)
        yield lora_merge, [needs_grad(tensors) for tensors in merged[:3]] + merged[3:]
        yield lora_merge_backward, merged[:-1]
        yield merged_norms, [*merged[:-1], False]
        a, b, d, *rest, _ = group_arguments(GROUPS["every layout"], [dtype] * 4)
        yield grouped_gemm, [needs_grad(a), needs_grad(b), needs_grad(d), *rest, dtype]
        yield grouped_gemm_, [a, b, d, [torch.empty_like(d_i) for d_i in d], *rest]
    yield weight_norms, [[torch.randn(5, 4, dtype=torch.float64), torch.randn(3)], False]


def checks():
    for operator, arguments in samples():
        for provider in (REFERENCE, *(p.name for p in operator.providers if p.name in ("grouped", "cpu"))):
            yield pytest.param(operator, arguments, provider, id=f"{operator.name}-{provider}")


@pytest.mark.parametrize(("operator", "arguments", "provider"), list(checks()))
def test_opcheck(operator, arguments, provider):
    skip_what_is_not_built(operator, provider, arguments)
    with use_provider(provider):
        opcheck(operator.op, tuple(arguments))


def test_every_operator_is_checked():
    assert {operator.name for operator, _ in samples()} == set(OPERATORS)


# Gradients


def merged_layer(case):
    """lora_linear as a function of x, W, b, A, B alone."""
    layout = (case.rows, case.ranks, case.scalings)

    def function(x, weight, bias, lora_a, lora_b):
        with torch.no_grad():
            w_eff = lora_merge([weight], [lora_a], [lora_b], [len(case.rows)], *layout, x.dtype)[0]
        return lora_linear(x, w_eff, weight, bias, lora_a, lora_b, *layout)

    return function


def two_path_layer(case, dropout=0.0):
    seed = torch.tensor([5]) if dropout else None

    def function(x, weight, bias, lora_a, lora_b):
        return lora_two_path(x, weight, bias, lora_a, lora_b, case.rows, case.ranks, case.scalings, dropout, seed)[0]

    return function


LAYERS = {"merged": merged_layer, "two_path": two_path_layer, "dropout": lambda case: two_path_layer(case, 0.3)}
TINY = type(SLICED)(4, 3, (2, 3), (1, 2))


def tiny_inputs(need):
    tensors = linear_tensors(TINY, torch.float64)
    leaves = [tensors.x, tensors.weight, tensors.bias, tensors.lora_a, tensors.lora_b]
    return [leaf.clone().requires_grad_(needed) for leaf, needed in zip(leaves, need, strict=True)]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("need", NEEDS[1:], ids=lambda need: "".join("-x"[needed] for needed in need))
def test_gradcheck_of_every_subset(layer, need):
    with use_provider(REFERENCE):  # that others compute the same for every subset, a test below holds
        assert torch.autograd.gradcheck(LAYERS[layer](TINY), tiny_inputs(need))


@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck_of_the_cpu_provider(layer):
    with use_provider("cpu"):
        assert torch.autograd.gradcheck(LAYERS[layer](TINY), tiny_inputs(ALL))


@pytest.mark.parametrize("provider", [REFERENCE, "cpu"])
def test_gradcheck_of_lora_merge(provider):
    *tensors, slices, rows, ranks, scaling, dtype = merge_arguments([TINY, TINY], torch.float64, torch.float64)
    leaves = [tensor.requires_grad_() for group in tensors for tensor in group]

    def function(*leaves):
        return tuple(lora_merge(leaves[:2], leaves[2:4], leaves[4:], slices, rows, ranks, scaling, dtype))

    with use_provider(provider):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("provider", [REFERENCE, "cpu"])
@pytest.mark.parametrize("need", NEEDS, ids=lambda need: "".join("-x"[needed] for needed in need))
def test_backward_computes_only_what_is_needed(layer, provider, need):
    if layer == "merged":
        operator, backward = lora_linear_backward, linear_arguments(SLICED, torch.float64)[1]
    else:
        dropout = 0.3 if layer == "dropout" else 0.0
        operator, backward = lora_two_path_backward, two_path_arguments(SLICED, torch.float64, dropout=dropout)[1]

    assert_serves(operator, provider, [*backward, need], torch.float64)


# What is saved


def saved_bytes(function, inputs):
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    for leaf in inputs:
        sizes.pop(leaf.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def inputs_of(case, trained):
    tensors = linear_tensors(case, torch.float32)
    named = {
        "x": tensors.x,
        "weight": tensors.weight,
        "bias": tensors.bias,
        "lora_a": tensors.lora_a,
        "lora_b": tensors.lora_b,
    }
    # An activation is no leaf: what is kept of it counts.
    return [tensor.clone().requires_grad_(name in trained) for name, tensor in named.items()]


def test_with_a_frozen_no_input_activation_is_kept():
    case = type(SLICED)(1000, 64, (48,), (4,))
    x, *rest = inputs_of(case, {"x", "lora_b"})
    activation = x * 1

    kept = saved_bytes(lambda *rest: merged_layer(case)(activation, *rest), rest)

    assert kept == 1000 * 4 * 4 + 48 * 64 * 4  # x·Aᵀ, and W_eff for x's gradient


def test_dropout_keeps_only_its_seed():
    case = type(SLICED)(1000, 64, (48,), (4,))
    x, *rest = inputs_of(case, {"x", "lora_a", "lora_b"})
    activation = x * 1

    kept = saved_bytes(lambda *rest: two_path_layer(case, 0.5)(activation, *rest), rest)

    assert kept == 1000 * 64 * 4 + 1000 * 4 * 4 + 8  # x, drop(x)·Aᵀ and the seed


# Autocast


@pytest.mark.parametrize("layer", ["merged", "two_path"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autocast_is_the_same_eager_and_compiled(layer, backend):
    x, *parameters = inputs_of(SLICED, {"x", "weight", "bias", "lora_a", "lora_b"})
    function = LAYERS[layer](SLICED)
    if layer == "merged":

        def function(x, weight, bias, lora_a, lora_b):
            layout = (SLICED.rows, SLICED.ranks, SLICED.scalings)
            with torch.no_grad():
                w_eff = lora_merge([weight], [lora_a], [lora_b], [3], *layout, torch.bfloat16)[0]
            return lora_linear(x, w_eff, weight, bias, lora_a, lora_b, *layout)

    results = []
    for call in (function, torch.compile(function, backend=backend, fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x, *parameters)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *parameters])])

    assert [tensor.dtype for tensor in results[0]] == [torch.bfloat16] + [torch.float32] * 5
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("execution", ["merged", "two_path"])
def test_autocast_leaves_float64_alone_as_it_does_in_a_linear(execution):
    layer = LoRALinear(8, 8, rank=2, dtype=torch.float64, execution=execution)
    x = torch.ones(3, 8, dtype=torch.float64)
    expected = layer(x)

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_autocast_leaves_norms_and_merges_wide():
    merged = merge_arguments([SLICED], torch.float32, torch.float32)
    expected = lora_merge(*merged)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora_merge(*merged)[0], expected)
        assert weight_norms([expected], False).item() == pytest.approx(expected.double().norm().item(), rel=1e-6)


# Refusals


def test_lora_linear_refuses_a_differentiable_merged_weight():
    forward, _ = linear_arguments(SLICED, torch.float64)

    with pytest.raises(ValueError, match="w_eff must not require a gradient"):
        lora_linear(*needs_grad(forward))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_two_paths_second_result_has_its_gradient(dropout):
    forward, _ = two_path_arguments(TINY, torch.float64, dropout=dropout)
    x, weight, bias, lora_a, lora_b, *rest = needs_grad(forward)

    assert torch.autograd.gradcheck(lambda *leaves: lora_two_path(*leaves, *rest)[1], (x, weight, bias, lora_a, lora_b))
