"""``csrc/tile_map.h``: every output tile exactly once, evenly, whatever the problems and the grid."""

import shutil

import pytest
from csrc.tile_map import BLOCKS, FLOAT32, TO_BFLOAT16, Size
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc import tile_map
from prelora.config import PreLoRAConfig
from prelora.ranks import LayerShape, assign_ranks

if shutil.which("g++") is None:
    pytest.skip("no g++ to compile csrc/tile_map.h with", allow_module_level=True)

sides = st.one_of(st.integers(0, 130), st.sampled_from((1, 31, 32, 33, 64, 65, 128, 300)))
depths = st.one_of(st.integers(0, 40), st.sampled_from((255, 256, 400, 1024, 5000)))
sizes = st.builds(Size, sides, sides, depths, st.integers(0, 1))
grids = st.one_of(st.integers(1, 8), st.sampled_from((3 * 108, 3 * 132)))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return tile_map.compile_map(tmp_path_factory.mktemp("tile_map"))


def vit_large():
    """(out, in, rank) of the 144 slices of a ViT-L, at ranks as Algorithm 2 gives them for changes of even spread."""
    rows = {"q": (1024, 1024), "k": (1024, 1024), "v": (1024, 1024), "attn_out": (1024, 1024)}
    rows |= {"mlp_in": (4096, 1024), "mlp_out": (1024, 4096)}
    shapes = {f"{name}{block}": LayerShape(k, n) for name, (n, k) in rows.items() for block in range(24)}
    # 7 and 24 have no common divisor: each group's 24 layers get every step of the spread, in a mixed order.
    changes = {name: {f"{name}{block}": 1.0 + block * 7 % 24 for block in range(24)} for name in rows}
    ranks = assign_ranks(changes, shapes, PreLoRAConfig())
    return [(shape.out_features, shape.in_features, ranks[layer]) for layer, shape in shapes.items()]


MERGE = [Size(n, k, rank, 1) for n, k, rank in vit_large()]
BACKWARD = [size for n, k, rank in vit_large() for size in (Size(rank, k, n), Size(n, rank, k))]


@settings(max_examples=150, deadline=None)
@given(st.lists(sizes, max_size=8), grids)
def test_every_output_is_made_exactly_once(library, problems, blocks):
    covered = [set() for _ in problems]
    for tile in tile_map.walk(library, problems, blocks):
        assert tile.flat % blocks == tile.block
        assert tile.row < tile.row_end
        assert tile.column < tile.column_end
        place = (tile.row, tile.row_end, tile.column, tile.column_end, tile.k, tile.k_end)
        assert place not in covered[tile.problem]
        covered[tile.problem].add(place)
    for size, places in zip(problems, covered, strict=True):
        volume = sum((r1 - r0) * (c1 - c0) * (k1 - k0) for r0, r1, c0, c1, k0, k1 in places)
        area = sum((r1 - r0) * (c1 - c0) for r0, r1, c0, c1, k0, _ in places if k0 == 0)
        assert volume == size.m * size.n * size.k
        assert area == size.m * size.n
        assert not any(overlap(x, y) for x in places for y in places if x < y)


def overlap(x, y):
    """Whether two places, each (begin, end) three times, have an element in common; a k of 0 counts as one."""
    ends = [(x[i], max(x[i + 1], x[i] + 1), y[i], max(y[i + 1], y[i] + 1)) for i in (0, 2, 4)]
    return all(max(x0, y0) < min(x1, y1) for x0, x1, y0, y1 in ends)


@settings(max_examples=30, deadline=None)
@given(st.lists(sizes, max_size=8), grids, grids)
def test_tiles_do_not_depend_on_the_grid(library, problems, some, others):
    def tiles(blocks):
        return sorted(tile[1:] for tile in tile_map.walk(library, problems, blocks))

    assert tiles(some) == tiles(others)


def test_a_thousand_problems_of_one_tile(library):
    problems = [Size(8, 8, 1 + i % 3) if i % 3 else Size(0, 8, 4) for i in range(1000)]
    made = [tile.problem for tile in tile_map.walk(library, problems, 324)]
    assert sorted(made) == [i for i in range(1000) if i % 3]


def test_no_problems_have_no_tiles(library):
    assert tile_map.walk(library, [], 324) == []
    assert tile_map.balance(library, [], 324) == (0.0, 0.0, 0.0)
    assert tile_map.traffic(library, []) == (0, 0)


@pytest.mark.parametrize("rank", [8, 16, 32, 48, 64])
def test_the_large_operand_of_a_gradient_is_in_one_tile_a_column(library, rank):
    grad_a, grad_b = Size(rank, 1024, 4096), Size(1024, rank, 4096)
    assert {tile.row for tile in tile_map.walk(library, [grad_a], 1)} == {0}
    assert {tile.column for tile in tile_map.walk(library, [grad_b], 1)} == {0}


def test_sums_of_merges_are_not_split(library):
    assert all((tile.k, tile.k_end) == (0, MERGE[tile.problem].k) for tile in tile_map.walk(library, MERGE, 324))


def test_the_gradients_of_a_single_layer_occupy_every_multiprocessor(library):
    layer = [Size(8, 1024, 4096), Size(4096, 8, 1024)]
    assert len({tile.block for tile in tile_map.walk(library, layer, 108)}) == 108


@pytest.mark.parametrize("multiprocessors", [108, 132])
@pytest.mark.parametrize(
    ("problems", "dtypes", "most"), [(MERGE, TO_BFLOAT16, 0.01), (BACKWARD, FLOAT32, 0.03)], ids=["merge", "backward"]
)
def test_a_grouped_launch_idles_less_than_padding_and_than_many_launches(
    library, problems, dtypes, most, multiprocessors
):
    grouped, padded, separate = tile_map.balance(library, problems, BLOCKS * multiprocessors, dtypes)
    assert grouped < most
    assert grouped < separate < padded


def test_a_merge_moves_little_beyond_its_weights(library):
    moved, least = tile_map.traffic(library, MERGE, TO_BFLOAT16)
    weights = sum(size.m * size.n * 6 for size in MERGE)
    assert weights == 1_811_939_328
    assert least < 1.04 * weights
    assert moved < 1.65 * weights


def test_gradients_move_little_beyond_dw_twice(library):
    moved, least = tile_map.traffic(library, BACKWARD, FLOAT32)
    assert moved < 1.4 * least


def figures(library):
    """Lines of ``csrc/README.md``: what the map gives for ViT-L."""
    for name, problems, dtypes in (("merge", MERGE, TO_BFLOAT16), ("backward", BACKWARD, FLOAT32)):
        moved, least = tile_map.traffic(library, problems, dtypes)
        yield f"{name} bytes {moved / 1e9:.2f} GB, least {least / 1e9:.2f} GB"
        for multiprocessors in (108, 132):
            shares = tile_map.balance(library, problems, BLOCKS * multiprocessors, dtypes)
            yield f"{name} idle on {multiprocessors}: " + " ".join(f"{100 * share:.1f}" for share in shares)
