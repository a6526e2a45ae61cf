"""The kernels of the low-rank path in Triton's interpreter (on a GPU: compiled) against float64."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels are Triton's")

from prelora.kernels import lora_dx as dx_module
from prelora.kernels import lora_forward as forward_module
from prelora.kernels import lora_row as row_module
from prelora.kernels.lora_col import lora_col
from prelora.kernels.lora_dx import lora_dx
from prelora.kernels.lora_dy import MAX_BLOCK_RANK, lora_dy, worth_it
from prelora.kernels.lora_expand import lora_expand
from prelora.kernels.lora_forward import GemmConfig, lora_forward
from prelora.kernels.lora_row import RowConfig, lora_row
from triton.runtime import interpreter

from prelora.ops.dropout import drop, keep_mask
from prelora.ops.slices import split_lora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANKS = (1, 3, 8, 12, 16, 24, 64, 128)
LAYOUTS = ("contiguous", "transposed", "columns", "rows")

slices = st.lists(st.tuples(st.integers(1, 70), st.sampled_from(RANKS)), min_size=1, max_size=3)
layouts = st.sampled_from(LAYOUTS)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@pytest.fixture(autouse=True)
def bf16_interpreted_rightly(monkeypatch):
    """The interpreter keeps bf16 as uint16: it multiplies those integers, and casts to bf16 by truncation."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl
    handle, tl = interpreter.TensorHandle, interpreter.tl

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return handle((operand.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(src.data, dtype=torch.float32).to(torch.bfloat16)
            return handle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, src, dst_type)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)


def laid_out(matrix, layout):
    """The same matrix at other strides."""
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "columns":
        return torch.cat([matrix, matrix + 1], 1)[:, : matrix.shape[1]]
    if layout == "rows":
        return torch.stack([matrix, matrix + 1], 1).flatten(0, 1)[::2]
    return matrix


class Problem:
    """Random x, dy, W, b, A and B of a Linear with row slices, and what eager operations make of them."""

    def __init__(self, tokens, features, cut, dtype=torch.float32, *, x="contiguous", dy="contiguous", dropout=0.0):
        draw = torch.Generator().manual_seed(1)
        self.rows, self.ranks = zip(*cut, strict=True)
        self.scaling = tuple(2.0 / rank + i for i, rank in enumerate(self.ranks))
        self.cut = (self.rows, self.ranks, self.scaling)
        self.dtype = dtype

        def random(*shape):
            return torch.randn(*shape, generator=draw).to(DEVICE)

        self.x = laid_out(random(tokens, features).to(dtype), x)
        self.dy = laid_out(random(tokens, sum(self.rows)).to(dtype), dy)
        self.weight = laid_out(random(sum(self.rows), features).to(dtype), x)
        self.bias = random(sum(self.rows))
        self.lora_a = random(sum(self.ranks), features)
        self.lora_b = random(sum(n * r for n, r in cut))
        self.seed = torch.tensor(12345678901, device=DEVICE) if dropout else None
        self.dropout = (dropout, self.seed)

    def absolute(self):
        """The same of absolute values: its results are the sums of the terms' sizes, which bound rounding errors."""
        other = copy.copy(self)
        for name in ("x", "dy", "weight", "bias", "lora_a", "lora_b"):
            setattr(other, name, getattr(self, name).abs())
        return other

    def drop(self, x):
        return drop(x, self.seed, self.dropout[0])

    def parts(self, wide, dtype):
        """(columns, B_i, s_i) of each slice."""
        b = [b_i for _, b_i in split_lora(self.lora_a, self.lora_b.to(dtype), self.rows, self.ranks)]
        return list(zip(wide.split(list(self.rows), 1), b, self.scaling, strict=True))

    def row(self, dtype):
        """S and dS."""
        s = self.drop(self.x.to(dtype)) @ self.lora_a.to(dtype).t()
        return s, torch.cat([s_i * (dy_i @ b_i) for dy_i, b_i, s_i in self.parts(self.dy.to(dtype), dtype)], 1)

    def col(self, s, ds, dtype):
        """dA and dB from S and dS."""
        s, ds = s.to(dtype), ds.to(dtype)
        parts = zip(self.parts(self.dy.to(dtype), dtype), s.split(list(self.ranks), 1), strict=True)
        db = [s_i * (dy_i.t() @ h_i) for (dy_i, _, s_i), h_i in parts]
        return ds.t() @ self.drop(self.x.to(dtype)), torch.cat([one.reshape(-1) for one in db])

    def expand(self, y, s, dtype):
        """y with the low-rank path added."""
        parts = zip(self.parts(y.to(dtype), dtype), s.to(dtype).split(list(self.ranks), 1), strict=True)
        return torch.cat([y_i + s_i * (h_i @ b_i.t()) for (y_i, b_i, s_i), h_i in parts], 1)

    def forward(self, s, dtype):
        """y from x and S."""
        y = torch.nn.functional.linear(self.x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return self.expand(y, s, dtype)

    def dx(self, ds, dtype):
        """dx from dy and dS."""
        return self.dy.to(dtype) @ self.weight.to(dtype) + self.drop(ds.to(dtype) @ self.lora_a.to(dtype))


def assert_as_exact_as_eager(actual, dtype, eager, exact, terms):
    """Not more than twice as far from float64 as eager, give or take an ulp of the result and an fp32 ulp of its terms.

    The last two because eager may be lucky: a single sum of many terms can come out exact.
    """
    assert actual.dtype == dtype
    assert actual.shape == exact.shape
    eager_error, error = (float((result.double() - exact).abs().max()) for result in (eager.to(dtype), actual))
    floor = torch.finfo(dtype).eps * float(exact.abs().max()) + torch.finfo(torch.float32).eps * float(terms.max())
    assert error <= 2 * eager_error + floor, f"{error} from float64, eager {eager_error}, floor {floor}"


def check_row(problem):
    actual = lora_row(problem.x, problem.dy, problem.lora_a, problem.lora_b, *problem.cut, *problem.dropout)
    expected = problem.row(problem.dtype), problem.row(torch.float64), problem.absolute().row(torch.float64)
    for ours, *theirs in zip(actual, *expected, strict=True):
        assert ours.is_contiguous()
        assert_as_exact_as_eager(ours, problem.dtype, *theirs)


def check_col(problem, out=None):
    out = out or problem.dtype
    s, ds = problem.row(problem.dtype)
    actual = lora_col(problem.x, problem.dy, s, ds, *problem.cut, out, *problem.dropout)
    for ours, *theirs in zip(actual, *expected_col(problem, s, ds), strict=True):
        assert ours.is_contiguous()
        assert_as_exact_as_eager(ours, out, *theirs)


def expected_col(problem, s, ds):
    """dA and dB: eager, exact, and the sums of their terms' sizes."""
    sizes = problem.absolute().col(s.abs(), ds.abs(), torch.float64)
    return problem.col(s, ds, problem.dtype), problem.col(s, ds, torch.float64), sizes


def check_expand(problem):
    s, _ = problem.row(problem.dtype)
    y = problem.dy
    eager, exact = problem.expand(y, s, problem.dtype), problem.expand(y, s, torch.float64)
    terms = problem.absolute().expand(y.abs(), s.abs(), torch.float64)
    assert lora_expand(y, s, problem.lora_b, *problem.cut) is None
    assert_as_exact_as_eager(y, problem.dtype, eager, exact, terms)


def check_forward(problem):
    s, _ = problem.row(problem.dtype)
    y = lora_forward(problem.x, problem.weight, problem.bias, s, problem.lora_b, *problem.cut)
    assert y.is_contiguous()
    eager, exact = problem.forward(s, problem.dtype), problem.forward(s, torch.float64)
    assert_as_exact_as_eager(y, problem.dtype, eager, exact, problem.absolute().forward(s.abs(), torch.float64))


def check_dx(problem):
    _, ds = problem.row(problem.dtype)
    dx = lora_dx(problem.dy, problem.weight, ds, problem.lora_a, *problem.dropout)
    assert dx.is_contiguous()
    eager, exact = problem.dx(ds, problem.dtype), problem.dx(ds, torch.float64)
    assert_as_exact_as_eager(dx, problem.dtype, eager, exact, problem.absolute().dx(ds.abs(), torch.float64))


def check_dy(problem, out=None):
    out = out or problem.dtype
    (s, eager), (_, exact) = problem.row(problem.dtype), problem.row(torch.float64)
    ds, db = lora_dy(problem.dy, s, problem.lora_b, *problem.cut, out)
    assert_as_exact_as_eager(ds, problem.dtype, eager, exact, problem.absolute().row(torch.float64)[1])
    assert_as_exact_as_eager(db, out, *(both[1] for both in expected_col(problem, s, eager)))


CHECKS = (check_row, check_col, check_expand, check_forward, check_dx, check_dy)
checks = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.replace("check", "lora"))


@checks
@given(
    tokens=st.integers(1, 70),
    features=st.integers(1, 150),
    cut=slices,
    dtype=st.sampled_from(DTYPES),
    x=layouts,
    dy=layouts,
    dropout=st.sampled_from((0.0, 0.3)),
)
@few
def test_as_exact_as_eager(check, tokens, features, cut, dtype, x, dy, dropout):
    if check is check_dy:
        cut = [(rows, min(rank, MAX_BLOCK_RANK)) for rows, rank in cut]
    check(Problem(tokens, features, cut, dtype, x=x, dy=dy, dropout=dropout))


@checks
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_alone(check, rank):
    check(Problem(33, 64, [(48, rank if check is not check_dy else min(rank, MAX_BLOCK_RANK))], torch.float16))


@checks
def test_three_unequal_slices_of_a_transposed_gradient(check):
    ranks = (32, 3, 24) if check is check_dy else (64, 3, 24)
    cut = list(zip((300, 8, 130), ranks, strict=True))
    check(Problem(70, 144, cut, torch.bfloat16, x="columns", dy="transposed", dropout=0.1))


@checks
@pytest.mark.parametrize("tokens", [1, 300])
def test_one_token_and_many(check, tokens):
    check(Problem(tokens, 40, [(20, 8), (20, 8)], torch.float16))


@pytest.mark.parametrize("check", [check_row, check_col])
def test_ranks_beyond_one_tile(check):
    check(Problem(40, 70, [(30, 128), (10, 128), (5, 100)], torch.float16, dropout=0.2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_another_dtype(dtype):
    check_col(Problem(50, 40, [(20, 8), (12, 3)], torch.bfloat16), dtype)
    check_dy(Problem(50, 40, [(20, 8), (12, 3)], torch.bfloat16), dtype)


@pytest.mark.parametrize("config", [RowConfig(64, 64, 4, 4), RowConfig(128, 32, 8, 4)])
def test_row_in_the_configurations_of_many_tokens(config, monkeypatch):
    monkeypatch.setattr(row_module, "row_config", lambda *args: config)
    check_row(Problem(150, 100, [(130, 40), (20, 16)], torch.float16, dropout=0.2))


@pytest.mark.parametrize("config", [GemmConfig(128, 256, 32, 8, 4), GemmConfig(128, 128, 32, 8, 4)])
def test_gemms_in_the_configurations_of_many_tokens(config, monkeypatch):
    for module in (forward_module, dx_module):
        monkeypatch.setattr(module, "gemm_config", lambda *args: config)
    check_forward(Problem(1200, 70, [(300, 40), (20, 16)], torch.float16))
    check_dx(Problem(1200, 300, [(50, 40), (20, 16)], torch.float16, dropout=0.2))


def test_no_tokens():
    problem = Problem(0, 20, [(12, 8), (7, 3)])
    s, ds = lora_row(problem.x, problem.dy, problem.lora_a, problem.lora_b, *problem.cut)
    assert s.shape == ds.shape == (0, 11)
    for da, db in [
        lora_col(problem.x, problem.dy, s, ds, *problem.cut, torch.float32),
        (None, lora_dy(problem.dy, s, problem.lora_b, *problem.cut, torch.float32)[1]),
    ]:
        assert da is None or torch.equal(da, torch.zeros(11, 20, device=DEVICE))
        assert torch.equal(db, torch.zeros(12 * 8 + 7 * 3, device=DEVICE))
    y = lora_forward(problem.x, problem.weight, None, s, problem.lora_b, *problem.cut)
    lora_expand(y, s, problem.lora_b, *problem.cut)
    assert y.shape == (0, 19)
    assert lora_dx(problem.dy, problem.weight, ds, problem.lora_a).shape == (0, 20)


def test_half_of_what_is_asked_for():
    problem = Problem(40, 30, [(20, 8), (9, 3)], dropout=0.3)
    given = (problem.lora_a, problem.lora_b, *problem.cut, *problem.dropout)
    s, ds = lora_row(problem.x, problem.dy, *given)
    assert torch.equal(lora_row(problem.x, None, *given)[0], s)
    assert torch.equal(lora_row(None, problem.dy, *given)[1], ds)
    assert lora_row(None, None, *given) == (None, None)
    given = (*problem.cut, torch.float32, *problem.dropout)
    da, db = lora_col(problem.x, problem.dy, s, ds, *given)
    for x, its_ds in [(None, ds), (problem.x, None)]:
        none, alone = lora_col(x, problem.dy, s, its_ds, *given)
        assert none is None
        torch.testing.assert_close(alone, db)
    alone, none = lora_col(problem.x, None, s, ds, *given)
    assert none is None
    torch.testing.assert_close(alone, da)
    assert lora_col(None, None, s, ds, *given) == (None, None)


def test_no_bias():
    problem = Problem(40, 30, [(20, 8), (9, 3)])
    problem.bias.zero_()
    s, _ = problem.row(problem.dtype)
    y = lora_forward(problem.x, problem.weight, None, s, problem.lora_b, *problem.cut)
    torch.testing.assert_close(y, problem.forward(s, problem.dtype))


def test_same_bits_twice():
    problem = Problem(300, 130, [(40, 12), (30, 3)], torch.float16, dropout=0.4)

    def run():
        s, ds = lora_row(problem.x, problem.dy, problem.lora_a, problem.lora_b, *problem.cut, *problem.dropout)
        y = lora_forward(problem.x, problem.weight, problem.bias, s, problem.lora_b, *problem.cut)
        dx = lora_dx(problem.dy, problem.weight, ds, problem.lora_a, *problem.dropout)
        da, db = lora_col(problem.x, problem.dy, s, ds, *problem.cut, torch.float32, *problem.dropout)
        return s, ds, y, dx, da, db, *lora_dy(problem.dy, s, problem.lora_b, *problem.cut, torch.float32)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@checks
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has no sparse memory, and 20 GB of it are much to ask for")
def test_offsets_beyond_31_bits(check, tmp_path):
    problem = Problem(5, 8, [(6, 8)], torch.float16)
    for name in ("x", "dy"):
        matrix = getattr(problem, name)
        sparse = torch.from_file(str(tmp_path / name), shared=True, size=5 << 30, dtype=torch.float16).view(5, -1)
        setattr(problem, name, sparse[:, : matrix.shape[1]].copy_(matrix))
    check(problem)


@pytest.mark.parametrize(
    ("cut", "reason"),
    [([(4, 129)], "take 1 to 128"), ([(4, 0)], "take 1 to 128"), ([(4, 2)] * 4, "take 1 to 3")],
)
def test_refuses_what_it_was_not_made_for(cut, reason):
    rows, ranks = zip(*cut, strict=True)
    x, dy = torch.ones(2, 3), torch.ones(2, sum(rows))
    lora_a, lora_b = torch.ones(sum(ranks), 3), torch.ones(sum(n * r for n, r in cut))
    with pytest.raises(ValueError, match=reason):
        lora_row(x, dy, lora_a, lora_b, rows, ranks, [1.0] * len(cut))


def test_one_read_of_the_gradient_is_refused_where_it_never_pays():
    assert worth_it(12608, [1024] * 3, [8] * 3, torch.bfloat16)
    assert not worth_it(12608, [1024], [64], torch.bfloat16)
    assert not worth_it(12608, [16], [16], torch.float32)
    problem = Problem(4, 4, [(4, 33)])
    with pytest.raises(ValueError, match="use lora_row and lora_col"):
        lora_dy(problem.dy, problem.row(torch.float32)[0], problem.lora_b, *problem.cut, torch.float32)


def mask_by_definition(seed, tokens, features, dropout):
    """Which elements are kept, in numpy's uint32."""

    def mix(h):
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return h ^ (h >> np.uint32(16))

    row = np.arange(tokens, dtype=np.uint32)[:, None]
    col = np.arange(features, dtype=np.uint32)[None, :] * np.uint32(0x9E3779B1)
    kept = mix(mix(row ^ np.uint32(seed & 0xFFFFFFFF)) ^ col) >> np.uint32(8) >= round(dropout * 2**24)
    return torch.from_numpy(kept).to(DEVICE)


@pytest.mark.parametrize("dropout", [1e-9, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**40 + 12345])
def test_one_mask_in_every_kernel(seed, dropout):
    tokens, features = 70, 90
    kept = mask_by_definition(seed, tokens, features, dropout)
    seed = torch.tensor([seed], device=DEVICE)
    assert torch.equal(keep_mask(seed, tokens, features, dropout), kept)
    expected = kept * (1 / (1 - dropout) if dropout < 1 else 0.0)
    ones, eye = torch.ones(tokens, features, device=DEVICE), torch.eye(128, device=DEVICE)
    b = torch.zeros(0, device=DEVICE)
    s, _ = lora_row(ones, None, eye[:features, :features], b, [0], [features], [1.0], dropout, seed)
    da, _ = lora_col(ones, None, None, eye[:tokens, :tokens], [0], [tokens], [1.0], torch.float32, dropout, seed)
    dx = lora_dx(ones[:, :1], ones[:1] * 0, ones[:, :1], ones[:1], dropout, seed)
    for dropped in (s, da, dx):
        torch.testing.assert_close(dropped, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dropout", [-0.1, 1.1, math.nan])
def test_dropout_is_a_probability_and_needs_a_seed(dropout):
    problem = Problem(2, 3, [(4, 2)])
    given = (problem.x, None, problem.lora_a, problem.lora_b, *problem.cut)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        lora_row(*given, dropout, torch.tensor(1))
    with pytest.raises(ValueError, match="needs a seed"):
        lora_row(*given, 0.5)
