"""``LoRALinear`` computes x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ per row slice, and stands in for ``nn.Linear`` everywhere."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from prelora.nn import LoRALinear
from prelora.ops.dropout import keep_mask
from prelora.ops.slices import lora_delta

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative to the largest element: about √in roundings; in half precision h itself is rounded, too."""

SLICES = {
    "r1": (40, None, 1),
    "r3": (40, None, 3),
    "r8": (40, None, 8),
    "r64": (80, None, 64),
    "qkv 4": (48, (16, 16, 16), 4),
    "qkv 3 12 1": (48, (16, 16, 16), (3, 12, 1)),
    "rows 7 33": (40, (7, 33), (8, 2)),
}


def layer(slices="qkv 3 12 1", dtype=torch.float32, *, seed=0, **options):
    """A trained layer: B is not zero."""
    out_features, rows, rank = SLICES[slices]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LoRALinear(24, out_features, rank=rank, rows=rows, dtype=dtype, **options)
        nn.init.normal_(made.lora_B, std=0.3)
    return made


def draw(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters64(module):
    """Leaf copies of W, b, A and every slice's B in float64, B cut by hand."""
    leaves = {name: p.detach().to(torch.float64, copy=True).requires_grad_() for name, p in module.named_parameters()}
    blocks, start = [], 0
    for rows, rank in zip(module.rows, module.rank, strict=True):
        blocks.append(leaves["lora_B"].flatten()[start : start + rows * rank].reshape(rows, rank))
        start += rows * rank
    return leaves, blocks


def formula(module, x, x_lora=None):
    """The definition in float64, one slice at a time; returns y and the leaves."""
    leaves, blocks = parameters64(module)
    y, updates, start = F.linear(x, leaves["weight"], leaves.get("bias")), [], 0
    for b, rank in zip(blocks, module.rank, strict=True):
        a = leaves["lora_A"][start : start + rank]
        scaling = 1 if module.alpha is None else module.alpha / rank
        updates.append(scaling * (x if x_lora is None else x_lora) @ (b @ a).T)
        start += rank
    return y + torch.cat(updates, dim=-1), leaves


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    error = (actual.double() - expected).abs().max() if expected.numel() else 0
    assert error <= TOLERANCE[dtype] * (expected.abs().max() if expected.numel() else 1)


def assert_computes_the_formula(module, x, dtype):
    x.requires_grad_()
    reference = x.detach().double().requires_grad_()
    dy = draw(*x.shape[:-1], module.out_features, dtype=dtype, seed=2)
    y = module(x)
    expected, leaves = formula(module, reference)
    y.backward(dy)
    expected.backward(dy.double())

    assert_close(y, expected, dtype)
    assert_close(x.grad, reference.grad, dtype)
    for name, parameter in module.named_parameters():
        assert_close(parameter.grad, leaves[name].grad, dtype)


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients_are_the_formulas(slices, dtype):
    assert_computes_the_formula(layer(slices, dtype), draw(17, 24, dtype=dtype), dtype)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (3, 5, 24), (2, 3, 5, 24)], ids=str)
def test_any_leading_shape_is_taken(shape):
    assert_computes_the_formula(layer(), draw(*shape), torch.float32)


@pytest.mark.parametrize("slices", ["r3", "qkv 3 12 1"])
@pytest.mark.parametrize("alpha", [16.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_alpha_scales_each_slice_by_its_own_rank_with_or_without_bias(slices, alpha, bias):
    assert_computes_the_formula(layer(slices, alpha=alpha, bias=bias), draw(9, 24), torch.float32)


def test_non_contiguous_input_makes_no_difference():
    assert_computes_the_formula(layer(), draw(24, 10).T, torch.float32)


def test_the_weight_update_is_the_slices_products_stacked():
    a, b = draw(3, 4, dtype=torch.float64), draw(1 * 2 + 2 * 3, dtype=torch.float64)

    delta = lora_delta(a, b, rows=(2, 3), ranks=(1, 2), scaling=(2.0, 0.5))

    assert torch.equal(delta, torch.cat([2.0 * b[:2, None] @ a[:1], 0.5 * b[2:].view(3, 2) @ a[1:]]))


def test_a_new_layer_computes_what_its_linear_does_bit_for_bit():
    made, x = LoRALinear(24, 48, rank=(4, 2, 8), rows=(16,) * 3), draw(7, 24)

    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))


def test_a_is_kaiming_uniform_and_b_zero():
    made = LoRALinear(4096, 8, rank=16, device="cpu")

    bound = 1 / 4096**0.5
    assert 0.99 * bound < made.lora_A.abs().max() <= bound
    assert abs(made.lora_A.mean()) < 0.02 * bound
    assert not made.lora_B.any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_drawn_from_a_generator_is_the_same_in_every_dtype(dtype):
    first, made = LoRALinear(24, 8, rank=4), LoRALinear(24, 8, rank=4, dtype=dtype)
    before = torch.get_rng_state()
    for each in (first, made):
        each.reset_lora_parameters(torch.Generator().manual_seed(5))

    assert torch.equal(made.lora_A, first.lora_A.to(dtype))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("merged", [False, True])
def test_a_linears_constructor_arguments_and_state_dict_are_taken(merged):
    arguments = (24, 40, True, "cpu", torch.float64)
    linear, made = nn.Linear(*arguments), LoRALinear(*arguments, rank=4)
    x = draw(5, 24, dtype=torch.float64)
    if merged:
        made.merge()

    made.load_state_dict(linear.state_dict(), strict=True)

    assert not made.merged
    assert torch.equal(made(x), linear(x))


def test_a_trained_adapter_is_missing_from_a_linears_state_dict():
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "lora_A", "lora_B"'):
        layer("r3").load_state_dict(nn.Linear(24, 40).state_dict())


def test_half_an_adapter_is_missing_the_other_half():
    made = LoRALinear(24, 40, rank=3)
    state = made.state_dict()
    del state["lora_A"]

    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "lora_A"\.'):
        made.load_state_dict(state)


def test_a_missing_weight_is_reported_all_the_same():
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"\.'):
        LoRALinear(24, 40, rank=3).load_state_dict({"bias": torch.zeros(40)})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_compute_the_same_and_share_nothing(copied, merged):
    made, x = layer(alpha=8.0).eval(), draw(3, 24)
    if merged:
        made.merge()
    other = copied(made)
    before = other(x)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()

    assert torch.equal(other(x), before)
    assert before.any()


def test_from_linear_takes_over_the_very_parameters_and_the_mode():
    linear = nn.Linear(24, 40, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)

    made = LoRALinear.from_linear(linear, 4, alpha=2.0, dropout=0.1)

    assert made.weight is linear.weight
    assert made.bias is linear.bias
    assert not made.training
    assert [made.lora_A.dtype, made.lora_B.dtype] == [torch.bfloat16] * 2
    assert made.lora_A.requires_grad
    assert made.lora_B.requires_grad
    assert (made.alpha, made.dropout, made.scaling) == (2.0, 0.1, (0.5,))


def test_from_linear_without_bias():
    linear, x = nn.Linear(24, 40, bias=False), draw(3, 24)

    made = LoRALinear.from_linear(linear, (4, 2), rows=(10, 30))

    assert made.bias is None
    assert torch.equal(made(x), linear(x))


def test_from_linear_draws_from_the_generator_alone():
    linear, before = nn.Linear(24, 40), torch.get_rng_state()

    made = LoRALinear.from_linear(linear, 4, generator=torch.Generator().manual_seed(3))
    again = LoRALinear.from_linear(linear, 4, generator=torch.Generator().manual_seed(3))

    assert torch.equal(made.lora_A, again.lora_A)
    assert torch.equal(torch.get_rng_state(), before)


def test_from_linear_takes_over_hooks_and_their_handles():
    linear, calls = nn.Linear(24, 40), []
    handles = [
        linear.register_forward_hook(lambda *_: calls.append("forward")),
        linear.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True),
        linear.register_full_backward_hook(lambda module, dx, dy: calls.append(["backward", dx[0].shape, dy[0].shape])),
        linear.register_state_dict_post_hook(lambda *_: calls.append("state")),
    ]
    made = LoRALinear.from_linear(linear, 4)

    made(draw(3, 24).requires_grad_()).sum().backward()
    made.state_dict()
    for handle in handles:
        handle.remove()
    made(draw(3, 24)).sum().backward()
    made.state_dict()

    assert calls == ["pre", "forward", ["backward", (3, 24), (3, 40)], "state"]


@pytest.mark.parametrize("slices", ["r3", "qkv 3 12 1"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_merged_it_computes_the_same(slices, dtype):
    made, x = layer(slices, dtype, alpha=4.0).eval(), draw(9, 24, dtype=dtype)
    expected, leaves = formula(made, x.double())
    made.merge()

    with torch.no_grad():
        assert_close(made(x), expected, dtype)
    assert_close(made.delta_weight().to(dtype), made.merged_weight().double() - leaves["weight"], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_merged_weight_is_summed_before_it_is_rounded(dtype):
    made = layer(dtype=dtype)
    _, blocks = parameters64(made)
    a = made.lora_A.double().split(made.rank)
    exact = made.weight.double() + torch.cat([b @ part for b, part in zip(blocks, a, strict=True)])

    error = (made.merged_weight().double() - exact).abs()

    # Half a unit in the last place, and fp32's own noise in the sum.
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * (dtype != torch.float64)).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_unmerge_gives_the_base_back_bit_for_bit(dtype):
    made, x = layer(dtype=dtype).eval(), draw(3, 24, dtype=dtype)
    weight, base, y = made.weight, made.weight.detach().clone(), made(x)
    made.merge()
    assert not torch.equal(made.weight, base)
    made.unmerge()

    assert made.weight is weight
    assert torch.equal(made.weight, base)
    assert torch.equal(made(x), y)
    assert not made.merged


def test_a_state_dict_holds_the_base_weight_whether_merged_or_not():
    made = layer()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.merge()

    assert list(made.state_dict()) == list(before) == ["weight", "bias", "lora_A", "lora_B"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


def test_loading_into_a_merged_layer_unmerges_it():
    made, other, x = layer(seed=0), layer(seed=1), draw(3, 24)
    made.merge()
    made.load_state_dict(other.state_dict())

    assert not made.merged
    assert torch.equal(made(x), other(x))


def test_a_merged_layer_refuses_to_train_but_evaluates():
    made, x = layer(), draw(3, 24)
    made.merge()

    with pytest.raises(RuntimeError, match=r"cannot train .* call unmerge\(\) first"):
        made(x)
    with torch.no_grad():
        assert torch.equal(made(x), made.eval()(x))


@pytest.mark.parametrize(("calls", "message"), [(["merge", "merge"], "merged already"), (["unmerge"], "is not merged")])
def test_merging_or_unmerging_twice_is_refused(calls, message):
    made = layer()

    with pytest.raises(RuntimeError, match=message):
        [getattr(made, call)() for call in calls]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_to_linear_is_a_plain_linear_of_the_same_function(merged, bias):
    made, x = layer(bias=bias).eval(), draw(3, 24)
    made.weight.requires_grad_(False)
    expected, _ = formula(made, x.double())
    if merged:
        made.merge()

    linear = made.to_linear()

    assert type(linear) is nn.Linear
    assert linear.bias is made.bias
    assert (linear.training, linear.weight.requires_grad) == (False, False)
    assert linear.weight.data_ptr() != made.weight.data_ptr()
    assert_close(linear(x), expected, torch.float32)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 4}, "in_features=24, out_features=48, bias=True, rank=4"),
        ({"rank": 4, "alpha": 8.0, "bias": False}, "in_features=24, out_features=48, bias=False, rank=4, alpha=8.0"),
        (
            {"rank": (1, 2), "rows": (16, 32), "dropout": 0.1},
            "in_features=24, out_features=48, bias=True, rank=(1, 2), rows=(16, 32), dropout=0.1",
        ),
    ],
)
def test_repr_says_what_differs_from_a_linear(options, text):
    made = LoRALinear(24, 48, **options)

    assert repr(made) == f"LoRALinear({text})"
    made.merge()
    assert repr(made) == f"LoRALinear({text}, merged)"


def test_dropout_masks_the_low_rank_path_alone_and_alike_in_forward_and_backward():
    made, x = layer(dropout=0.4), draw(50, 24).requires_grad_()
    reference = x.detach().double().requires_grad_()
    torch.manual_seed(7)
    mask = keep_mask(torch.randint(2**32, (1,)), 50, 24, 0.4).double() / 0.6
    expected, leaves = formula(made, reference, reference * mask)
    expected.square().sum().backward()

    torch.manual_seed(7)
    y = made(x)
    y.square().sum().backward()

    assert_close(y, expected, torch.float32)
    assert_close(x.grad, reference.grad, torch.float32)
    for name, parameter in made.named_parameters():
        assert_close(parameter.grad, leaves[name].grad, torch.float32)


def test_dropout_leaves_the_expected_value():
    made, x = layer("r3", dropout=0.5), draw(1, 24)
    torch.manual_seed(0)

    with torch.no_grad():
        mean = made(x.expand(20000, 24)).double().mean(0)

    expected, _ = formula(made, x.double())
    spread = (made.delta_weight() * x).square().sum(1).sqrt() / 20000**0.5
    assert ((mean - expected[0]).abs() <= 5 * spread).all()


def test_dropout_does_nothing_in_eval():
    assert_computes_the_formula(layer(dropout=0.5).eval(), draw(9, 24), torch.float32)


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("slices", ["r3", "qkv 3 12 1"])
def test_compiled_without_a_graph_break_it_computes_the_same(slices):
    made, x = layer(slices, alpha=2.0), draw(9, 24).requires_grad_()
    other, x_other = copy.deepcopy(made), x.detach().clone().requires_grad_()
    made(x).square().sum().backward()
    compiled(other)(x_other).square().sum().backward()

    assert torch.equal(x.grad, x_other.grad)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(made.parameters(), other.parameters(), strict=True))


def test_autocast_gives_bf16_eager_and_compiled_and_fp32_gradients():
    made, x = layer(), draw(9, 24)
    expected, leaves = formula(made, x.double())
    expected.square().sum().backward()
    for run in (made, compiled(copy.deepcopy(made))):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        y.float().square().sum().backward()

        assert_close(y, expected, torch.bfloat16)
        for name, parameter in run.named_parameters():
            assert parameter.grad.dtype == torch.float32
            expected_grad = leaves[name.removeprefix("_orig_mod.")].grad
            assert_close(parameter.grad.bfloat16(), expected_grad, torch.bfloat16)


def test_activation_checkpointing_gives_the_same_gradients():
    made, x = layer(dropout=0.3), draw(9, 24).requires_grad_()
    grads = []
    for run in (made, lambda x: checkpoint(made, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(x).square().sum(), [x, *made.parameters()]))

    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_nothing_is_computed_for_a_frozen_base():
    made = layer()
    for frozen in (made.weight, made.bias):
        frozen.requires_grad_(False)
    made(draw(3, 24)).sum().backward()

    assert (made.weight.grad, made.bias.grad) == (None, None)
    assert made.lora_A.grad.any()
    assert made.lora_B.grad.any()


def test_on_the_meta_device_it_has_its_shapes():
    made = LoRALinear(24, 48, rank=(3, 12, 1), rows=(16,) * 3, device="meta")

    assert made.lora_A.shape == (16, 24)
    assert made.lora_B.shape == (16 * 16,)
    assert made(torch.empty(5, 24, device="meta")).shape == (5, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank = \(0,\): every rank must be at least 1"),
        ({"rank": (4, -1), "rows": (20, 20)}, r"rank = \(4, -1\): every rank"),
        ({"rank": (4, 4)}, r"rank = \(4, 4\): 2 ranks for 1 row slices \(40,\)"),
        ({"rank": (4,), "rows": (20, 20)}, r"1 ranks for 2 row slices \(20, 20\)"),
        ({"rows": (20, 19)}, r"rows = \(20, 19\): must be positive and sum to out_features = 40"),
        ({"rows": (41, -1)}, r"rows = \(41, -1\): must be positive"),
        ({"rows": (40, 0)}, r"rows = \(40, 0\): must be positive"),
        ({"rows": ()}, r"rows = \(\): must be positive"),
        ({"alpha": 0.0}, r"alpha = 0\.0: must be finite and above 0"),
        ({"alpha": float("nan")}, "alpha = nan: must be finite"),
        ({"alpha": float("inf")}, "alpha = inf: must be finite"),
        ({"dropout": 1.0}, r"dropout = 1\.0: accepted in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout = -0\.1: accepted"),
    ],
)
def test_bad_arguments_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(24, 40, **{"rank": 4} | options)
