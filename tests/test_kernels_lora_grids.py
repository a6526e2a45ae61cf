"""What the grids of the low-rank kernels touch, recorded by Triton's interpreter: every output once, and the bytes."""

from dataclasses import astuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels are Triton's")

from prelora.kernels import lora_col, lora_dx, lora_dy, lora_expand, lora_forward, lora_row, padding
from triton import knobs
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(not knobs.runtime.interpret, reason="compiled kernels do not say what they touch")

SHAPES = [
    (1, 1, [(1, 1)]),
    (70, 150, [(140, 12)]),
    (33, 64, [(64, 16), (64, 16), (64, 16)]),
    (65, 129, [(300, 32), (17, 3), (130, 24)]),
    (300, 40, [(128, 8)]),
]
shapes = pytest.mark.parametrize(("tokens", "features", "cut"), SHAPES)


class Memory:
    """Bytes loaded and stored by tiles, and how often each address was stored to."""

    def __init__(self):
        self.bytes = 0
        self.addresses = []

    def loaded(self, pointers, mask):
        if pointers.data.size > 1:
            self.bytes += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def stored(self, pointers, mask):
        self.loaded(pointers, mask)
        self.addresses.append(pointers.data[mask.data])

    def times_stored(self, tensor):
        """Of each element of ``tensor``, which is contiguous."""
        stored = (np.concatenate(self.addresses) - np.uint64(tensor.data_ptr())).astype(np.int64)
        stored = stored[(stored >= 0) & (stored < tensor.numel() * tensor.itemsize)]
        assert not (stored % tensor.itemsize).any()
        return np.bincount(stored // tensor.itemsize, minlength=tensor.numel())


@pytest.fixture
def memory(monkeypatch):
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    seen = Memory()

    def create_masked_load(self, pointers, mask, *rest):
        seen.loaded(pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        seen.stored(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(builder, "create_masked_store", create_masked_store)
    return seen


def operands(tokens, features, cut):
    """x, dy, W, A, B, S and dS, and the slices."""
    rows, ranks = zip(*cut, strict=True)
    out, rank = sum(rows), sum(ranks)
    shapes = [(tokens, features), (tokens, out), (out, features), (rank, features)]
    shapes += [(sum(n * r for n, r in cut),), (tokens, rank), (tokens, rank)]
    return *(torch.ones(shape) for shape in shapes), (rows, ranks, [1.0] * len(cut))


def assert_each_stored_once(memory, *outputs):
    for output in outputs:
        assert (memory.times_stored(output) == 1).all()


@shapes
def test_row(tokens, features, cut, memory):
    x, dy, _, a, b, _, _, (rows, ranks, scaling) = operands(tokens, features, cut)
    assert_each_stored_once(memory, *lora_row.lora_row(x, dy, a, b, rows, ranks, scaling))
    assert memory.bytes == lora_row.traffic(tokens, features, rows, ranks, torch.float32)
    memory.bytes = 0
    lora_row.lora_row(x, None, a, b, rows, ranks, scaling)
    alone = lora_row.traffic(tokens, features, rows, ranks, torch.float32, dy=False)
    assert memory.bytes == alone
    lora_row.lora_row(None, dy, a, b, rows, ranks, scaling)
    assert memory.bytes == alone + lora_row.traffic(tokens, features, rows, ranks, torch.float32, x=False)


@shapes
@pytest.mark.parametrize(("has_da", "has_db"), [(True, True), (True, False), (False, True)])
def test_col(tokens, features, cut, has_da, has_db, memory):
    x, dy, _, _, _, s, ds, (rows, ranks, scaling) = operands(tokens, features, cut)
    x, dy = x if has_da else None, dy if has_db else None
    grads = lora_col.lora_col(x, dy, s, ds, rows, ranks, scaling, torch.float16)
    assert_each_stored_once(memory, *(grad for grad in grads if grad is not None))
    given = (tokens, features, rows, ranks, torch.float32, torch.float16, has_da, has_db)
    assert memory.bytes == lora_col.traffic(*given)


@shapes
def test_expand(tokens, features, cut, memory):
    _, y, _, _, b, s, _, (rows, ranks, scaling) = operands(tokens, features, cut)
    lora_expand.lora_expand(y, s, b, rows, ranks, scaling)
    assert_each_stored_once(memory, y)
    assert memory.bytes == lora_expand.traffic(tokens, rows, ranks, torch.float32)


@shapes
@pytest.mark.parametrize("bias", [None, torch.float16])
def test_forward(tokens, features, cut, bias, memory):
    x, dy, weight, _, b, s, _, (rows, ranks, scaling) = operands(tokens, features, cut)
    bias = None if bias is None else dy[0].to(bias)
    assert_each_stored_once(memory, lora_forward.lora_forward(x, weight, bias, s, b, rows, ranks, scaling))
    size = 0 if bias is None else bias.itemsize
    assert memory.bytes == lora_forward.traffic(tokens, features, rows, ranks, torch.float32, size)


@shapes
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dx(tokens, features, cut, dropout, memory):
    _, dy, weight, a, _, _, ds, (rows, ranks, _) = operands(tokens, features, cut)
    assert_each_stored_once(memory, lora_dx.lora_dx(dy, weight, ds, a, dropout, torch.tensor(1)))
    given = (tokens, features, sum(rows), sum(ranks), torch.float32, dropout > 0)
    assert memory.bytes == lora_dx.traffic(*given)


@shapes
def test_dy(tokens, features, cut, memory):
    _, dy, _, _, b, s, _, (rows, ranks, scaling) = operands(tokens, features, cut)
    assert_each_stored_once(memory, *lora_dy.lora_dy(dy, s, b, rows, ranks, scaling, torch.float16))
    assert memory.bytes == lora_dy.traffic(tokens, rows, ranks, torch.float32, torch.float16)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1576, 12608, 50432])
@pytest.mark.parametrize("tiles", [1, 8, 40, 500])
@pytest.mark.parametrize("block_m", [16, 64])
def test_shares_of_tokens_are_whole_tiles_and_none_is_empty(tokens, tiles, block_m):
    shares, share = lora_col.token_split(tokens, tiles, block_m)
    assert share % block_m == 0
    assert (shares - 1) * share < tokens <= shares * share
    assert shares == 1 or shares * tiles <= lora_col.PROGRAMS


def test_tiles_of_the_same_columns_follow_each_other(memory):
    x, _, weight, _, b, s, _, (rows, ranks, scaling) = operands(64 * 10, 8, [(64, 8)])
    y = lora_forward.lora_forward(x, weight, None, s, b, rows, ranks, scaling)
    assert lora_forward.gemm_config(torch.float32, 640, 64).block_n == 32
    columns = [int(stored.min() - y.data_ptr()) // 4 % 64 for stored in memory.addresses]
    assert columns == [0] * 8 + [32] * 8 + [0] * 2 + [32] * 2


def test_padded_ranks_cover_the_rank():
    for rank in range(1, 385):
        tiles, width = padding.rank_tiles(rank)
        assert width in (16, 32, 64, 128, 256)
        assert (tiles - 1) * width < rank <= tiles * width
        assert tiles == 1 or rank > padding.MAX_TILE


@pytest.mark.parametrize(("ranks", "granule"), [((8, 16), 8), ((12, 8), 4), ((6, 4), 2), ((3, 8), 1)])
def test_granule_divides_every_rank(ranks, granule):
    slices = padding.slices_of([4, 5], ranks, [1.0, 2.0])
    assert slices.granule == granule
    assert slices.rank_ends() == (ranks[0] // granule, sum(ranks) // granule, sum(ranks) // granule)
    assert slices.row_ends() == (4, 9, 9)


@pytest.mark.parametrize("module", [lora_row, lora_col, lora_expand, lora_forward, lora_dx, lora_dy])
def test_specimens_name_every_argument_once(module):
    specimens = list(module.specimens())
    assert len({specimen.label for specimen in specimens}) == len(specimens)
    for specimen in specimens:
        assert list(specimen.signature) == list(specimen.kernel.arg_names)
        constexprs = {name for name, kind in specimen.signature.items() if kind == "constexpr"}
        assert constexprs <= set(specimen.constants) <= set(specimen.signature)
        assert specimen.divisible_by_16 <= set(specimen.signature)


@pytest.mark.parametrize(("dtype", "element"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_every_configuration_that_depends_on_the_tokens_has_a_specimen(dtype, element):
    def compiled(module, *names):
        specimens = [specimen for specimen in module.specimens() if specimen.label.split()[1] == element]
        return {(*(s.constants[name] for name in names), s.num_warps, s.num_stages) for s in specimens}

    rows, gemms = compiled(lora_row, "BLOCK_M", "BLOCK_K"), compiled(lora_forward, "BLOCK_M", "BLOCK_N", "BLOCK_K")
    gradients = compiled(lora_dx, "BLOCK_M", "BLOCK_N", "BLOCK_K")
    for tokens in (1, 197, 1576, 6912, 6913, 12608, 50432):
        for rank in (1, 8, 24, 33, 64, 100, 128, 192, 384):
            assert astuple(lora_row.row_config(dtype, padding.rank_tiles(rank)[1], tokens)) in rows
        for width in (64, 768, 1024, 4096):
            assert astuple(lora_forward.gemm_config(dtype, tokens, width)) in gemms
            for dropping in (False, True):
                assert astuple(lora_dx.dx_config(dtype, tokens, width, dropping)) in gradients
