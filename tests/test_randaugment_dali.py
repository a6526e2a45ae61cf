"""RandAugment in a DALI pipeline: the pixels of the NumPy one, whatever shares the batch."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from prelora.data.randaugment import OPS, Floats, apply, draw, drawn
from prelora.data.sampler import sample_rng
from tests.augmenting import IMAGES, MAGNITUDES, TWO_WAYS, Image, noise, smooth

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from nvidia.dali import backend, fn, pipeline_def

from prelora.data import dali_randaugment

SIZES = (33, 64)
OFF_BY_ONE = ("AutoContrast", "Equalize")
EXACT = [op for op in OPS if op not in TWO_WAYS and op not in OFF_BY_ONE]

in_each_way = pytest.mark.parametrize("size", SIZES)
at_each_magnitude = pytest.mark.parametrize("magnitude", MAGNITUDES)


def in_dali(
    images: Sequence[Image], draws: Sequence[Floats], magnitude: float, batch: int | None = None
) -> list[Image]:
    """The images after their draws, ``batch`` at a time."""
    batch = batch or len(images)
    fed = iter([(images[at : at + batch], draws[at : at + batch]) for at in range(0, len(images), batch)])

    @pipeline_def(batch_size=batch, num_threads=2, device_id=None, enable_conditionals=True, prefetch_queue_depth=1)
    def pipeline() -> Any:
        pixels, rows = fn.external_source(lambda: next(fed), num_outputs=2, batch=True, layout=["HWC", ""])
        return dali_randaugment.apply(pixels, rows, num_ops=len(draws[0]), magnitude=magnitude, size=images[0].shape[0])

    built = pipeline()
    built.build()
    runs = [built.run()[0] for _ in range(-(-len(images) // batch))]
    return [np.array(run[place]) for run in runs for place in range(len(run))]


@functools.cache
def every_operation(magnitude: float, size: int) -> list[tuple[str, Floats, Image, Image]]:
    """Operation, draw, and what NumPy and DALI make of it: every image, and both directions where there are two."""
    ways = [(op, sign) for op in OPS for sign in ((1, -1) if op in TWO_WAYS else (1,))]
    draws = [(op, drawn(op, magnitude, size, sign, (5, 30))) for (op, sign) in ways for _ in IMAGES]
    images = [make(size) for _ in ways for make in IMAGES.values()]
    augmented = in_dali(images, [row[None] for _, row in draws], magnitude)
    return [
        (op, row, apply(image, row[None]), out) for (op, row), image, out in zip(draws, images, augmented, strict=True)
    ]


def pairs(op: str, magnitude: float, size: int) -> Iterator[tuple[Floats, Image, Image]]:
    """Draw, NumPy's pixels and DALI's, of one operation."""
    return (rest for name, *rest in every_operation(magnitude, size) if name == op)  # type: ignore[misc]


@in_each_way
@at_each_magnitude
@pytest.mark.parametrize("op", EXACT)
def test_what_changes_values_gives_the_bits_of_numpys(op: str, magnitude: float, size: int) -> None:
    for _, expected, augmented in pairs(op, magnitude, size):
        assert np.array_equal(augmented, expected)


@in_each_way
@pytest.mark.parametrize("op", OFF_BY_ONE)
def test_what_an_images_own_range_decides_is_off_by_one_at_most(op: str, size: int) -> None:
    # AutoContrast: the original's float32 misses whole numbers. Equalize: DALI's operator rounds before its formula.
    for _, expected, augmented in pairs(op, 15, size):
        assert np.abs(augmented.astype(int) - expected).max() <= 1


@in_each_way
@at_each_magnitude
@pytest.mark.parametrize("op", TWO_WAYS)
def test_what_moves_pixels_differs_from_numpys_at_halves_alone(op: str, magnitude: float, size: int) -> None:
    for row, expected, augmented in pairs(op, magnitude, size):
        elsewhere = ~between_two_pixels(row[1:], size)
        assert np.array_equal(augmented[elsewhere], expected[elsewhere])


def between_two_pixels(matrix: Floats, size: int) -> npt.NDArray[np.bool_]:
    """Where a pixel comes from the middle between two, so that float32 decides which of them is the nearer."""
    y, x = np.indices((size, size), dtype=np.float64)
    a, b, c, d, e, f = matrix.astype(np.float64)
    sources = np.stack([a * x + b * y + c, d * x + e * y + f])
    return (np.abs(sources - np.floor(sources) - 0.5) < 1e-3).any(axis=0)


@at_each_magnitude
@pytest.mark.parametrize("op", TWO_WAYS)
def test_halves_are_few(op: str, magnitude: float) -> None:
    assert between_two_pixels(drawn(op, magnitude, 224)[1:], 224).mean() <= 0.11


@functools.cache
def mixed() -> tuple[list[Image], list[Floats]]:
    """Two dozen samples, each with three operations of its own."""
    images = [noise(48) if sample % 2 else smooth(48) for sample in range(24)]
    return images, [draw(sample_rng(0, 0, sample), 3, 15, 48) for sample in range(24)]


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_pixels_do_not_hang_on_the_batch(batch: int) -> None:
    images, draws = mixed()
    for alone, together in zip(in_dali(images, draws, 15, batch), in_dali(images, draws, 15), strict=True):
        assert np.array_equal(alone, together)


def test_operations_follow_each_other_in_the_draws_order() -> None:
    orders = list(itertools.permutations(["Invert", "SolarizeAdd", "Cutout"]))
    draws = [np.stack([drawn(op, 15, 64, centre=(5, 30)) for op in ops]) for ops in orders]
    augmented = in_dali([noise(64)] * len(orders), draws, 15)
    assert all(np.array_equal(out, apply(noise(64), rows)) for out, rows in zip(augmented, draws, strict=True))


def test_a_gpus_images_stay_there_through_operators_that_it_has() -> None:
    """The pipeline is defined for a GPU, not run: what its definition holds needs none."""

    @pipeline_def(batch_size=4, num_threads=1, device_id=0, enable_conditionals=True)
    def pipeline() -> Any:
        pixels, rows = fn.external_source(lambda: None, num_outputs=2, batch=True, layout=["HWC", ""])
        images = dali_randaugment.apply(pixels.gpu(), rows, num_ops=2, magnitude=15, size=48)
        defined.append(images)
        return images

    defined: list[Any] = []
    pipeline()
    operators = {op for node in defined for op in behind(node)}
    on_gpu = {name for name, device in operators if device == "gpu"}
    assert defined[0].device == "gpu"
    assert {"LookupTable", "WarpAffine", "Equalize", "Erase", "Filter"} <= on_gpu <= set(backend.RegisteredGPUOps())
    assert {name for name, device in operators if device == "cpu"} <= set(backend.RegisteredCPUOps())


def behind(node: Any) -> set[tuple[str, str]]:
    """Schema and device of every operator that an edge of a DALI graph comes from."""
    found, seen, waiting = set(), set(), [node]
    while waiting:
        source = waiting.pop().source
        if source is not None and id(source) not in seen:
            seen.add(id(source))
            found.add((getattr(source._op, "schema_name", "ExternalSource"), source._op.device))
            waiting += source.inputs
    return found
