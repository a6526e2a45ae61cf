"""AugReg's RandAugment: the pixels of the original, its levels and its quirks, and draws that are a sample's own."""

import zlib

import numpy as np
import pytest

from prelora.data.randaugment import FILL, OPS, Floats, apply, draw, drawn
from prelora.data.sampler import sample_rng
from tests.augmenting import MAGNITUDES, Image, flat, noise, smooth, sparse

# CRC-32 of what the original gives under TensorFlow 2.15.1 and NumPy 1.26.4 for noise(37), at magnitudes 0, 2, 5, 10,
# 15 and 20 in both directions. Without Sharpness: sums of float32 in TensorFlow miss whole numbers.
TENSORFLOW = {
    "AutoContrast": 0x7A4E294F,
    "Equalize": 0x4E8288ED,
    "Invert": 0xD6CC519E,
    "Rotate": 0xC2625118,
    "Posterize": 0x3D8064C4,
    "Solarize": 0x62D161DD,
    "Color": 0x7E22C78A,
    "Contrast": 0xDBB5BB62,
    "Brightness": 0x29FFE8AB,
    "ShearX": 0x159681FD,
    "ShearY": 0x4B3E9D17,
    "TranslateX": 0xE8706530,
    "TranslateY": 0xEA46C51A,
    "Cutout": 0xE2F2EF95,
    "SolarizeAdd": 0xADCBD4EB,
}


def only(image: Image, operation: Floats) -> Image:
    """The image after one operation."""
    return apply(image, operation[None])


@pytest.mark.parametrize("op", TENSORFLOW)
def test_pixels_are_those_of_the_tensorflow_code(op: str) -> None:
    digest = 0
    for magnitude in (0, 2, 5, 10, 15, 20):
        for sign in (1, -1):
            digest = zlib.crc32(only(noise(37), drawn(op, magnitude, 37, sign, (5, 30))).tobytes(), digest)
    assert digest == TENSORFLOW[op]


@pytest.mark.parametrize(
    ("op", "at_15"),
    [
        ("AutoContrast", ()),
        ("Equalize", ()),
        ("Invert", ()),
        ("Posterize", (0b11111100,)),
        ("Solarize", (128,)),
        ("SolarizeAdd", (165,)),
        ("Color", (2.8,)),
        ("Contrast", (2.8, 196)),
        ("Brightness", (2.8, 0)),
        ("Sharpness", (2.8,)),
        ("Rotate", (0.70711, -0.70711, 111.5, 0.70711, 0.70711, 111.5 - 111.5 * 2**0.5)),
        ("ShearX", (1, 0.45, 0, 0, 1, 0)),
        ("ShearY", (1, 0, 0, 0.45, 1, 0)),
        ("TranslateX", (1, 0, 150, 0, 1, 0)),
        ("TranslateY", (1, 0, 0, 0, 1, 150)),
        ("Cutout", (40, 0, 120, 110)),
    ],
)
def test_levels_are_not_clipped(op: str, at_15: tuple[float, ...]) -> None:
    assert drawn(op, 15, 224, centre=(100, 50))[1 : 1 + len(at_15)] == pytest.approx(at_15, abs=1e-4)


@pytest.mark.parametrize(("magnitude", "first"), [(0, 0), (5, 128), (10, 0), (15, 128), (20, 0)])
def test_solarize_inverts_from_the_thresholds_low_byte_on(magnitude: int, first: int) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = np.where(values >= first, 255 - values, values)
    assert np.array_equal(only(values, drawn("Solarize", magnitude, 16)), expected)


@pytest.mark.parametrize(("magnitude", "kept"), [(0, 1), (5, 2), (10, 4), (15, 6), (20, 8)])
def test_posterize_keeps_the_high_bits_and_never_none(magnitude: int, kept: int) -> None:
    assert len(np.unique(only(noise(37), drawn("Posterize", magnitude, 37)))) == 2**kept


@pytest.mark.parametrize("op", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_enhancing_changes_nothing_at_magnitude_5(op: str) -> None:
    assert np.array_equal(only(noise(37), drawn(op, 5, 37)), noise(37))


@pytest.mark.parametrize("op", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd"])
def test_moving_changes_nothing_at_magnitude_0(op: str) -> None:
    assert np.array_equal(only(noise(37), drawn(op, 0, 37)), noise(37))


def test_contrast_moves_away_from_the_bins_mean_count() -> None:
    grey = np.full((224, 224, 3), 196, np.uint8)
    assert np.array_equal(only(grey, drawn("Contrast", 15, 224)), grey)
    assert (only(grey - 10, drawn("Contrast", 15, 224)) == 196 - 28).all()


def test_sharpness_is_pils_kernel_inside_and_the_image_at_the_edge() -> None:
    image = noise(5)
    window = image[1:4, 2:5].astype(int)
    mean = (window.sum((0, 1)) + 4 * window[1, 1]) // 13
    expected = np.clip(mean + 2.8 * (window[1, 1] - mean) + 1e-4, 0, 255).astype(np.uint8)
    sharpened = only(image, drawn("Sharpness", 15, 5))
    assert np.array_equal(sharpened[2, 3], expected)
    sharpened[1:-1, 1:-1] = image[1:-1, 1:-1]
    assert np.array_equal(sharpened, image)


@pytest.mark.parametrize("op", ["AutoContrast", "Equalize"])
def test_a_single_colour_stays(op: str) -> None:
    assert np.array_equal(only(flat(37), drawn(op, 15, 37)), flat(37))


def test_auto_contrast_and_equalize_stretch_each_channel() -> None:
    for op in ("AutoContrast", "Equalize"):
        stretched = only(smooth(37), drawn(op, 15, 37))
        assert (stretched.min((0, 1)) == 0).all()
        assert (stretched.max((0, 1)) >= 254).all()


def test_equalize_leaves_a_channel_with_under_255_pixels_below_the_brightest() -> None:
    image = sparse(37)
    equalized = only(image, drawn("Equalize", 15, 37))
    assert np.array_equal(equalized[..., 0], image[..., 0])
    assert not np.array_equal(equalized[..., 1], image[..., 1])


@pytest.mark.parametrize("op", OPS)
def test_an_operation_leaves_its_input_as_it_was(op: str) -> None:
    image = noise(37)
    only(image, drawn(op, 15, 37))
    assert np.array_equal(image, noise(37))


def test_what_comes_from_outside_is_grey() -> None:
    moved = only(noise(37), drawn("TranslateX", 1, 37))
    assert (moved[:, 27:] == FILL).all()
    assert np.array_equal(moved[:, :27], noise(37)[:, 10:])


@pytest.mark.parametrize("num_ops", [0, 1, 2, 3])
def test_a_draw_is_a_function_of_the_sample(num_ops: int) -> None:
    first, again = (draw(sample_rng(3, 1, 17), num_ops, 15, 224) for _ in range(2))
    assert first.shape == (num_ops, 7)
    assert first.dtype == np.float32
    assert np.array_equal(first, again)


def test_every_operation_is_as_likely_and_both_directions() -> None:
    draws = np.concatenate([draw(sample_rng(0, 0, sample), 2, 15, 224) for sample in range(1600)])
    counts = np.bincount(draws[:, 0].astype(int), minlength=len(OPS))
    assert (abs(counts - 200) < 60).all()
    rows, columns = (draws[draws[:, 0] == OPS.index(op)] for op in ("TranslateX", "TranslateY"))
    for pixels in (rows[:, 3], columns[:, 6]):
        assert set(pixels) == {-150.0, 150.0}
        assert abs((pixels > 0).mean() - 0.5) < 0.15


def test_cutouts_centre_is_anywhere() -> None:
    draws = np.concatenate([draw(sample_rng(0, 0, sample), 2, 5, 64) for sample in range(3000)])
    top, left, height, width = draws[draws[:, 0] == OPS.index("Cutout")][:, 1:5].T
    for start, extent in ((top, height), (left, width)):
        assert {start.min(), (start + extent).max()} == {0, 64}
        assert extent.min() < 24
        assert extent.max() == 40


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_what_follows_a_draw_does_not_hang_on_the_magnitude(magnitude: float) -> None:
    rng, other = sample_rng(0, 0, 0), sample_rng(0, 0, 0)
    draw(rng, 2, magnitude, 224)
    draw(other, 2, 15, 224)
    assert rng.random() == other.random()


@pytest.mark.parametrize("magnitude", [-1, 20.5])
def test_a_magnitude_beyond_augregs_is_refused(magnitude: float) -> None:
    with pytest.raises(ValueError, match=f"magnitude = {magnitude}: accepted is 0 to 20"):
        draw(sample_rng(0, 0, 0), 2, magnitude, 224)
