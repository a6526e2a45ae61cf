"""RandAugment in a DALI pipeline: the pixels of the NumPy one, whatever shares the batch."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from prelora.data import randaugment
from prelora.data.randaugment import OPS
from prelora.data.sampler import sample_rng
from tests.augmenting import IMAGES, MAGNITUDES, TWO_WAYS, Image, drawn, noise, smooth

nvidia = pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from nvidia.dali import fn, pipeline_def  # noqa: E402 (after the skip)

from prelora.data import dali_randaugment  # noqa: E402

Draws = npt.NDArray[np.float32]
EXACT = [op for op in OPS if op not in TWO_WAYS and op != "Equalize"]


def in_dali(images: Sequence[Image], draws: Sequence[Draws], batch: int | None = None) -> list[Image]:
    """The images after their draws, ``batch`` at a time."""
    batch = batch or len(images)
    fed = iter([(images[at : at + batch], draws[at : at + batch]) for at in range(0, len(images), batch)])

    @pipeline_def(batch_size=batch, num_threads=2, device_id=None, enable_conditionals=True, prefetch_queue_depth=1)
    def pipeline():  # type: ignore[no-untyped-def]
        pixels, rows = fn.external_source(lambda: next(fed), num_outputs=2, batch=True, layout=["HWC", ""])
        return dali_randaugment.apply(pixels, rows, draws[0].shape[0])

    built = pipeline()
    built.build()
    runs = [built.run()[0] for _ in range(-(-len(images) // batch))]
    return [np.array(run[place]) for run in runs for place in range(len(run))]


def samples(op: str, size: int) -> tuple[list[Image], list[Draws]]:
    """Every image at every magnitude, in both directions where there are two."""
    signs = (1, -1) if op in TWO_WAYS else (1,)
    chosen = [
        (make(size), drawn(op, magnitude, size, sign))
        for make in IMAGES.values()
        for magnitude in MAGNITUDES
        for sign in signs
    ]
    return [image for image, _ in chosen], [draws for _, draws in chosen]


@pytest.mark.parametrize("size", [33, 64])
@pytest.mark.parametrize("op", EXACT)
def test_what_changes_values_gives_the_bits_of_numpys(op: str, size: int) -> None:
    images, draws = samples(op, size)
    for image, rows, augmented in zip(images, draws, in_dali(images, draws), strict=True):
        assert np.array_equal(augmented, randaugment.apply(image, rows))


@pytest.mark.parametrize("size", [33, 64])
def test_equalize_is_off_by_one_at_most(size: int) -> None:
    # DALI's operator rounds to 256 values before the original's formula can be applied.
    images, draws = samples("Equalize", size)
    for image, rows, augmented in zip(images, draws, in_dali(images, draws), strict=True):
        assert np.abs(augmented.astype(int) - randaugment.apply(image, rows)).max() <= 1


@pytest.mark.parametrize("size", [33, 64])
@pytest.mark.parametrize("op", TWO_WAYS)
def test_what_moves_pixels_differs_from_numpys_at_halves_alone(op: str, size: int) -> None:
    images, draws = samples(op, size)
    for image, rows, augmented in zip(images, draws, in_dali(images, draws), strict=True):
        elsewhere = ~between_two_pixels(rows[0, 1:], size)
        assert np.array_equal(augmented[elsewhere], randaugment.apply(image, rows)[elsewhere])


def between_two_pixels(matrix: Draws, size: int) -> npt.NDArray[np.bool_]:
    """Where a pixel comes from the middle between two, so that float32 decides which of them is the nearer."""
    y, x = np.indices((size, size), dtype=np.float64)
    a, b, c, d, e, f = matrix.astype(np.float64)
    sources = np.stack([a * x + b * y + c, d * x + e * y + f])
    return (np.abs(sources - np.floor(sources) - 0.5) < 1e-3).any(axis=0)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("op", TWO_WAYS)
def test_halves_are_few(op: str, magnitude: float) -> None:
    assert between_two_pixels(drawn(op, magnitude, 224)[0, 1:], 224).mean() <= 0.11


@pytest.fixture(scope="module")
def mixed() -> tuple[list[Image], list[Draws]]:
    """Two dozen samples of several sizes, each with three operations of its own."""
    images, draws = [], []
    for sample in range(24):
        size = (33, 48, 64)[sample % 3]
        images.append(noise(size) if sample % 2 else smooth(size))
        draws.append(randaugment.draw(sample_rng(0, 0, sample), 3, 15, size))
    return images, draws


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_pixels_do_not_hang_on_the_batch(mixed: tuple[list[Image], list[Draws]], batch: int) -> None:
    images, draws = mixed
    for alone, together in zip(in_dali(images, draws, batch), in_dali(images, draws), strict=True):
        assert np.array_equal(alone, together)


@pytest.mark.parametrize("ops", itertools.permutations(["Invert", "SolarizeAdd", "Cutout"]))
def test_operations_follow_each_other_in_the_draws_order(ops: tuple[str, ...]) -> None:
    draws = np.concatenate([drawn(op, 15, 64) for op in ops])
    (augmented,) = in_dali([noise(64)], [draws])
    assert np.array_equal(augmented, randaugment.apply(noise(64), draws))
