"""``kernels/lora_merge.py`` in Triton's interpreter: many layers' W + s·B·A and its gradients against float64."""

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels are Triton's")

from prelora.kernels import lora_merge as kernels
from prelora.kernels import table

from prelora.ops.slices import by_layer, lora_delta

RANKS = (1, 2, 3, 7, 8, 12, 16, 24, 32, 48, 64, 100, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-7}
"""Half an ulp, relative; a whole one for bf16, to which the interpreter truncates instead of rounding."""

sizes = st.one_of(st.integers(1, 66), st.sampled_from((72, 96, 128, 129)))
slices = st.lists(st.tuples(sizes, st.one_of(st.integers(1, 128), st.sampled_from(RANKS))), min_size=1, max_size=3)
layers = st.lists(st.tuples(sizes, slices), min_size=1, max_size=3)
"""Of each layer: in features, and rows and rank of each slice."""


def draw_model(layers, dtype=torch.float32, lora_dtype=torch.float32, *, seed=0):
    """The arguments of ``lora_merge`` but its dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    weights = [draw(sum(rows for rows, _ in cut), k).to(dtype) for k, cut in layers]
    lora_a = [draw(sum(rank for _, rank in cut), k).to(lora_dtype) for k, cut in layers]
    lora_b = [draw(sum(rows * rank for rows, rank in cut)).to(lora_dtype) for k, cut in layers]
    flat = [one for _, cut in layers for one in cut]
    counts = [len(cut) for _, cut in layers]
    scaling = [2.0 / rank for _, rank in flat]
    return weights, lora_a, lora_b, counts, [rows for rows, _ in flat], [rank for _, rank in flat], scaling


def exact(weights, lora_a, lora_b, counts, rows, ranks, scaling):
    """W_eff and, from random dW, the gradients of A and B by autograd, all in float64; with dW."""
    a64 = [a.double().requires_grad_() for a in lora_a]
    b64 = [b.double().requires_grad_() for b in lora_b]
    cut = by_layer(counts, rows, ranks, scaling)
    deltas = [lora_delta(a, b, *layer) for a, b, layer in zip(a64, b64, cut, strict=True)]
    merged = [w.double() + delta.detach() for w, delta in zip(weights, deltas, strict=True)]
    grads = [torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(w.dtype) for w in weights]
    torch.autograd.backward(deltas, [grad.double() for grad in grads])
    return merged, grads, [t.grad for pair in zip(a64, b64, strict=True) for t in pair]


def assert_close(actual, expected, dtype, terms):
    """Within the rounding of the result and the sum's own in fp32, whose terms are of order 1."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    allowed = ROUNDING[dtype] * expected.abs() + 2**-22 * math.sqrt(terms) * max(1.0, float(expected.abs().max()))
    assert bool((error <= allowed).all()), f"off by {float((error / allowed).max()):.2f} times what is allowed"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a launcher allocates is NaN until a kernel writes it."""

    def filled_with_nan(allocate):
        def allocated(*args, **kwargs):
            made = allocate(*args, **kwargs)
            return made.fill_(math.nan) if made.is_floating_point() else made

        return allocated

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled_with_nan(getattr(owner, name)))


@given(layers, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
@settings(max_examples=30, deadline=None)
def test_merges_many_layers_of_any_shape_and_rank(layers, dtype, lora_dtype, out_dtype):
    model = draw_model(layers, dtype, lora_dtype)
    merged, _, _ = exact(*model)
    terms = max(model[5])
    for actual, expected in zip(kernels.lora_merge(*model, out_dtype), merged, strict=True):
        assert actual.is_contiguous()
        assert_close(actual, expected, out_dtype, terms)


@given(layers, st.sampled_from(DTYPES), st.sampled_from(DTYPES))
@settings(max_examples=25, deadline=None)
def test_gradients_are_those_of_autograd_in_float64(layers, dtype, lora_dtype):
    model = draw_model(layers, dtype, lora_dtype)
    _, grads, adapters = exact(*model)
    terms = max(*model[4], *(w.shape[1] for w in grads))
    for actual, expected in zip(kernels.lora_merge_backward(grads, *model[1:]), adapters, strict=True):
        assert_close(actual, expected, lora_dtype, terms)


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_alone(rank):
    model = draw_model([(70, [(66, rank)])])
    merged, grads, adapters = exact(*model)
    assert_close(kernels.lora_merge(*model, torch.float32)[0], merged[0], torch.float32, rank)
    for actual, expected in zip(kernels.lora_merge_backward(grads, *model[1:]), adapters, strict=True):
        assert_close(actual, expected, torch.float32, 70)


def test_ranks_beyond_the_widest_tile_take_several_programs():
    model = draw_model([(40, [(33, 200)])])
    merged, grads, adapters = exact(*model)
    assert_close(kernels.lora_merge(*model, torch.float32)[0], merged[0], torch.float32, 200)
    for actual, expected in zip(kernels.lora_merge_backward(grads, *model[1:]), adapters, strict=True):
        assert_close(actual, expected, torch.float32, 40)


@pytest.mark.parametrize("view", ["row stride", "transposed", "offset by one element"])
def test_strided_and_misaligned_tensors(view):
    model = draw_model([(64, [(48, 8), (16, 24)])])
    merged, grads, adapters = exact(*model)

    def strided(tensor):
        if view == "row stride":
            return torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]
        if view == "transposed":
            return tensor.t().contiguous().t()
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    weights, others = [strided(w) for w in model[0]], ([strided(a) for a in model[1]], *model[2:])
    assert_close(kernels.lora_merge(weights, *others, torch.float32)[0], merged[0], torch.float32, 24)
    for actual, expected in zip(
        kernels.lora_merge_backward([strided(grad) for grad in grads], *others), adapters, strict=True
    ):
        assert_close(actual, expected, torch.float32, 64)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("broken", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_stay_in_their_slice(broken, value):
    cut = [(40, 5), (30, 12), (20, 3)]
    weights, lora_a, lora_b, *layout = draw_model([(48, cut)])
    grads = [weights[0].clone()]
    rows = [0, 40, 70, 90][broken : broken + 2]
    ranks = [0, 5, 17, 20][broken : broken + 2]
    elements = [0, 200, 560, 620][broken : broken + 2]
    lora_a[0][slice(*ranks)] = lora_b[0][slice(*elements)] = grads[0][slice(*rows)] = value
    (merged,) = kernels.lora_merge(weights, lora_a, lora_b, *layout, torch.float32)
    grad_a, grad_b = kernels.lora_merge_backward(grads, lora_a, lora_b, *layout)
    for actual, (start, end) in ((merged, rows), (grad_a, ranks), (grad_b, elements)):
        finite = actual.view(len(actual), -1).isfinite()
        assert not finite[start:end].any()
        assert bool(finite[:start].all())
        assert bool(finite[end:].all())


def test_shape_of_packed_b_is_that_of_its_gradient():
    weights, lora_a, lora_b, *cut = draw_model([(24, [(30, 4)])])
    gradients = kernels.lora_merge_backward(weights, lora_a, [lora_b[0].view(30, 4)], *cut)
    assert [grad.shape for grad in gradients] == [(4, 24), (30, 4)]


def test_layers_without_elements():
    assert kernels.lora_merge([], [], [], [], [], [], [], torch.float32) == []
    assert kernels.lora_merge_backward([], [], [], [], [], [], []) == []
    model = draw_model([(0, [(5, 2)]), (8, [(0, 3)]), (16, [(16, 4)])])
    merged = kernels.lora_merge(*model, torch.float32)
    assert [tuple(w.shape) for w in merged] == [(5, 0), (0, 8), (16, 16)]
    gradients = kernels.lora_merge_backward(model[0], *model[1:])
    assert [tuple(grad.shape) for grad in gradients] == [(2, 0), (10,), (3, 8), (0,), (4, 16), (64,)]
    assert not torch.cat([grad.flatten() for grad in gradients[:4]]).any(), "a sum over nothing is 0"


def test_equal_inputs_give_equal_bits():
    model = draw_model([(130, [(70, 16), (9, 3)]), (64, [(64, 40)])])
    first = [*kernels.lora_merge(*model, torch.bfloat16), *kernels.lora_merge_backward(model[0], *model[1:])]
    again = [*kernels.lora_merge(*model, torch.bfloat16), *kernels.lora_merge_backward(model[0], *model[1:])]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_inputs_are_left_alone():
    model = draw_model([(70, [(70, 16), (9, 3)])])
    before = [t.clone() for tensors in model[:3] for t in tensors]
    kernels.lora_merge(*model, torch.bfloat16)
    kernels.lora_merge_backward(model[0], *model[1:])
    assert all(torch.equal(a, b) for a, b in zip(before, [t for ts in model[:3] for t in ts], strict=True))


def test_values_read_are_those_of_the_moment():
    weights, lora_a, lora_b, *cut = draw_model([(32, [(32, 4)])])
    for _ in range(3):
        merged, _, _ = exact(weights, lora_a, lora_b, *cut)
        assert_close(kernels.lora_merge(weights, lora_a, lora_b, *cut, torch.float32)[0], merged[0], torch.float32, 4)
        lora_a[0].data.add_(1.0)


def test_a_tensor_that_moves_or_dies_is_not_read_where_it_was():
    weights, lora_a, lora_b, *cut = draw_model([(32, [(32, 4)]), (40, [(8, 8)])])
    for round_ in range(4):
        kernels.lora_merge(weights, lora_a, lora_b, *cut, torch.float32)
        old = weights[round_ % 2]
        weights[round_ % 2] = torch.randn(old.shape, generator=torch.Generator().manual_seed(round_))
        old.fill_(math.nan)
        del old
        gc.collect()
        merged, _, _ = exact(weights, lora_a, lora_b, *cut)
        actual = kernels.lora_merge(weights, lora_a, lora_b, *cut, torch.float32)
        for one, expected in zip(actual, merged, strict=True):
            assert_close(one, expected, torch.float32, 8)


def test_tables_are_kept_for_equal_contents_and_bounded():
    table._copy.cache_clear()
    device = torch.device("cpu")
    first = table.device_table([(1, 2), (3, 4)], device)
    assert table.device_table([(1, 2), (3, 4)], device) is first
    assert table.device_table([(1, 2), (3, 5)], device) is not first
    assert table.device_tiles((1, 2), device) is not table.device_table([(1, 2)], device)
    for i in range(3 * table.CACHED_COPIES):
        table.device_table([(i,)], device)
    assert table._copy.cache_info().currsize == table.CACHED_COPIES


@given(st.lists(st.integers(0, 50), max_size=20))
def test_tile_pairs_name_every_tile_of_every_problem_once_and_in_order(counts):
    pairs = table.tile_pairs(counts)
    assert pairs.dtype == torch.int32
    assert pairs.tolist() == [[problem, tile] for problem, count in enumerate(counts) for tile in range(count)]


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 130))
@settings(deadline=None)
def test_tiles_cover_every_element_once(rows, k, rank):
    merge = kernels.merge_config(torch.float32, torch.float32)
    grad_a = kernels.grad_a_config(rank, torch.float32, torch.float32)
    grad_b = kernels.grad_b_config(rank, torch.float32, torch.float32)
    for (height, block_h), (width, block_w), tiles in (
        ((rows, merge.block_n), (k, merge.block_k), kernels.merge_tiles(rows, k, merge)),
        ((k, grad_a.block_k), (rank, grad_a.block_r), kernels.grad_a_tiles(k, rank, grad_a)),
        ((rows, grad_b.block_n), (rank, grad_b.block_r), kernels.grad_b_tiles(rows, rank, grad_b)),
    ):
        written = torch.zeros(height, width)
        for tile in range(tiles):  # as the kernels number them: tile // across is down, tile % across is across
            across = -(-width // block_w)
            down, right = tile // across * block_h, tile % across * block_w
            written[down : down + block_h, right : right + block_w] += 1
        assert bool((written == 1).all())


def test_launches_are_one_for_each_alignment_and_dtype(monkeypatch):
    launched = []
    run = table.GroupedLaunches.run

    def counted(self, device):
        launched.append(len(self.groups))
        run(self, device)

    monkeypatch.setattr(table.GroupedLaunches, "run", counted)
    aligned = draw_model([(64, [(64, 8), (32, 16), (16, 24)]), (128, [(32, 64)])])
    kernels.lora_merge(*aligned, torch.bfloat16)
    kernels.lora_merge_backward(aligned[0], *aligned[1:])
    kernels.lora_merge(*draw_model([(64, [(64, 8)]), (63, [(8, 8)]), (64, [(64, 3)])]), torch.bfloat16)
    assert launched == [1, 4, 3]


def test_traffic_counts_whole_tensors_and_each_tiles_share_of_a_and_b():
    shapes = {"slices": [2], "rows": [64, 65], "ranks": [8, 3]}
    tensors = torch.empty(129, 100, device="meta"), torch.empty(11, 100, device="meta")
    a_and_b = (8 * 100 + 3 * 100 * 2) + (8 * 64 * 2 + 3 * 65 * 2)
    expected = 129 * 100 * (4 + 2) + 4 * a_and_b
    assert kernels.traffic([tensors[0]], [tensors[1]], **shapes, dtype=torch.bfloat16) == expected
    read_twice_written_once = (8 * 64 + 3 * 65) * 3 + 8 * 100 * 2 + 3 * 100 * 3
    expected = 2 * 129 * 100 * 4 + 4 * read_twice_written_once
    assert kernels.backward_traffic([tensors[0]], [tensors[1]], **shapes) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[4].__setitem__(0, 31), r"slices of 31 rows and rank 4 .* got \[32, 16\], \[4, 16\] and 128"),
        (lambda m: m[5].__setitem__(0, 5), "slices of 32 rows and rank 5"),
        (lambda m: m[6].append(1.0), "1 slices in all need as many rows, ranks and scalings, got 1, 1 and 2"),
        (lambda m: m[1].__setitem__(0, m[1][0].half()), "A and B of one dtype"),
        (lambda m: m[1].__setitem__(0, m[1][0].to("meta")), "all layers on one device, not .* cpu, meta"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    model = draw_model([(16, [(32, 4)])])
    change(model)
    with pytest.raises(ValueError, match=message):
        kernels.lora_merge(*model, torch.float32)


def test_dtypes_without_a_kernel_are_refused():
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        kernels.lora_merge(*draw_model([(16, [(32, 4)])]), torch.float64)
