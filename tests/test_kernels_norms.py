"""``kernels/weight_norms.py`` in Triton's interpreter: sums of squares of mixed tensors against float64.

Also ``kernels/autotune.py``, which chooses their launch configuration, with an injected clock.
"""

import json
import math
import sys
import warnings
from dataclasses import asdict, dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels are Triton's")

from prelora.kernels import autotune
from prelora.kernels import weight_norms as kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = 1e-6
"""Relative; the squares are all positive, so it holds whatever the values."""

VIEWS = {
    "whole": lambda t: t,
    "first columns": lambda t: t[:, : max(1, t.shape[1] - 3)],
    "later columns": lambda t: t[:, t.shape[1] // 2 :],
    "every other column": lambda t: t[:, ::2],
    "rows": lambda t: t[t.shape[0] // 2 :],
    "every other row": lambda t: t[::2],
    "transposed": lambda t: t.t(),
    "flat from the second": lambda t: t.flatten()[1:],
    "repeated": lambda t: t.expand(3, *t.shape),
    "three axes": lambda t: torch.stack([t, t], 1)[:, :, : t.shape[1] // 2 + 1],
}

tensors = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 260), st.sampled_from(DTYPES), st.sampled_from(sorted(VIEWS))),
    min_size=1,
    max_size=6,
)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(tensors):
    return torch.stack([tensor.double().square().sum() for tensor in tensors])


def assert_close(actual, tensors):
    expected = exact(tensors)
    assert actual.dtype == torch.float32
    assert bool(((actual.double() - expected).abs() <= TOLERANCE * expected).all()), (actual, expected)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a launcher allocates is NaN until a kernel writes it."""
    empty = torch.empty

    def allocated(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", allocated)


@given(tensors)
@settings(max_examples=100, deadline=None)
def test_sums_are_those_of_float64(drawn):
    views = [VIEWS[view](draw(rows, columns, dtype=dtype)) for rows, columns, dtype, view in drawn]
    assert_close(kernels.sums_of_squares(views), views)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", range(9))
def test_any_alignment(dtype, offset):
    base = draw(9000, dtype=dtype)
    views = [base[offset : offset + length] for length in (0, 1, 2, 5, 8, 9, 4095, 4096, 4097, 8191)]
    assert_close(kernels.sums_of_squares(views), views)


@pytest.mark.parametrize("size", [kernels.CANDIDATES[0].chunk + d for d in (-1, 0, 1, kernels.CANDIDATES[0].block)])
def test_sizes_around_a_span(size):
    tensors = [draw(size), draw(3, 2 * size)[:, :size]]
    assert_close(kernels.sums_of_squares(tensors), tensors)


def test_four_million_elements():
    tensors = [draw(2048, 2048).mul_(0.02), draw(4096, 1024, dtype=torch.bfloat16), torch.full((4096, 1024), 1e-3)]
    assert_close(kernels.sums_of_squares(tensors), tensors)


def test_more_spans_than_are_added_at_once():
    tensors = [draw(kernels.ADDED_AT_ONCE + 9, 80)[:, :70]]
    assert_close(kernels.sums_of_squares(tensors), tensors)


def test_hundreds_of_tensors():
    tensors = [draw(i % 37, 16 + i % 5, dtype=DTYPES[i % 3], seed=i) for i in range(400)]
    assert_close(kernels.sums_of_squares(tensors), tensors)


def test_empty_tensors_give_zero():
    sums = kernels.sums_of_squares([draw(0), draw(3, 0), draw(0, 8, dtype=torch.float16)])
    assert sums.tolist() == [0.0, 0.0, 0.0]
    assert kernels.sums_of_squares([]).shape == (0,)


def test_scalars_and_parameters():
    tensors = [torch.tensor(-3.0), torch.nn.Parameter(draw(5, 6)), draw(2, 3, 4, 5)]
    sums = kernels.sums_of_squares(tensors)
    assert not sums.requires_grad
    assert_close(sums, tensors)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_values_that_are_not_finite_reach_their_own_sum_only(value):
    tensors = [draw(70, 70), draw(70, 70), draw(70, 70)]
    tensors[1][69, 69] = value
    sums = kernels.sums_of_squares(tensors)
    assert sums.isfinite().tolist() == [True, False, True]


def test_equal_inputs_give_equal_bits_wherever_they_stand():
    tensors = [draw(300, 300, seed=i) for i in range(3)]
    first = kernels.sums_of_squares(tensors)
    assert torch.equal(first, kernels.sums_of_squares(tensors))
    assert torch.equal(first.flip(0), kernels.sums_of_squares(tensors[::-1]))


def test_values_read_are_those_of_the_moment():
    tensor = draw(70, 70)
    for _ in range(3):
        assert_close(kernels.sums_of_squares([tensor]), [tensor])
        tensor.mul_(2)


def test_a_tensor_that_moves_is_not_read_where_it_was():
    tensors = [draw(70, 70), draw(50, 50)]
    for seed in range(3):
        kernels.sums_of_squares(tensors)
        old, tensors[1] = tensors[1], draw(50, 50, seed=seed)
        old.fill_(math.nan)
        assert_close(kernels.sums_of_squares(tensors), tensors)


def test_norms_are_the_roots_unless_squares_are_asked_for():
    tensors = [draw(30, 20), draw(7, 5, dtype=torch.bfloat16)]
    assert_close(kernels.weight_norms(tensors, True), tensors)
    assert_close(kernels.weight_norms(tensors, False).square(), tensors)


@given(st.integers(0, 200_000))
def test_spans_cover_every_column_once(columns):
    chunk = kernels.CANDIDATES[0].chunk
    ends = [min(chunk, columns - span * chunk) for span in range(kernels.spans(columns))]
    assert sum(ends) == columns
    assert all(0 < length <= chunk for length in ends)


@pytest.mark.parametrize(
    ("view", "copied"),
    [("whole", False), ("rows", False), ("first columns", False), ("transposed", False), ("every other column", True)],
)
def test_views_are_read_in_place_where_their_rows_are_contiguous(view, copied):
    tensor = VIEWS[view](draw(80, 160))
    assert (kernels.rows_of(tensor).data_ptr() != tensor.data_ptr()) == copied


def test_narrow_rows_are_copied_together():
    assert kernels.rows_of(draw(100, 128)[:, :8]).shape == (1, 800)


def test_traffic_is_every_byte_once_and_the_partial_sums():
    tensors = [
        torch.empty(1000, 1000, device="meta"),
        torch.empty(10, 200, device="meta", dtype=torch.float16)[:, :100],
    ]
    assert kernels.traffic(tensors) == 4_000_000 + 2 * 4 * 31 + 4 + 2 * 10 * 100 + 2 * 4 * 10 + 4


def test_what_has_no_kernel_is_refused():
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        kernels.sums_of_squares([draw(3).double()])
    with pytest.raises(ValueError, match="on one device, not on"):
        kernels.sums_of_squares([draw(3), torch.empty(3, device="meta")])


def test_every_configuration_that_tuning_may_choose_gives_the_same_sums(monkeypatch):
    tensors = [draw(70_001), draw(300, 300, dtype=torch.float16), draw(5, 100)[:, :80]]
    for config in kernels.CANDIDATES:
        monkeypatch.setattr(kernels, "tuned", lambda *_, config=config: config)
        assert_close(kernels.sums_of_squares(tensors), tensors)


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int = 4


CONFIGS = (Config(16), Config(32), Config(64, 8))
SPEEDS = {16: 3.0, 32: 1.0, 64: 2.0}
"""Milliseconds by block: the second is the fastest."""


class Clock:
    """Stands for ``do_bench``: what a launch returns is how long it took."""

    def __init__(self, speeds=SPEEDS):
        self.speeds = speeds
        self.measured = []

    def prepare(self, config):
        return lambda: (self.measured.append(config.block), self.speeds[config.block])[1]

    def __call__(self, launch):
        return launch()


def tuner(path, clock):
    return autotune.Tuner(path / "cache" / "autotune.json", clock)


def test_the_fastest_is_chosen_and_measured_once(tmp_path):
    clock = Clock()
    one = tuner(tmp_path, clock)
    assert [one.choose("key", CONFIGS, clock.prepare) for _ in range(3)] == [Config(32)] * 3
    assert clock.measured == [16, 32, 64]
    assert json.loads(one.path.read_text()) == {"key": {"config": asdict(Config(32)), "milliseconds": 1.0}}


def test_the_next_process_reads_it_from_disk(tmp_path):
    clock = Clock()
    tuner(tmp_path, clock).choose("key", CONFIGS, clock.prepare)
    later = Clock({})
    assert tuner(tmp_path, later).choose("key", CONFIGS, later.prepare) == Config(32)
    assert later.measured == []


def test_each_key_has_its_own_winner_and_processes_keep_each_others(tmp_path):
    clock, other = Clock(), Clock({16: 1.0, 32: 2.0, 64: 3.0})
    first, second = tuner(tmp_path, clock), tuner(tmp_path, other)
    assert first.choose("a", CONFIGS, clock.prepare) == Config(32)
    assert second.choose("b", CONFIGS, other.prepare) == Config(16)
    assert first.choose("c", CONFIGS, clock.prepare) == Config(32)
    assert sorted(json.loads(first.path.read_text())) == ["a", "b", "c"]


def test_a_winner_that_is_no_candidate_any_more_is_measured_anew(tmp_path):
    clock = Clock()
    tuner(tmp_path, clock).choose("key", CONFIGS, clock.prepare)
    left = (CONFIGS[0], CONFIGS[2])
    assert tuner(tmp_path, clock).choose("key", left, clock.prepare) == Config(64, 8)


def test_a_candidate_that_the_device_cannot_launch_loses(tmp_path):
    from triton.runtime.errors import OutOfResources

    clock = Clock()

    def prepare(config):
        if config.block == 32:
            raise OutOfResources(200, 99, "shared memory")
        return clock.prepare(config)

    assert tuner(tmp_path, clock).choose("key", CONFIGS, prepare) == Config(64, 8)
    with pytest.raises(RuntimeError, match=r"no candidate can be launched for other: .*Config"):
        tuner(tmp_path, clock).choose("other", CONFIGS[1:2], prepare)


@pytest.mark.parametrize("damage", ["", "{", "[1]", "\x00", '{"key": 3}', '{"key": {"config": [16]}}'])
def test_a_damaged_file_is_measured_anew_and_rewritten(tmp_path, damage):
    clock = Clock()
    one = tuner(tmp_path, clock)
    one.path.parent.mkdir()
    one.path.write_text(damage)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert one.choose("key", CONFIGS, clock.prepare) == Config(32)
    assert len(caught) == (0 if damage.startswith('{"key"') else 1)
    assert all("autotune.json" in str(warning.message) for warning in caught)
    assert json.loads(one.path.read_text())["key"]["config"] == asdict(Config(32))
    assert [file.name for file in one.path.parent.iterdir()] == ["autotune.json"]


def test_a_place_that_cannot_be_written_costs_only_a_warning(tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    clock = Clock()
    one = tuner(tmp_path, clock)
    with pytest.warns(UserWarning, match="cannot be written, the next run measures anew"):
        assert one.choose("key", CONFIGS, clock.prepare) == Config(32)
    assert one.choose("key", CONFIGS, clock.prepare) == Config(32)
    assert clock.measured == [16, 32, 64]


@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_without_a_gpu_or_unasked_the_heuristic_decides(monkeypatch, asked):
    monkeypatch.delenv("PRELORA_AUTOTUNE", raising=False)
    if asked:
        monkeypatch.setenv("PRELORA_AUTOTUNE", asked)
    device = torch.device("cpu" if asked == "1" else "cuda")
    assert autotune.tuned("kernel", device, (), CONFIGS, lambda config: pytest.fail("measured")) == CONFIGS[0]


def test_on_a_gpu_the_key_names_kernel_device_triton_and_shape(monkeypatch, tmp_path):
    keys = []
    monkeypatch.setenv("PRELORA_AUTOTUNE", "1")
    monkeypatch.setenv("PRELORA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(autotune.Tuner, "choose", lambda self, key, *_: keys.append((self.path, key)))
    autotune.tuned("sums bf16", torch.device("cuda"), (1024, 8), CONFIGS, Clock().prepare)
    version = sys.modules["triton"].__version__
    assert keys == [(tmp_path / "autotune.json", f"sums bf16 | NVIDIA X | triton {version} | 1024 8")]


def test_the_cache_is_in_the_home_directory_unless_told(monkeypatch, tmp_path):
    monkeypatch.delenv("PRELORA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert autotune.cache_directory() == tmp_path / ".cache" / "prelora"
