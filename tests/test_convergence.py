"""Algorithm 1 against the paper's pseudocode, and its behaviour where the paper is silent."""

import itertools
import math
import re
from fractions import Fraction

import paper_pseudocode
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prelora.config import PreLoRAConfig
from prelora.convergence import layer_changes, partial_convergence_test, percent_change, window_values

AGGREGATES = ("mean", "mean_abs")
WINDOWS = ("mean", "last")
BLIND = {"tau": 1e300, "zeta": 1e300}
"""Thresholds that no finite change exceeds."""


@st.composite
def histories(draw, spare_epochs=0, **fields):
    """(config, norms, losses) of k·m epochs, and up to ``spare_epochs`` more, about as often converged as not."""
    k, m = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    epochs = k * m + draw(st.integers(0, spare_epochs))
    amplitude = draw(st.sampled_from([1, 4, 16]))
    near_1000 = st.integers(1000 - amplitude, 1000 + amplitude).map(float)
    layers = draw(st.integers(1, 3))
    one_group = st.lists(st.lists(near_1000, min_size=layers, max_size=layers), min_size=epochs, max_size=epochs)
    norms = draw(st.dictionaries(st.sampled_from("qkv"), one_group, min_size=1, max_size=2))
    sign = draw(st.sampled_from([1.0, -1.0]))
    losses = [sign * loss for loss in draw(st.lists(near_1000, min_size=epochs, max_size=epochs))]
    thresholds = st.sampled_from([0.125, 0.25, 0.5, 1.0, 2.0])
    return PreLoRAConfig(k=k, m=m, tau=draw(thresholds), zeta=draw(thresholds), **fields), norms, losses


def judge(norms, losses, update_ranks=None, **fields):
    """Algorithm 1 with every epoch a window."""
    config = PreLoRAConfig(**{"k": len(losses), "m": 1} | fields)
    return partial_convergence_test(norms, losses, config, update_ranks)


@given(histories())
@settings(max_examples=300, deadline=None)
def test_verdict_is_that_of_the_papers_pseudocode(history):
    config, norms, losses = history
    k, m = config.k, config.m
    W = {group: paper_pseudocode.windows(epochs, k, m) for group, epochs in norms.items()}
    L = paper_pseudocode.windows(losses, k, m)
    tau, zeta = Fraction(config.tau), Fraction(config.zeta)
    for values, threshold in [*((w, tau) for w in W.values()), (L, zeta)]:
        # Exactly on a threshold, float and exact arithmetic may differ: that has its own test below.
        assume(all(abs(abs(values[t] / values[t - 1] - 1) * 100 - threshold) > 1e-9 for t in range(2, k + 1)))

    verdict = partial_convergence_test(norms, losses, config)

    assert verdict.passed == paper_pseudocode.partial_convergence_test(k, m, tau, zeta, norms, W, L)


@pytest.mark.parametrize("after", [64.5, 63.5])
def test_change_equal_to_the_threshold_passes(after):
    change = 0.78125  # of 64 to 64.5, exactly representable, as is every step of computing it

    assert judge({"q": [[64.0], [after]]}, [64.0, after], tau=change, zeta=change).passed


@pytest.mark.parametrize("name", ["tau", "zeta"])
@pytest.mark.parametrize("after", [64.5, 63.5])
def test_change_just_over_the_threshold_fails(after, name):
    thresholds = {"tau": 0.78125, "zeta": 0.78125, name: math.nextafter(0.78125, 0)}

    assert not judge({"q": [[64.0], [after]]}, [64.0, after], **thresholds).passed


def test_worked_example():
    norms = {
        "q": [[96.0, 100.0], [100.0, 104.0], [98.0, 102.0], [100.0, 104.0], [101.0, 101.0], [100.0, 102.0]],
        "k": [[50.0, 50.0]] * 6,
    }  # windows of q: 100, 101, 101
    losses = [2.5, 1.5, 2.0, 1.9, 1.9, 2.0]  # windows: 2, 1.95, 1.95

    verdict = partial_convergence_test(norms, losses, PreLoRAConfig(k=3, m=2, tau=0.5, zeta=2.5))

    assert not verdict.passed
    assert verdict.reason == "norm of q changed by +1.000 % between windows 1 and 2 of 3: over tau = 0.5 %"
    assert verdict.norm_changes == {"q": pytest.approx((1.0, 0.0)), "k": pytest.approx((0.0, 0.0))}
    assert verdict.loss_changes == pytest.approx((-2.5, 0.0))


def test_verdict_that_passes_says_so():
    verdict = judge({"q": [[8.0], [8.0]]}, [2.0, 2.0])

    assert (verdict.passed, verdict.reason) == (True, "every change is within tau and zeta")


def test_reason_names_the_loss_when_only_the_loss_moves():
    verdict = judge({"q": [[8.0]] * 3}, [2.0, 2.0, 1.0])

    assert verdict.reason == "loss changed by -50.000 % between windows 2 and 3 of 3: over zeta = 2.5 %"


@pytest.mark.parametrize("moving", ["q", "k", "v"])
def test_one_moving_group_fails_all(moving):
    norms = {group: [[8.0], [9.0 if group == moving else 8.0]] for group in ("q", "k", "v")}

    assert judge(norms, [2.0, 2.0]).reason.startswith(f"norm of {moving} changed by +12.500 %")


@pytest.mark.parametrize("moving", [0, 1, 2])
def test_every_pair_of_consecutive_windows_counts(moving):
    norms = [[8.0] if epoch <= moving else [9.0] for epoch in range(4)]

    assert f"between windows {moving + 1} and {moving + 2} of 4" in judge({"q": norms}, [2.0] * 4).reason


def test_slow_drift_passes_however_far_it_leads():
    norms = [[100.0], [100.4], [100.8], [101.2]]

    assert judge({"q": norms}, [2.0] * 4, tau=0.5).passed


@pytest.mark.parametrize("epochs", [0, 1, 8])
def test_fewer_than_k_windows_do_not_pass(epochs):
    verdict = partial_convergence_test({"q": [[8.0]] * epochs}, [2.0] * epochs, PreLoRAConfig(k=3, m=3))

    assert (verdict.passed, verdict.reason) == (False, f"{epochs // 3} of 3 windows complete")


def test_earliest_pass_is_after_k_times_m_epochs():
    assert partial_convergence_test({"q": [[8.0]] * 9}, [2.0] * 9, PreLoRAConfig(k=3, m=3)).passed


@given(histories(), st.integers(1, 3), st.sampled_from([0.0, 1.0, 1e6, math.nan, math.inf]))
@settings(max_examples=100, deadline=None)
def test_only_the_last_k_windows_matter(history, earlier_windows, earlier_value):
    config, norms, losses = history
    earlier = earlier_windows * config.m
    longer = {
        group: [[earlier_value] * len(epochs[0]) for _ in range(earlier)] + epochs for group, epochs in norms.items()
    }

    verdict = partial_convergence_test(longer, [earlier_value] * earlier + losses, config)

    assert verdict == partial_convergence_test(norms, losses, config)


@given(histories(), st.sampled_from([0.0, 1.0, 1e6, math.nan, math.inf]), st.data())
@settings(max_examples=100, deadline=None)
def test_incomplete_last_window_is_ignored(history, later_value, data):
    config, norms, losses = history
    later = data.draw(st.integers(0, config.m - 1))
    longer = {group: epochs + [[later_value] * len(epochs[0])] * later for group, epochs in norms.items()}

    verdict = partial_convergence_test(longer, losses + [later_value] * later, config)

    assert verdict == partial_convergence_test(norms, losses, config)


@pytest.mark.parametrize(("window", "values"), [("mean", [2.0, 5.0]), ("last", [3.0, 6.0])])
@pytest.mark.parametrize("incomplete", [[], [7.0], [7.0, 8.0]])
def test_every_complete_window_has_one_value(incomplete, window, values):
    assert window_values([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, *incomplete], 3, window) == values


def test_window_is_the_mean_of_its_epochs():
    norms = {"q": [[7.0], [9.0], [6.0], [10.0]]}

    assert partial_convergence_test(norms, [3.0, 1.0, 0.5, 3.5], PreLoRAConfig(k=2, m=2)).passed


def test_window_last_is_a_sample_of_its_last_epoch():
    norms = {"q": [[1.0], [8.0], [50.0], [9.0]]}

    verdict = partial_convergence_test(norms, [9.0, 2.0, 7.0, 1.0], PreLoRAConfig(k=2, m=2, window="last"))

    assert (verdict.norm_changes, verdict.loss_changes) == ({"q": (12.5,)}, (-50.0,))


def test_opposite_changes_of_layers_cancel_in_the_mean():
    verdict = judge({"q": [[64.0, 64.0], [65.0, 63.0]]}, [2.0, 2.0], aggregate="mean")

    assert verdict.norm_changes == {"q": (0.0,)}


def test_opposite_changes_of_layers_cannot_cancel_in_mean_abs():
    verdict = judge({"q": [[64.0, 64.0], [65.0, 63.0]]}, [2.0, 2.0], aggregate="mean_abs")

    assert (verdict.passed, verdict.norm_changes) == (False, {"q": (1.5625,)})


@given(histories(aggregate="mean_abs"))
@settings(max_examples=100, deadline=None)
def test_mean_abs_is_the_mean_of_each_layers_absolute_change(history):
    config, norms, losses = history

    verdict = partial_convergence_test(norms, losses, config)

    for group, epochs in norms.items():
        layers = [paper_pseudocode.windows(list(layer), config.k, config.m) for layer in zip(*epochs, strict=True)]
        for t in range(2, config.k + 1):
            exact = sum(abs(w[t] / w[t - 1] - 1) for w in layers) / len(layers) * 100
            assert verdict.norm_changes[group][t - 2] == pytest.approx(float(exact), abs=1e-9)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@given(data=st.data(), norm_power=st.integers(-30, 30), loss_power=st.integers(-30, 30))
@settings(max_examples=50, deadline=None)
def test_scale_of_norms_and_of_loss_does_not_matter(aggregate, window, data, norm_power, loss_power):
    config, norms, losses = data.draw(histories(aggregate=aggregate, window=window))
    scaled_norms = {
        group: [[norm * 2.0**norm_power for norm in epoch] for epoch in epochs] for group, epochs in norms.items()
    }
    scaled_losses = [loss * 2.0**loss_power for loss in losses]

    verdict = partial_convergence_test(scaled_norms, scaled_losses, config)

    assert verdict == partial_convergence_test(norms, losses, config)


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [(64.0, 65.0, 1.5625), (64.0, 63.0, -1.5625), (-64.0, -63.0, 1.5625), (-64.0, -65.0, -1.5625), (1.0, -1.0, -200.0)],
)
def test_change_is_relative_to_the_magnitude_and_falls_when_the_loss_falls(before, after, change):
    assert percent_change(before, after) == change


@pytest.mark.parametrize(("zeta", "passed"), [(1.5625, True), (1.5, False)])
def test_negative_loss_is_judged_by_its_magnitude(zeta, passed):
    assert judge({"q": [[8.0], [8.0]]}, [-64.0, -65.0], zeta=zeta).passed is passed


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e-13, -1e-13])
class TestUndefined:
    def test_loss_does_not_pass(self, value, at, aggregate, window):
        losses = [2.0] * 3
        losses[at] = value

        verdict = judge({"q": [[8.0]] * 3}, losses, aggregate=aggregate, window=window, **BLIND)

        assert not verdict.passed
        assert verdict.reason.startswith("loss: change between windows ")
        assert "undefined" in verdict.reason

    def test_norm_does_not_pass(self, value, at, aggregate, window):
        norms = {"q": [[8.0]] * 3, "k": [[8.0]] * 3}
        norms["k"][at] = [value]

        verdict = judge(norms, [2.0] * 3, aggregate=aggregate, window=window, **BLIND)

        assert not verdict.passed
        assert verdict.reason.startswith("norm of k: change between windows ")
        assert "undefined" in verdict.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_one_bad_epoch_of_one_layer_is_not_averaged_away(aggregate, value):
    norms = {"q": [[8.0, 8.0], [8.0, 8.0], [8.0, value], [8.0, 8.0]]}

    verdict = partial_convergence_test(norms, [2.0] * 4, PreLoRAConfig(k=2, m=2, aggregate=aggregate, **BLIND))

    assert not verdict.passed


def test_infinities_of_both_signs_do_not_pass():
    losses = [2.0, 2.0, math.inf, -math.inf]

    verdict = partial_convergence_test({"q": [[8.0]] * 4}, losses, PreLoRAConfig(k=2, m=2, **BLIND))

    assert "loss: change between windows 1 and 2 of 2 is undefined" in verdict.reason


def test_mean_beyond_the_largest_float_does_not_pass():
    verdict = partial_convergence_test({"q": [[1.7e308]] * 4}, [2.0] * 4, PreLoRAConfig(k=2, m=2, **BLIND))

    assert "norm of q: change between windows 1 and 2 of 2 is undefined" in verdict.reason


@given(
    st.lists(st.tuples(st.floats(), st.floats(), st.floats()), min_size=6, max_size=6),
    st.sampled_from(AGGREGATES),
    st.sampled_from(WINDOWS),
)
@settings(max_examples=300, deadline=None)
def test_no_history_raises_and_what_passed_is_within_the_thresholds(epochs, aggregate, window):
    config = PreLoRAConfig(k=3, m=2, tau=150.0, zeta=150.0, aggregate=aggregate, window=window)

    verdict = partial_convergence_test({"q": [[a, b] for a, b, _ in epochs]}, [loss for *_, loss in epochs], config)

    changes = [*verdict.norm_changes["q"], *verdict.loss_changes]
    assert verdict.passed == all(math.isfinite(change) and abs(change) <= 150.0 for change in changes)


@pytest.mark.parametrize(
    ("norms", "losses", "message"),
    [
        ({}, [2.0] * 9, "at least one group"),
        ({"q": [[8.0]] * 9, "k": [[8.0]] * 8}, [2.0] * 9, "group 'k' has 8 epochs of norms, and there are 9 losses"),
        ({"q": [[8.0]] * 10}, [2.0] * 9, "group 'q' has 10 epochs of norms, and there are 9 losses"),
        ({"q": [[8.0]] * 9, "k": [[]] * 9}, [2.0] * 9, "group 'k' has [0] layers"),
        ({"q": [[8.0, 8.0]] * 8 + [[8.0]]}, [2.0] * 9, "group 'q' has [1, 2] layers"),
    ],
    ids=["no groups", "fewer epochs than losses", "more epochs than losses", "no layers", "a layer lost on the way"],
)
def test_history_that_does_not_fit_together_is_refused(norms, losses, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        partial_convergence_test(norms, losses, PreLoRAConfig())


def test_layer_changes_are_signed_and_between_the_last_two_complete_windows():
    epochs = [[1.0, 1.0]] * 2 + [[63.0, 60.0], [65.0, 68.0], [64.0, 62.0], [66.0, 64.0], [999.0, 999.0]]

    assert layer_changes(epochs, PreLoRAConfig(m=2)) == [1.5625, -1.5625]


def test_layer_changes_before_two_windows_are_between_the_last_two_epochs():
    epochs = [[1.0], [2.0], [64.0], [65.0]]

    assert layer_changes(epochs, PreLoRAConfig(m=3)) == [1.5625]


def test_layer_changes_follow_the_window_option():
    epochs = [[1.0], [64.0], [2.0], [65.0]]

    assert layer_changes(epochs, PreLoRAConfig(m=2, window="last")) == [1.5625]


@pytest.mark.parametrize("epochs", [0, 1])
def test_layer_changes_need_two_epochs(epochs):
    with pytest.raises(ValueError, match=f"^{epochs} monitored epochs: ranks need at least 2$"):
        layer_changes([[8.0]] * epochs, PreLoRAConfig())


# criterion = "update_rank".

RANKS = st.one_of(st.integers(1, 12).map(float), st.sampled_from([8.0, 8.0, math.nan, math.inf]))


@st.composite
def update_histories(draw):
    """(config, norms, losses, update ranks) of k windows of one epoch, and up to two windows of ranks more."""
    k, layers = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    windows = draw(st.integers(k - 1, k + 1))
    of_layers = st.lists(RANKS, min_size=layers, max_size=layers)
    of_group = st.lists(of_layers, min_size=windows, max_size=windows)
    ranks = draw(st.dictionaries(st.sampled_from("qkv"), of_group, min_size=1, max_size=3))
    norms = {group: [[draw(st.sampled_from([1.0, 5.0]))] * layers for _ in range(k)] for group in ranks}
    losses = draw(st.lists(st.sampled_from([1.0, 1.0, 1.0, 1.5]), min_size=k, max_size=k))
    fields = {
        "k": k,
        "m": 1,
        "zeta": 10.0,
        "criterion": "update_rank",
        "update_rank_max": draw(st.sampled_from([4, 8])),
    }
    return PreLoRAConfig(**fields), norms, losses, ranks


@given(update_histories())
@settings(max_examples=300, deadline=None)
def test_update_ranks_pass_iff_every_groups_mean_is_low_in_all_last_windows_and_the_loss_stands(history):
    config, norms, losses, ranks = history
    last = {group: windows[-(config.k - 1) :] for group, windows in ranks.items()}
    low = all(sum(w) / len(w) <= config.update_rank_max for windows in last.values() for w in windows)
    stands = all(abs(b / a - 1) * 100 <= config.zeta for a, b in itertools.pairwise(losses))

    verdict = partial_convergence_test(norms, losses, config, ranks)

    assert verdict.passed == (low and stands)


def test_update_ranks_name_the_group_that_holds_back_and_by_how_much():
    ranks = {"q": [[9.0, 7.0], [8.0, 8.0]], "v": [[2.0, 4.0], [8.0, 9.0]]}
    fields = {"k": 3, "criterion": "update_rank", "update_rank_max": 8, "zeta": 10.0}

    verdict = partial_convergence_test(
        {"q": [[1.0] * 2] * 3, "v": [[1.0] * 2] * 3}, [1.0] * 3, PreLoRAConfig(m=1, **fields), ranks
    )

    assert verdict.reason == "update of v in window 3 of 3 has stable rank 8.500: over update_rank_max = 8"
    assert verdict.update_ranks == {"q": (8.0, 8.0), "v": (3.0, 8.5)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_undefined_update_rank_does_not_pass(value):
    verdict = judge({"q": [[1.0]] * 2}, [1.0] * 2, criterion="update_rank", update_ranks={"q": [[value]]})

    assert verdict.reason.startswith("update of q in window 2 of 2 has no stable rank")


def test_fewer_windows_of_update_ranks_than_the_test_reads_are_refused():
    with pytest.raises(ValueError, match="group 'q' has update ranks of 1 windows: the test needs 2"):
        judge({"q": [[1.0]] * 3}, [1.0] * 3, criterion="update_rank", update_ranks={"q": [[1.0]]})
