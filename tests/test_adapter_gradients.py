"""``prelora_C::adapter_gradients``, by which the ``cpu`` provider makes A's and B's gradients in one pass."""

from dataclasses import replace

import pytest
import torch
from rounding import DTYPES, assert_rounded

from prelora import _ext
from prelora.nn import LoRALinear
from prelora.ops import lora_linear_backward
from prelora.ops.cases import SMALL, LinearCase, linear_tensors
from prelora.ops.lora_linear import adapter_gradients
from prelora.registry import REFERENCE, use_provider

pytestmark = pytest.mark.skipif(_ext.reason() is not None, reason=_ext.reason() or "")

CASES = {
    **SMALL,
    "several spans, several slices": LinearCase(1000, 72, (40, 33, 17), (5, 14, 29)),
    "longer than a block, shorter than a span": LinearCase(65, 130, (96,), (17,)),
    "rows 4 KB apart": LinearCase(70, 1024, (2048,), (3,)),
    "sums that fill the cache": LinearCase(300, 384, (256, 128), (120, 60)),
}
NEEDS = [(True, True), (True, False), (False, True)]


def arguments_of(case, dtype=torch.float32, wide=None, need=(True, True), given=(), seed=0):
    """Arguments of the operator; S and dS, where they are to be given, are not those that it would compute."""
    drawn = linear_tensors(case, dtype, wide, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    s, ds = (
        torch.randn(case.tokens, sum(case.ranks), generator=generator).to(dtype) if name in given else None
        for name in ("s", "ds")
    )
    layout = list(case.rows), list(case.ranks), list(case.scalings)
    return [drawn.dy, drawn.x, s, ds, drawn.lora_a, drawn.lora_b, *layout, *need]


def expected_of(arguments, magnitudes=False):
    """In float64, by the reference; or the same of all absolute values, to which rounding errors are relative."""
    tensors = [None if t is None else t.double() for t in arguments[:6]]
    dy, x, s, ds, a, b = [None if t is None else t.abs() for t in tensors] if magnitudes else tensors
    *layout, need_a, need_b = arguments[6:]
    if ds is None:
        return adapter_gradients(dy, x, s, a, b, *layout, need_a, need_b)
    return [ds.t() @ x] * need_a + adapter_gradients(dy, x, s, a, b, *layout, False, need_b)


def assert_right(arguments):
    actual = torch.ops.prelora_C.adapter_gradients(*arguments)
    factors = [factor for factor, needed in zip(arguments[4:6], arguments[-2:], strict=True) if needed]

    for mine, right, size, factor in zip(
        actual, expected_of(arguments), expected_of(arguments, magnitudes=True), factors, strict=True
    ):
        assert (mine.shape, mine.dtype) == (factor.shape, factor.dtype)
        assert_rounded(mine, right, size)


@pytest.mark.parametrize("given", [(), ("s",), ("ds",), ("s", "ds")], ids=str)
@pytest.mark.parametrize("need", NEEDS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_are_those_of_the_definition(case, need, given):
    assert_right(arguments_of(case, need=need, given=given))


@pytest.mark.parametrize("wide", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_factors_of_any_dtypes(dtype, wide):
    assert_right(arguments_of(CASES["several spans, several slices"], dtype, wide, given=("s",)))


@pytest.mark.parametrize("tokens", [1, 14, 63, 64, 65, 191, 192, 384, 385, 3500])
def test_any_number_of_tokens(tokens):
    assert_right(arguments_of(LinearCase(tokens, 40, (24, 16), (3, 6)), seed=tokens))


@pytest.mark.parametrize("rank", [*range(1, 34), 47, 48, 49, 64, 100, 128])
def test_every_rank(rank):
    assert_right(arguments_of(LinearCase(70, 33, (21,), (rank,)), seed=rank))


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_computes_the_same_function(dtype, name, set_isa):
    if not set_isa(name):
        pytest.skip(f"this processor has no {name}")

    for case in CASES.values():
        assert_right(arguments_of(case, dtype, torch.float32))


@pytest.mark.parametrize("name", ["several spans, several slices", "sums that fill the cache"])
def test_bits_do_not_depend_on_threads(name, threads):
    arguments = arguments_of(replace(CASES[name], tokens=3000))
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(torch.ops.prelora_C.adapter_gradients(*arguments))

    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("train_a", [True, False])
@pytest.mark.parametrize("execution", ["merged", "two_path"])
def test_a_layer_of_any_leading_dimensions_takes_it(execution, train_a):
    torch.manual_seed(0)
    layer = LoRALinear(6, 8, rank=(2, 3), rows=(5, 3), execution=execution)
    layer.weight.requires_grad_(False)
    layer.lora_A.requires_grad_(train_a)
    torch.nn.init.normal_(layer.lora_B)
    x, gradients = torch.randn(4, 3, 6), {}
    trained = [layer.lora_A, layer.lora_B] if train_a else [layer.lora_B]

    for provider in (None, REFERENCE):
        with use_provider(provider):
            gradients[provider] = torch.autograd.grad(layer(x).square().sum(), trained)

    for mine, right in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("tokens", [0, 5])
def test_what_it_does_not_take_the_provider_makes_otherwise(tokens):
    x, a, b = torch.randn(tokens, 6), torch.randn(3, 6), torch.randn(15)
    arguments = [torch.randn(tokens, 8), x, None, torch.randn(8, 6), a, b, [3, 5], [0, 3], [1.0, 1.0]]
    need = [True, False, False, True, True]

    with use_provider("cpu"):
        gradients = lora_linear_backward(*arguments, need)

    for mine, right in zip(gradients, lora_linear_backward.reference(*arguments, need), strict=True):
        torch.testing.assert_close(mine, right)


def test_a_nan_in_one_slice_stays_in_it():
    arguments = arguments_of(LinearCase(100, 24, (16, 16), (3, 4)))
    arguments[0][50, 3] = float("nan")  # dy of the first slice

    da, db = torch.ops.prelora_C.adapter_gradients(*arguments)

    assert da[:3].isnan().all()
    assert not da[3:].isnan().any()
    assert db[:48].isnan().sum() == 3
    assert not db[48:].isnan().any()


WRONG = {
    "dy of other rows": ({0: torch.ones(5, 7)}, "dy is"),
    "x of other tokens": ({1: torch.ones(4, 6)}, "x is"),
    "x with gaps": ({1: torch.ones(5, 12)[:, ::2]}, "x is"),
    "x of another dtype": ({1: torch.ones(5, 6).bfloat16()}, "x is"),
    "S of another rank": ({2: torch.ones(5, 2)}, "S is"),
    "dS of another rank": ({3: torch.ones(5, 2)}, "dS is"),
    "A of another rank": ({4: torch.ones(2, 6)}, "A is"),
    "B of too few elements": ({5: torch.ones(23)}, "for 24 elements"),
    "too few rows": ({6: [8, 8]}, "lists of different lengths"),
    "rank 0": ({7: [0]}, "slice 0: 8 rows of rank 0"),
    "no x": ({1: None}, "x is not given"),
    "float64": ({i: torch.ones(n, m).double() for i, (n, m) in enumerate([(5, 8), (5, 6)])}, "float32, bfloat16"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_nothing_is_read_beside_the_tensors(changes, message):
    arguments = arguments_of(LinearCase(5, 6, (8,), (3,), scaling=(1.0,)))
    for i, value in changes.items():
        arguments[i] = value

    with pytest.raises(ValueError, match=message):
        torch.ops.prelora_C.adapter_gradients(*arguments)
