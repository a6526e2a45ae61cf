"""Means, intervals and paired differences of collected results, held to scipy's."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelora.analysis.results.stats import Sample, band, paired_difference, signed, t_quantile

stats = pytest.importorskip("scipy.stats")

NUMBERS = st.floats(-1e3, 1e3)


@pytest.mark.parametrize("n", range(2, 31))
def test_quantiles_are_students(n):
    assert t_quantile(n) == pytest.approx(stats.t.ppf(0.975, n - 1), abs=5.1e-4)


@pytest.mark.parametrize("n", [0, 1, 31])
def test_no_quantile_beyond_the_table(n):
    with pytest.raises(ValueError, match=f"n = {n}: accepted are 2 to 30 values"):
        t_quantile(n)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-10_000, 10_000).map(lambda value: value / 100), min_size=2, max_size=30, unique=True))
def test_interval_of_the_mean_is_scipys(values):
    sample = Sample(tuple(values))

    low, high = stats.t.interval(0.95, len(values) - 1, loc=sample.mean, scale=stats.sem(values))

    assert (sample.mean - sample.half_width, sample.mean + sample.half_width) == pytest.approx(
        (low, high), rel=2e-3, abs=1e-3 * sample.half_width
    )


def test_one_value_has_no_interval():
    sample = Sample((3.0,))

    assert sample.mean == 3
    assert math.isnan(sample.sd)
    assert math.isnan(sample.half_width)


def test_difference_is_paired_by_seed():
    of, against = {0: 90.1, 1: 91.4, 2: 89.9}, {2: 90.0, 0: 90.4, 1: 91.5}

    found = paired_difference(of, against)

    paired = stats.ttest_rel([90.1, 91.4, 89.9], [90.4, 91.5, 90.0]).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(paired.low, abs=1e-4)
    assert found.mean + found.half_width == pytest.approx(paired.high, abs=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(0, 6), NUMBERS), st.dictionaries(st.integers(0, 6), NUMBERS))
def test_only_seeds_of_both_are_paired(of, against):
    found = paired_difference(of, against)

    shared = sorted(of.keys() & against.keys())
    assert (found.values if found else ()) == tuple(of[seed] - against[seed] for seed in shared)


def test_a_seed_that_was_not_measured_is_left_out():
    assert paired_difference({0: 1.0, 1: math.nan, 2: 5.0}, {0: 0.5, 1: 1.0, 2: math.nan}) == Sample((0.5,))


LINES = st.lists(
    st.dictionaries(st.integers(1, 8).map(float), st.one_of(NUMBERS, st.just(math.nan))), min_size=1, max_size=4
)


@settings(max_examples=100, deadline=None)
@given(LINES)
def test_a_band_is_over_what_every_line_has(lines):
    found = band(lines)

    assert list(found.x) == [x for x in sorted(lines[0]) if all(math.isfinite(line.get(x, math.nan)) for line in lines)]
    assert list(found.low) == [min(line[x] for line in lines) for x in found.x]
    assert list(found.high) == [max(line[x] for line in lines) for x in found.x]
    assert list(found.mean) == pytest.approx([sum(line[x] for line in lines) / len(lines) for x in found.x], abs=1e-9)


@pytest.mark.parametrize(
    ("values", "told"), [((-0.5,), "−0.50"), ((0.25,), "+0.25"), ((1.0, 3.0), "+2.00 ± 12.71")], ids=["-", "+", "two"]
)
def test_a_difference_is_told_with_its_sign(values, told):
    assert Sample(values).told() == told


def test_a_minus_is_printed_as_one():
    assert signed(-1.234, ".1f") == "−1.2"
