"""``grouped_gemm`` beside its place in the operator matrix: random groups, gradients, aliasing, refusals, threads."""

import random

import pytest
import torch
from rounding import DTYPES, HALF_STEP, assert_rounded

from prelora import _ext
from prelora.errors import ProviderError
from prelora.ops import grouped_gemm, grouped_gemm_, lora_merge, lora_merge_backward, merged_norms
from prelora.ops.cases import GROUPS, LAYOUTS, GroupCase, LinearCase, group_arguments, merge_arguments
from prelora.registry import REFERENCE, use_provider

extension = pytest.mark.skipif(_ext.reason() is not None, reason=_ext.reason() or "")
providers = pytest.mark.parametrize("provider", [REFERENCE, pytest.param("cpu", marks=extension)])


def random_groups(rng, count):
    ranks = [1, 2, 3, 5, 8, 12, 16, 17, 24, 31, 32, 48, 64, 100, 128]
    return [
        GroupCase(
            *rng.sample([rng.randrange(1, 200), rng.randrange(1, 200), rng.choice(ranks)], 3),
            *rng.choice(LAYOUTS),
            alpha=rng.uniform(-2, 2),
            beta=rng.choice([0.0, 1.0, rng.uniform(-2, 2)]),
        )
        for _ in range(count)
    ]


def doubles(arguments):
    return [
        [x.double() for x in value] if isinstance(value, list) and isinstance(value[0], torch.Tensor) else value
        for value in arguments[:-1]
    ] + [torch.float64]


def assert_right(actual, arguments):
    a, b, d, alpha, beta, *trans, _ = doubles(arguments)
    expected = grouped_gemm.reference(a, b, d, alpha, beta, *trans, torch.float64)
    sizes = grouped_gemm.reference(
        *([x.abs() for x in tensors] for tensors in (a, b, d)),
        *([abs(x) for x in values] for values in (alpha, beta)),
        *trans,
        torch.float64,
    )
    for mine, right, size in zip(actual, expected, sizes, strict=True):
        assert mine.dtype == arguments[-1]
        assert_rounded(mine, right, size)


@extension
@pytest.mark.parametrize("seed", range(12))
def test_random_groups_of_random_dtypes_on_any_number_of_threads(seed, threads):
    rng = random.Random(seed)
    arguments = group_arguments(random_groups(rng, rng.choice([1, 7, 60])), rng.choices(DTYPES, k=4), seed=seed)
    threads(rng.choice([1, 2, 3]))

    with use_provider("cpu"):
        assert_right(grouped_gemm(*arguments), arguments)


@extension
@pytest.mark.parametrize("result", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(result, threads):
    arguments = group_arguments(
        random_groups(random.Random(1), 30), [torch.float32, torch.bfloat16, torch.float32, result]
    )
    a, b, d, *rest, _ = arguments
    results = []

    for count in (1, 2, 4):
        threads(count)
        squares = torch.ops.prelora_C.grouped_squares(a, b, d, *rest)
        results.append([*grouped_gemm(*arguments), squares])

    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@extension
def test_every_instruction_set_computes_the_same_function(set_isa):
    arguments = group_arguments(
        random_groups(random.Random(2), 40), [torch.bfloat16, torch.float16, torch.float32, torch.float32]
    )
    served = []

    for name in ("generic", "avx2", "avx512"):
        if set_isa(name):
            served.append(torch.ops.prelora_C.isa())
            assert_right(grouped_gemm(*arguments), arguments)

    assert not set_isa("none")
    assert served[0] == "generic"


@providers
def test_without_d_nothing_is_added(provider):
    a, b, _, alpha, _, *rest = group_arguments(GROUPS["every layout"], [torch.float32] * 4)

    with use_provider(provider):
        actual = grouped_gemm(a, b, [], alpha, [], *rest)
        assert grouped_gemm([], [], [], [], [], [], [], torch.float32) == []

    zeros = [torch.zeros_like(c) for c in actual]
    assert_right(actual, [a, b, zeros, alpha, [1.0] * len(a), *rest])


# Written in place


@providers
def test_d_may_be_the_output_itself(provider):
    a, b, d, *rest, dtype = group_arguments(GROUPS["every layout"], [torch.float32] * 4)
    expected = grouped_gemm.reference(a, b, d, *rest, dtype)
    out = [x.clone() for x in d]

    with use_provider(provider):
        assert grouped_gemm_(a, b, out, out, *rest) is None

    for mine, right in zip(out, expected, strict=True):
        torch.testing.assert_close(mine, right)


@providers
def test_rows_and_columns_of_one_tensor_are_outputs_side_by_side(provider):
    whole = torch.full((12, 20), 7.0)
    out = [whole[:5, :9], whole[:5, 9:18], whole[5:11, :20]]
    a = [torch.ones(5, 2), torch.ones(5, 2), torch.ones(6, 2)]
    b = [torch.ones(2, 9), torch.ones(2, 9), torch.ones(2, 20)]

    with use_provider(provider):
        grouped_gemm_(a, b, [], out, [0.5, 1.0, 1.5], [], [False] * 3, [False] * 3)

    expected = torch.full((12, 20), 7.0)
    expected[:5, :9], expected[:5, 9:18], expected[5:11] = 1.0, 2.0, 3.0
    assert torch.equal(whole, expected)


@providers
def test_autograd_sees_that_an_output_was_written(provider):
    leaf = torch.ones(2, 2, requires_grad=True)
    saved = torch.ones(2, 2)
    y = (leaf * saved).sum()

    with use_provider(provider):
        grouped_gemm_([torch.ones(2, 1)], [torch.ones(1, 2)], [], [saved], [1.0], [], [False], [False])

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# Refusals: one sentence each, and nothing is written


def groups(**changes):
    """Arguments of three groups C_i [4, 5] = D_i + A_i [4, 3] · B_i [3, 5], of which some are replaced by index."""
    named = {
        "a": [torch.ones(4, 3) for _ in range(3)],
        "b": [torch.ones(3, 5) for _ in range(3)],
        "d": [torch.ones(4, 5) for _ in range(3)],
        "out": [torch.full((4, 5), 7.0) for _ in range(3)],
        "alpha": [1.0] * 3,
        "beta": [1.0] * 3,
        "trans_a": [False] * 3,
        "trans_b": [False] * 3,
    }
    return [[changes.get(name, {}).get(i, value) for i, value in enumerate(values)] for name, values in named.items()]


NAN = float("nan")
UNFIT = {
    "inner sizes": ({"b": {2: torch.ones(2, 5)}}, r"group 2: op\(A\) is \[4, 3\] and op\(B\) \[2, 5\]: 3 is not 2"),
    "transposed": ({"trans_a": {1: True}}, r"group 1: op\(A\) is \[3, 4\] and op\(B\) \[3, 5\]: 4 is not 3"),
    "shape of D": ({"d": {0: torch.ones(5, 4)}}, r"group 0: D is \[5, 4\], the product \[4, 5\]"),
    "shape of C": ({"out": {1: torch.ones(4, 6)}}, r"group 1: C is \[4, 6\], the product \[4, 5\]"),
    "vector": ({"a": {1: torch.ones(3)}}, r"group 1: A is \[3\], not a matrix"),
    "rank 0": ({"a": {1: torch.ones(4, 0)}, "b": {1: torch.ones(0, 5)}}, "group 1: rank 0"),
    "dtype": ({"a": {1: torch.ones(4, 3).half()}}, "group 1: A is torch.float16, that of group 0 torch.float32"),
    "rows": ({"b": {2: torch.ones(5, 3).t()}}, r"group 2: B's rows are not contiguous: \[3, 5\], \(1, 3\)"),
    "rows of C": ({"out": {0: torch.ones(5, 4).t()}}, "group 0: C's rows are not contiguous"),
    "NaN in alpha": ({"alpha": {2: NAN}}, "group 2: alpha is nan"),
    "NaN in beta": ({"beta": {0: NAN}}, "group 0: beta is nan"),
    "C over itself": ({"out": {1: torch.ones(1, 5).expand(4, 5)}}, r"group 1: C overlaps itself: \[4, 5\], strides"),
}


def overlapping():
    """Cases with a matrix [12, 12] of sevens of their own."""

    def case(name, changes, message):
        return pytest.param(changes(torch.full((12, 12), 7.0)), message, id=name)

    yield case("rows", lambda x: {"out": {0: x[:4, :5], 2: x[3:7, :5]}}, "C of group 0 and C of group 2")
    yield case("columns", lambda x: {"out": {0: x[:4, :5], 2: x[:4, 4:9]}}, "C of group 0 and C of group 2")
    yield case(
        "columns around the edge",
        lambda x: {"out": {0: x[:5, :5][:4], 1: x.view(-1)[8:56].view(4, 12)[:, :5]}},
        "C of group 0 and C of group 1",
    )
    yield case("rows of another length", lambda x: {"out": {0: x[:4, :5], 1: x.view(-1)[5:25].view(4, 5)}}, "C of")
    yield case("one output twice", lambda x: {"out": {0: x[:4, :5], 1: x[:4, :5]}}, "C of group 0 and C of group 1")
    yield case(
        "part of its D", lambda x: {"out": {1: x[1:5, :5]}, "d": {1: x[:4, :5]}}, "D of group 1 and C of group 1"
    )
    yield case("another D", lambda x: {"out": {1: x[:4, :5]}, "d": {2: x[:4, :5]}}, "C of group 1 and D of group 2")
    yield case("an A", lambda x: {"out": {1: x[:4, :5]}, "a": {0: x[2:6, 1:4]}}, "C of group 1 and A of group 0")
    yield case("its B", lambda x: {"out": {1: x[:4, :5]}, "b": {1: x.view(-1)[:15].view(3, 5)}}, "B of group 1")


@providers
@pytest.mark.parametrize(("changes", "message"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_refused_with_its_group(changes, message, provider):
    arguments = groups(**changes)
    before = [out.clone() for out in arguments[3]]

    with use_provider(provider), pytest.raises(ValueError, match=message):
        grouped_gemm_(*arguments)

    assert all(map(torch.equal, arguments[3], before))


@providers
@pytest.mark.parametrize(("changes", "message"), list(overlapping()))
def test_outputs_that_overlap_anything_are_refused(changes, message, provider):
    arguments = groups(**changes)

    with use_provider(provider), pytest.raises(ValueError, match=message) as error:
        grouped_gemm_(*arguments)

    assert str(error.value).endswith("overlap in memory")
    assert all((out == 7).all() for out in arguments[3])


def test_another_device_is_refused_with_its_group():
    with pytest.raises(ValueError, match="group 2: B is on meta, A of group 0 on cpu"):
        grouped_gemm_.reference(*groups(b={2: torch.ones(3, 5, device="meta")}))


@providers
@pytest.mark.parametrize("short", ["a", "b", "d", "out", "alpha", "beta", "trans_a", "trans_b"])
def test_lists_of_different_lengths_are_refused(short, provider):
    names = ["a", "b", "d", "out", "alpha", "beta", "trans_a", "trans_b"]
    arguments = [values[:2] if name == short else values for name, values in zip(names, groups(), strict=True)]

    with use_provider(provider), pytest.raises(ValueError, match=rf"\b2 {short}\b"):
        grouped_gemm_(*arguments)


@extension
def test_the_core_itself_reads_and_writes_nothing_beside_its_tensors():
    for changes, message in UNFIT.values():
        if not message.startswith(("group 2: alpha", "group 0: beta", "group 1: C overlaps")):
            with pytest.raises((ValueError, IndexError), match=r"group \d"):
                torch.ops.prelora_C.grouped_gemm_(*groups(**changes))


@extension
def test_the_extension_says_that_it_has_no_float64():
    arguments = group_arguments(GROUPS["one element"], [torch.float64] * 4)

    assert grouped_gemm.chosen(*arguments) == REFERENCE
    with use_provider("cpu"), pytest.raises(ProviderError, match=r"float64 is not built into prelora\._C"):
        grouped_gemm(*arguments)


# Gradients


def leaves_of(arguments, need=(True, True, True)):
    *tensors, alpha, beta, trans_a, trans_b, dtype = arguments
    leaves = [[x.clone().requires_grad_(n) for x in group] for group, n in zip(tensors, need, strict=True)]
    return leaves, [alpha, beta, trans_a, trans_b, dtype]


def small(dtype, trailing=torch.float64):
    cases = [
        GroupCase(3, 2, 4, *layout, alpha=-0.5, beta=beta)
        for layout, beta in zip(LAYOUTS, (1, 0.5, -1, 2), strict=True)
    ]
    return group_arguments([*cases, GroupCase(0, 2, 3)], [dtype, dtype, dtype, trailing])


def test_gradcheck_twice():
    leaves, rest = leaves_of(small(torch.float64))
    count = len(leaves[0])

    def function(*flat):
        return tuple(grouped_gemm(flat[:count], flat[count : 2 * count], flat[2 * count :], *rest))

    flat = [leaf for group in leaves for leaf in group]
    assert torch.autograd.gradcheck(function, flat)
    assert torch.autograd.gradgradcheck(function, flat)


@extension
@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_gradients_of_the_extension_are_the_references(need):
    arguments = group_arguments(GROUPS["every layout"], [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16])
    gradients = []

    for provider in ("cpu", REFERENCE):
        leaves, rest = leaves_of(arguments, map(bool, need))
        wanted = [leaf for group in leaves for leaf in group if leaf.requires_grad]
        with use_provider(provider):
            products = grouped_gemm(*leaves, *rest)
            gradients.append(torch.autograd.grad(sum(c.float().square().sum() for c in products), wanted))

    for mine, right in zip(*gradients, strict=True):
        assert mine.dtype == right.dtype
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=2e-2)


def test_gradients_without_d():
    (a, b, _), (alpha, _, *rest) = leaves_of(small(torch.float64))

    products = grouped_gemm(a, b, [], alpha, [], *rest)

    assert all(x.grad is None for x in a)
    sum(c.sum() for c in products).backward()
    assert all(x.grad.shape == x.shape for x in [*a, *b])


# On it: merging and its gradients, and the norms of what is merged


LAYERS = [LinearCase(1, 70 + rank, (60, 33), (rank, 129 - rank)) for rank in (1, 2, 3, 7, 8, 15, 16, 31, 64, 100, 128)]


@extension
@pytest.mark.parametrize("wide", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_at_any_rank_is_one_rounding_of_a_wide_sum_and_so_are_its_gradients(dtype, wide):
    arguments = merge_arguments(LAYERS, dtype, wide)
    *rest, _ = arguments
    exact = lora_merge.reference(*doubles(arguments))

    with use_provider("grouped"):
        merged = lora_merge(*arguments)
        gradients = lora_merge_backward([m.to(dtype) for m in merged], *rest[1:])

    for mine, right in zip(merged, exact, strict=True):
        assert ((mine.double() - right).abs() <= HALF_STEP[dtype] * right.abs() + 3e-6).all()
    exact = doubles([merged, *rest[1:], None])[:-1]
    expected = lora_merge_backward.reference(*exact)
    sizes = lora_merge_backward.reference(*([x.abs() for x in tensors] for tensors in exact[:3]), *exact[3:])
    for mine, right, size in zip(gradients, expected, sizes, strict=True):
        # By a 16-bit dW, A and B are rounded as well.
        factor = HALF_STEP[dtype] if dtype != torch.float32 else 1e-6
        assert mine.dtype == wide
        assert ((mine.double() - right).abs() <= HALF_STEP[wide] * right.abs() + factor * size + 6e-8).all()


@extension
def test_layers_of_different_dtypes_and_layouts_are_merged_and_measured_in_order():
    weights, lora_a, lora_b, *rest, _ = merge_arguments(LAYERS[:4], torch.float32, torch.float32)
    weights[1], lora_a[1], lora_b[1] = weights[1].half(), lora_a[1].bfloat16(), lora_b[1].bfloat16()
    weights[2], lora_a[2] = weights[2].t().contiguous().t(), lora_a[2].t().contiguous().t()
    arguments = [weights, lora_a, lora_b, *rest]

    with use_provider("grouped"):
        merged = lora_merge(*arguments, torch.float32)
    with use_provider("cpu"):
        norms = merged_norms(*arguments, False)

    exact = doubles([*arguments, None])[:-1]
    for mine, right in zip(merged, lora_merge.reference(*exact, torch.float64), strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine.double(), right, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(norms.double(), merged_norms.reference(*exact, False), rtol=1e-6, atol=0)


@extension
def test_a_rank_of_zero_is_left_to_others():
    arguments = merge_arguments([LinearCase(1, 8, (4, 4), (2, 0), scaling=(1.0, 1.0))], torch.float32, torch.float32)

    assert lora_merge.chosen(*arguments) == "cpu"
    with use_provider("grouped"), pytest.raises(ProviderError, match="slice 1 has rank 0"):
        lora_merge(*arguments)
