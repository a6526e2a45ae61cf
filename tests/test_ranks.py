"""Algorithm 2 against the paper's pseudocode, and its behaviour where the paper is silent."""

import itertools
import math
import warnings
from fractions import Fraction

import paper_pseudocode
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prelora.config import PreLoRAConfig
from prelora.convergence import layer_changes
from prelora.errors import PreLoRAWarning
from prelora.ranks import LayerShape, assign_ranks, bucket, cap_at_break_even, rank_set

BIG = LayerShape(4096, 4096)
"""Its break-even rank is 2048: no rank in these tests is capped unless the test is about that."""
NORMALIZES = ("minmax", "quantile")

rank_bounds = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda powers: tuple(1 << p for p in sorted(powers)))


def ranks_of(changes, *, shape=BIG, total_parameters=None, other_trainable=0, **fields):
    """Ranks of one group's changes, in their order."""
    layers = {f"layer{i}": change for i, change in enumerate(changes)}
    shapes = dict.fromkeys(layers, shape)
    config = PreLoRAConfig(**fields)
    sizes = {"total_parameters": total_parameters, "other_trainable": other_trainable}
    return list(assign_ranks({"q": layers}, shapes, config, **sizes).values())


def spread(min_size=2, max_size=12):
    """Whole-numbered changes that are not all equal: v is exact, or far from a bucket's edge against float noise."""
    changes = st.lists(st.integers(-1000, 1000), min_size=min_size, max_size=max_size)
    return changes.filter(lambda some: len({abs(change) for change in some}) > 1)


@given(st.dictionaries(st.sampled_from("qkv"), spread(), min_size=1), rank_bounds)
@settings(max_examples=300, deadline=None)
def test_ranks_are_those_of_the_papers_pseudocode(groups, bounds):
    changes = {group: {f"{group}.{i}": change for i, change in enumerate(changes)} for group, changes in groups.items()}
    magnitudes = {
        group: {layer: Fraction(abs(change)) for layer, change in layers.items()} for group, layers in changes.items()
    }
    shapes = {layer: BIG for layers in changes.values() for layer in layers}
    r_min, r_max = bounds

    ranks = assign_ranks(changes, shapes, PreLoRAConfig(r_min=r_min, r_max=r_max))

    assert ranks == paper_pseudocode.assign_ranks(r_min, r_max, magnitudes)


@pytest.mark.parametrize(
    ("r_min", "r_max", "ranks"), [(8, 64, [8, 16, 32, 64]), (1, 2, [1, 2]), (4, 4, [4]), (1, 1, [1])]
)
def test_rank_set_is_the_powers_of_two_between_the_bounds(r_min, r_max, ranks):
    assert rank_set(r_min, r_max) == ranks


@pytest.mark.parametrize(
    ("v", "rank"),
    [
        *[(0.0, 8), (1e-6, 8), (0.125, 8), (0.25, 8)],
        *[(0.250001, 16), (0.5, 16)],
        *[(0.500001, 32), (0.75, 32)],
        *[(0.750001, 64), (0.999999, 64), (1.0, 64)],
    ],
)
def test_buckets_of_8_to_64(v, rank):
    assert ranks_of([0.0, v, 1.0]) == [8, rank, 64]


@pytest.mark.parametrize("noise", [-1e-12, 1e-12])
@pytest.mark.parametrize(("edge", "rank"), [(0.25, 8), (0.5, 16), (0.75, 32)])
def test_float_noise_around_a_bucket_edge_flips_nothing(edge, rank, noise):
    assert ranks_of([0.0, edge + noise, 1.0]) == [8, rank, 64]


@given(size=st.integers(1, 12), data=st.data(), noise=st.floats(-1e-12, 1e-12))
@settings(max_examples=300, deadline=None)
def test_bucket_edges_hold_for_every_number_of_ranks(size, data, noise):
    edge = data.draw(st.integers(1, size))

    assert bucket(min(edge / size + noise, 1.0), size) == edge - 1
    assert bucket((edge - 1) / size + 1e-6, size) == edge - 1


@given(spread(), rank_bounds, st.sampled_from(NORMALIZES))
@settings(max_examples=200, deadline=None)
def test_ranks_are_monotone_in_the_absolute_change(changes, bounds, normalize):
    ranks = ranks_of(changes, r_min=bounds[0], r_max=bounds[1], normalize=normalize)

    by_change = [rank for _, rank in sorted(zip(map(abs, changes), ranks, strict=True))]
    assert by_change == sorted(by_change)


@given(spread(), st.data(), st.sampled_from(NORMALIZES))
@settings(max_examples=100, deadline=None)
def test_ties_get_equal_ranks(changes, data, normalize):
    tied = data.draw(st.sampled_from(changes))

    *_, positive, negative = ranks_of([*changes, tied, -tied], normalize=normalize)

    assert positive == negative == ranks_of([*changes, tied, -tied], normalize=normalize)[changes.index(tied)]


@given(spread(), st.floats(1e-6, 1e6), st.sampled_from(NORMALIZES))
@settings(max_examples=200, deadline=None)
def test_scale_of_the_changes_does_not_matter(changes, scale, normalize):
    scaled = [change * scale for change in changes]

    assert ranks_of(scaled, normalize=normalize) == ranks_of(changes, normalize=normalize)


def test_groups_are_normalized_apart():
    changes = {"q": {"q0": 0.0, "q1": 1.0}, "k": {"k0": 100.0, "k1": 900.0}}

    ranks = assign_ranks(changes, dict.fromkeys(["q0", "q1", "k0", "k1"], BIG), PreLoRAConfig())

    assert ranks == {"q0": 8, "q1": 64, "k0": 8, "k1": 64}


def test_ranks_come_in_the_order_of_the_changes():
    changes = {"v": {"b": 0.0, "a": 1.0}, "k": {"d": 1.0, "c": 0.0}}

    assert list(assign_ranks(changes, dict.fromkeys("abcd", BIG), PreLoRAConfig())) == ["b", "a", "d", "c"]


@pytest.mark.parametrize("normalize", NORMALIZES)
@pytest.mark.parametrize(
    "changes",
    [[0.3], [0.3, 0.3, 0.3], [0.3, -0.3], [0.0, 0.0], [0.3, math.nan, 0.1], [math.inf, 0.1], [0.1, -math.inf]],
    ids=["one layer", "all equal", "equal but for the sign", "all zero", "NaN", "infinite", "negative infinite"],
)
def test_group_without_a_spread_takes_the_middle_rank_and_warns(changes, normalize):
    with pytest.warns(
        PreLoRAWarning, match=rf"^group 'q': .* {len(changes)} layer\(s\) have no spread .* middle rank$"
    ):
        ranks = ranks_of(changes, normalize=normalize)

    assert ranks == [16] * len(changes)


@pytest.mark.parametrize(("r_min", "r_max", "middle"), [(8, 8, 8), (8, 16, 8), (8, 32, 16), (8, 64, 16), (8, 128, 32)])
def test_middle_rank_is_the_lower_of_two(r_min, r_max, middle):
    with pytest.warns(PreLoRAWarning, match="middle rank"):
        assert ranks_of([0.3, 0.3], r_min=r_min, r_max=r_max) == [middle] * 2


@pytest.mark.parametrize("normalize", NORMALIZES)
def test_equal_changes_of_unequal_norms_are_equal(normalize):
    # Both layers grow by half a percent; in floats the changes differ in the 14th digit.
    changes = layer_changes([[1.0, 3.0], [1.005, 3.015]], PreLoRAConfig(m=1))
    assert changes[0] != changes[1]

    with pytest.warns(PreLoRAWarning, match="no spread"):
        assert ranks_of(changes, normalize=normalize) == [16, 16]


def test_group_without_a_spread_leaves_the_others_alone():
    changes = {"q": {"q0": math.nan, "q1": 0.5}, "k": {"k0": 0.0, "k1": 1.0}}

    with pytest.warns(PreLoRAWarning, match="group 'q'"):
        ranks = assign_ranks(changes, dict.fromkeys(["q0", "q1", "k0", "k1"], BIG), PreLoRAConfig())

    assert ranks == {"q0": 16, "q1": 16, "k0": 8, "k1": 64}


@given(st.lists(st.floats(), min_size=1, max_size=6), st.sampled_from(NORMALIZES), rank_bounds)
@settings(max_examples=300, deadline=None)
def test_no_changes_raise_and_every_rank_is_in_the_set(changes, normalize, bounds):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreLoRAWarning)
        ranks = ranks_of(changes, normalize=normalize, r_min=bounds[0], r_max=bounds[1])

    assert set(ranks) <= set(rank_set(*bounds))


@pytest.mark.parametrize(("normalize", "ranks"), [("minmax", [8, 8, 8, 64]), ("quantile", [8, 16, 32, 64])])
def test_one_runaway_layer_holds_the_others_down_except_by_quantile(normalize, ranks):
    assert ranks_of([1.0, 2.0, 3.0, 1000.0], normalize=normalize) == ranks


def test_quantile_ties_share_the_mean_of_their_places():
    # Places 1 to 3 of 4, on average 2: v = ½. The lowest of them would give 8, the highest 32.
    assert ranks_of([1, 2, 2, 2, 9], normalize="quantile") == [8, 16, 16, 16, 64]


@given(spread())
@settings(max_examples=100, deadline=None)
def test_quantile_sees_the_order_only(changes):
    cubed = [change**3 for change in changes]

    assert ranks_of(cubed, normalize="quantile") == ranks_of(changes, normalize="quantile")


@pytest.mark.parametrize(
    ("in_features", "out_features", "rank", "capped"),
    [
        (1024, 1024, 512, 256),  # the break-even rank itself does not pay
        (1024, 1024, 256, 256),
        (64, 64, 64, 16),
        (64, 64, 16, 16),
        (768, 3072, 1024, 512),  # break-even at 614.4
        (3072, 768, 1024, 512),
        (4, 4, 64, 1),
        (3, 3, 1, 1),
        (2, 3, 1, 1),
    ],
)
def test_rank_is_capped_below_the_break_even(in_features, out_features, rank, capped):
    assert cap_at_break_even(rank, LayerShape(in_features, out_features)) == capped


@given(st.integers(3, 5000), st.integers(3, 5000), st.integers(0, 12).map(lambda power: 1 << power))
@settings(max_examples=200, deadline=None)
def test_cap_is_the_largest_power_of_two_that_saves_parameters(in_features, out_features, rank):
    shape = LayerShape(in_features, out_features)

    capped = cap_at_break_even(rank, shape)

    assert shape.lora_parameters(capped) < in_features * out_features
    assert capped == rank or shape.lora_parameters(2 * capped) >= in_features * out_features


@pytest.mark.parametrize(("in_features", "out_features"), [(2, 2), (1, 4096), (4096, 1), (1, 1)])
@pytest.mark.parametrize("rank", [1, 8])
def test_layer_where_not_even_rank_1_pays_is_an_error(in_features, out_features, rank):
    with pytest.raises(ValueError, match=rf"a {in_features} → {out_features} layer .* LoRA cannot pay there"):
        cap_at_break_even(rank, LayerShape(in_features, out_features))


def test_capped_plan_warns_with_the_first_layer_and_both_ranks():
    with pytest.warns(PreLoRAWarning, match=r"^1 layer\(s\) had .* and were capped, as 'layer2': 64 → 32$"):
        assert ranks_of([0.0, 0.5, 1.0], shape=LayerShape(128, 128)) == [8, 16, 32]


def test_lora_parameters_are_those_of_a_and_b():
    assert LayerShape(in_features=3, out_features=5).lora_parameters(2) == 2 * 3 + 5 * 2


class TestBudget:
    TOTAL = 10**9
    LADDER = (  # what v = 0, 0.3, 0.6, 0.8, 1 to the power of gamma gives while gamma falls
        [8, 8, 8, 8, 8],
        [8, 8, 8, 8, 16],
        [8, 8, 8, 8, 32],
        [8, 8, 8, 8, 64],
        [8, 8, 8, 16, 64],
        [8, 8, 8, 32, 64],
        [8, 8, 16, 32, 64],
        [8, 8, 32, 32, 64],
        [8, 8, 32, 64, 64],
        [8, 16, 32, 64, 64],  # gamma = 1: as without a budget
        [8, 32, 32, 64, 64],
        [8, 32, 64, 64, 64],
        [8, 64, 64, 64, 64],
    )

    def share(self, ranks, other_trainable=0):
        return (sum(map(BIG.lora_parameters, ranks)) + other_trainable) / self.TOTAL

    def ranks(self, changes, budget, **fields):
        return ranks_of(changes, budget=budget, total_parameters=self.TOTAL, **fields)

    @given(spread(), st.floats(0, 1), st.sampled_from(NORMALIZES), st.integers(0, 10**7))
    @settings(max_examples=150, deadline=None)
    def test_share_is_never_over_budget(self, changes, budget, normalize, other):
        smallest = self.share([8] * len(changes), other)
        budget = smallest + budget * (self.share([64] * len(changes), other) - smallest)

        ranks = self.ranks(changes, budget, normalize=normalize, other_trainable=other)

        assert self.share(ranks, other) <= budget

    @given(spread(), st.floats(0.01, 1), st.sampled_from(NORMALIZES))
    @settings(max_examples=100, deadline=None)
    def test_ranks_stay_monotone_in_the_absolute_change(self, changes, budget, normalize):
        assume(budget >= self.share([8] * len(changes)))

        ranks = self.ranks(changes, budget, normalize=normalize)

        by_change = [rank for _, rank in sorted(zip(map(abs, changes), ranks, strict=True))]
        assert by_change == sorted(by_change)

    @given(spread(), st.floats(0, 0.01), st.floats(0, 0.01), st.sampled_from(NORMALIZES))
    @settings(max_examples=100, deadline=None)
    def test_ranks_grow_with_the_budget(self, changes, budget, more, normalize):
        budget += self.share([8] * len(changes))

        small = self.ranks(changes, budget, normalize=normalize)
        large = self.ranks(changes, budget + more, normalize=normalize)

        assert all(a <= b for a, b in zip(small, large, strict=True))

    @given(spread(), st.sampled_from(NORMALIZES))
    @settings(max_examples=50, deadline=None)
    def test_smallest_possible_budget_is_r_min_everywhere(self, changes, normalize):
        smallest = [8] * len(changes)

        assert self.ranks(changes, self.share(smallest), normalize=normalize) == smallest

    @given(spread(), st.sampled_from(NORMALIZES))
    @settings(max_examples=50, deadline=None)
    def test_ample_budget_is_r_max_but_for_the_least_changed(self, changes, normalize):
        magnitudes = [abs(change) for change in changes]
        assume(normalize == "minmax" or magnitudes.count(min(magnitudes)) == 1)

        ranks = self.ranks(changes, 1.0, normalize=normalize)

        assert ranks == [8 if magnitude == min(magnitudes) else 64 for magnitude in magnitudes]

    @pytest.mark.parametrize(("plan", "next_plan"), [*itertools.pairwise(LADDER)])
    def test_budget_buys_the_dearest_plan_it_can_pay(self, plan, next_plan):
        changes = [0, 3, 6, 8, 10]

        assert self.ranks(changes, self.share(plan)) == plan
        assert self.ranks(changes, self.share(next_plan) - 1e-9) == plan

    @given(spread(max_size=8), st.floats(0.01, 0.99), st.integers(0, 10**6))
    @settings(max_examples=50, deadline=None)
    def test_impossible_budget_is_an_error_that_names_the_smallest_share(self, changes, part, other):
        smallest = self.share([8] * len(changes), other)

        with pytest.raises(ValueError, match=f"^budget = .*: the smallest plan already trains {smallest:.4f} of"):
            self.ranks(changes, part * smallest, other_trainable=other)

    def test_float_noise_above_the_least_change_gains_no_rank(self):
        assert self.ranks([0.0, 1e-12, 1.0], 1.0) == [8, 8, 64]

    def test_capped_ranks_are_what_counts(self):
        shape = LayerShape(128, 128)  # 64 is capped to 32
        budget = shape.lora_parameters(8 + 32 + 32) / self.TOTAL

        with pytest.warns(PreLoRAWarning, match="were capped"):
            assert self.ranks([0.0, 0.5, 1.0], budget, shape=shape) == [8, 32, 32]

    def test_group_without_a_spread_shares_in_the_budget(self):
        with pytest.warns(PreLoRAWarning, match="no spread"):
            assert self.ranks([0.5, 0.5], self.share([32, 32])) == [32, 32]

    def test_budget_needs_the_total(self):
        with pytest.raises(ValueError, match=r"^budget = 0\.1: needs total_parameters$"):
            ranks_of([0.0, 1.0], budget=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": {}}, "group 'q' has no layers"),
        ({"q": {"a": 0.0, "z": 1.0}}, "no shape for layer 'z'"),
        ({"q": {"a": 0.0, "b": 1.0}, "k": {"b": 0.0, "a": 1.0}}, "layer 'b' of group 'k' is in another group too"),
    ],
    ids=["empty group", "layer without a shape", "layer in two groups"],
)
def test_changes_that_do_not_fit_the_layers_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        assign_ranks(changes, {"a": BIG, "b": BIG}, PreLoRAConfig())


# Controls: other assignments, to hold Algorithm 2's against.


def assigned(groups, assignment, shapes=None, **fields):
    """Ranks by layer of ``groups`` under an assignment."""
    changes = {group: {f"{group}.{i}": change for i, change in enumerate(some)} for group, some in groups.items()}
    shapes = shapes or {layer: BIG for layers in changes.values() for layer in layers}
    return assign_ranks(changes, shapes, PreLoRAConfig(assignment=assignment, **fields))


groups_of_changes = st.dictionaries(st.sampled_from("qkv"), spread(), min_size=1)


@given(groups_of_changes, rank_bounds)
@settings(deadline=None)
def test_reversed_ranks_are_each_groups_own_with_the_largest_for_the_layer_that_changed_least(groups, bounds):
    r_min, r_max = bounds

    ranks = assigned(groups, "change", r_min=r_min, r_max=r_max)
    dealt = assigned(groups, "reversed", r_min=r_min, r_max=r_max)

    for group, changes in groups.items():
        own, other = ([by[f"{group}.{i}"] for i in range(len(changes))] for by in (ranks, dealt))
        assert sorted(own) == sorted(other)
        by_change = sorted(range(len(changes)), key=lambda i, some=changes: abs(some[i]))
        assert [other[i] for i in by_change] == sorted(other, reverse=True)


@given(groups_of_changes, rank_bounds, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_a_uniform_rank_takes_no_more_parameters_and_one_more_would(groups, bounds, random):
    r_min, r_max = bounds
    layers = [f"{group}.{i}" for group, changes in groups.items() for i in range(len(changes))]
    shapes = {layer: LayerShape(random.choice([2048, 4096]), random.choice([4096, 8192])) for layer in layers}

    ranks = assigned(groups, "change", shapes, r_min=r_min, r_max=r_max)
    uniform = assigned(groups, "uniform", shapes, r_min=r_min, r_max=r_max)

    (rank,) = set(uniform.values())
    budget = sum(shapes[layer].lora_parameters(ranks[layer]) for layer in layers)
    spent, more = (sum(shapes[layer].lora_parameters(r) for layer in layers) for r in (rank, rank + 1))
    assert spent <= budget < more


def test_no_assignment_is_rank_zero_everywhere():
    assert assigned({"q": [1, 2, 3], "v": [1, 5]}, "none") == dict.fromkeys(["q.0", "q.1", "q.2", "v.0", "v.1"], 0)


def test_an_unknown_assignment_is_refused():
    with pytest.raises(ValueError, match="assignment = 'best': accepted are change, uniform, reversed, none"):
        PreLoRAConfig(assignment="best")
