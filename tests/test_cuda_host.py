"""``csrc/cuda/grouped_gemm.cu`` runs as C++ on a CPU, against float64 and under the sanitizers."""

import itertools
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from csrc.host import FLAGS, Call, Product, compile_host, run, run_raw
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

if shutil.which("g++") is None:
    pytest.skip("no g++ to compile csrc/cuda with", allow_module_level=True)

FP32, BF16, FP16 = "float32", "bfloat16", "float16"
RANKS = (1, 2, 3, 7, 8, 12, 16, 17, 24, 32, 48, 64, 100, 128)
DTYPES = {
    "fp32": (FP32,) * 4,
    "bf16": (BF16,) * 4,
    "merge to bf16": (FP32, FP32, BF16, FP32),
    "merge to fp16": (FP32, FP32, FP16, FP32),
    "merge of bf16 weights": (FP32, FP32, BF16, BF16),
    "16-bit factors, fp32 weights": (BF16, BF16, FP32, FP32),
    "gradient of A from bf16": (FP32, BF16, FP32, FP32),
    "gradient of B from fp16": (FP16, FP32, FP32, FP32),
    "both 16-bit types": (BF16, FP16, FP16, BF16),
}
TRANSPOSES = list(itertools.product((False, True), repeat=2))
products = st.builds(
    Product,
    *(st.integers(0, most) for most in (140, 140, 90)),
    trans_a=st.booleans(),
    trans_b=st.booleans(),
    alpha=st.sampled_from((1.0, -0.5)),
    beta=st.sampled_from((0.0, 1.0, -2.0)),
    gap=st.integers(0, 9),
    shift=st.integers(0, 8),
    d_is_c=st.booleans(),
)


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Builds the executable with a sanitizer, once for all workers of this run of pytest."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def built(kind):
        target = folder / f"grouped_gemm_{kind}"
        with FileLock(f"{target}.lock"):
            return target if target.exists() else compile_host(folder, kind)

    return built


@pytest.fixture(params=FLAGS)
def each_build(request, build):
    """Without a sanitizer, under AddressSanitizer and UndefinedBehaviorSanitizer, under ThreadSanitizer."""
    return build(request.param)


@pytest.fixture(scope="session")
def plain(build):
    return build("plain")


def assert_right(executable, call, **options):
    outcome = run(executable, call, **options)
    assert (outcome.error, outcome.reason) == (0, "")
    for index, c in enumerate(outcome.c):
        call.assert_close(index, c)
    return outcome


def assert_right_squares(executable, call, **options):
    outcome = run(executable, call, squares=True, **options)
    assert (outcome.error, outcome.reason) == (0, "")
    for index, actual in enumerate(outcome.squares):
        c, size = call.exact(index)
        assert abs(actual - (c**2).sum()) <= 1e-6 * (size**2).sum(), call.products[index]


def mixed(**options):
    """Every shape of tile with tails in all dimensions, a split sum, no rank, and matrices without elements."""
    return [
        Product(70, 67, 19, beta=1.0, **options),
        Product(20, 140, 37, trans_a=True, beta=-0.5, **options),
        Product(140, 20, 37, trans_b=True, alpha=0.25, **options),
        Product(5, 133, 530, trans_a=True, beta=2.0, **options),
        Product(33, 9, 0, beta=2.0, **options),
        Product(33, 9, 0, **options),
        Product(0, 8, 4, beta=1.0, **options),
        Product(8, 0, 4, **options),
        Product(1, 1, 1, **options),
    ]


def test_mixed_shapes_under_every_sanitizer(each_build):
    call = Call(mixed())
    assert_right(each_build, call, multiprocessors=1)
    assert_right_squares(each_build, call, multiprocessors=1)


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_unaligned_16_bit_matrices_under_a_sanitizer(build, kind):
    assert_right(build(kind), Call(mixed(shift=1, gap=3), DTYPES["bf16"]), multiprocessors=1)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("shift", "gap"), [(0, 0), (0, 8), (1, 0), (0, 1)])
def test_dtypes_and_alignments(plain, dtypes, shift, gap):
    assert_right(plain, Call(mixed(shift=shift, gap=gap), dtypes))


@settings(max_examples=25, deadline=None)
@given(st.lists(products, max_size=4), st.tuples(*[st.sampled_from((FP32, BF16, FP16))] * 4))
def test_any_products(plain, drawn, dtypes):
    same = dtypes[2] == dtypes[3]
    drawn = [replace(product, d_is_c=product.d_is_c and same) for product in drawn]
    assert_right(plain, Call(drawn, dtypes))
    assert_right_squares(plain, Call(drawn, dtypes))


@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["bf16"], DTYPES["gradient of A from bf16"]], ids=str)
def test_transposes(plain, dtypes):
    sizes = [(64, 64, 32), (70, 50, 37), (20, 150, 64), (150, 20, 64), (16, 24, 300)]
    assert_right(plain, Call([Product(*size, *trans) for size in sizes for trans in TRANSPOSES], dtypes))


@pytest.mark.parametrize("dtypes", [DTYPES["merge to bf16"], DTYPES["fp32"]], ids=str)
def test_ranks_from_1_to_128(plain, dtypes):
    merges = [Product(72, 80, rank, beta=1.0, alpha=2.0 / rank) for rank in RANKS]
    assert_right(plain, Call(merges, dtypes))


def test_gradients_of_ranks_from_1_to_128(plain):
    grad_a = [Product(rank, 136, 72, trans_a=True) for rank in RANKS]
    grad_b = [Product(72, rank, 136, trans_b=True) for rank in RANKS]
    assert_right(plain, Call(grad_a + grad_b))


def test_a_thousand_groups(plain):
    sizes = [(1 + i % 7, 1 + i % 5, i % 4) for i in range(1000)]
    call = Call([Product(*size, beta=float(i % 2)) for i, size in enumerate(sizes)])
    outcome = assert_right(plain, call)
    assert outcome.launches == 1


def test_no_groups(plain):
    assert run(plain, Call([])).launches == 0
    assert run(plain, Call([]), squares=True).launches == 0


def test_d_may_be_c(plain):
    call = Call([Product(70, 67, 19, beta=1.0, d_is_c=True), Product(9, 133, 700, beta=0.5, d_is_c=True)])
    assert_right(plain, call)


@pytest.mark.parametrize("k", [0, 19, 700])
def test_nan_in_d_does_not_reach_c_where_beta_is_0(plain, k):
    assert_right(plain, Call([Product(9, 67, k, fill_d=np.nan)]))


@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["bf16"]], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_nan_in_an_operand_reaches_its_row_or_column_only(plain, name, dtypes):
    call = Call([Product(40, 50, 20)], dtypes)
    matrix = call.matrices[0][name]
    matrix[3, 3] = np.iinfo(matrix.dtype).max >> 1
    (c,) = run(plain, call).c
    expected = np.zeros((40, 50), dtype=bool)
    expected[(3, slice(None)) if name == "a" else (slice(None), 3)] = True
    np.testing.assert_array_equal(np.isnan(c), expected)


def test_results_depend_neither_on_the_grid_nor_on_the_order_of_warps(plain):
    call = Call(mixed())
    first, *others = [run(plain, call, multiprocessors=m, seed=s) for m, s in [(1, 0), (2, 1), (3, 2), (132, 5)]]
    for other in others:
        for expected, actual in zip(first.c, other.c, strict=True):
            np.testing.assert_array_equal(actual, expected)


def test_products_of_fp32_are_as_exact_as_fp32_sums(plain):
    """Rms error at most twice that of numpy's fp32 product, over ranks and over long sums all of one sign."""
    for size, positive in [((64, 64, 64), False), ((32, 128, 4096), False), ((32, 128, 4096), True)]:
        call = Call([Product(*size)])
        if positive:
            for name in "ab":
                call.matrices[0][name] &= 0x7FFFFFFF
        (c,) = run(plain, call).c
        exact, _ = call.exact(0)
        in_fp32 = call.values(0, "a").astype(np.float32) @ call.values(0, "b").astype(np.float32)

        def rms(x, exact=exact):
            return np.sqrt(((x - exact) ** 2).mean())

        assert rms(c) <= 2 * rms(in_fp32)


def test_a_second_launch_only_where_sums_are_split(plain):
    assert run(plain, Call([Product(70, 67, 128)])).launches == 1
    assert run(plain, Call([Product(70, 67, 128), Product(8, 67, 900)])).launches == 2


@pytest.mark.parametrize("squares", [False, True])
def test_an_error_of_the_launch_is_returned(plain, squares):
    assert run(plain, Call([Product(8, 8, 8)]), squares=squares, launch_error=719).error == 719


@pytest.mark.parametrize("squares", [False, True])
def test_a_device_without_multiprocessors_is_refused(plain, squares):
    outcome = run(plain, Call([Product(8, 8, 8)]), squares=squares, multiprocessors=0)
    assert (outcome.error, outcome.launches) == (1, 0)


PLANTED = Call(
    [Product(70, 40, 40, beta=1.0), Product(20, 72, 400, trans_a=True, beta=0.5), Product(40, 200, 9, beta=1.0)]
)


def barriers_and_waits(plain, squares):
    whole = run(plain, PLANTED, squares=squares, multiprocessors=1)
    assert (whole.barriers, whole.waits) == ((8, 5) if squares else (6, 5))
    return whole


@pytest.mark.parametrize("squares", [False, True], ids=["gemm", "squares"])
def test_any_missing_barrier_is_a_race_to_thread_sanitizer(build, squares):
    whole = barriers_and_waits(build("plain"), squares)
    for barrier in range(whole.barriers):
        packed = PLANTED.pack(squares=squares, multiprocessors=1, skipped_barrier=barrier)
        process = run_raw(build("thread"), packed)
        assert process.returncode == 66
        assert b"WARNING: ThreadSanitizer: data race" in process.stderr


@pytest.mark.parametrize("squares", [False, True], ids=["gemm", "squares"])
def test_any_missing_barrier_or_wait_changes_results(plain, squares):
    whole = barriers_and_waits(plain, squares)
    left_out = [{"skipped_barrier": barrier} for barrier in range(whole.barriers)]
    left_out += [{"skipped_wait": wait} for wait in range(whole.waits)]
    for option in left_out:
        outcome = run(plain, PLANTED, squares=squares, multiprocessors=1, **option)
        pairs = zip([*whole.c, whole.squares], [*outcome.c, outcome.squares], strict=True)
        assert not all(np.array_equal(x, y, equal_nan=True) for x, y in pairs), option
