"""Images, magnitudes and operations for the tests of RandAugment."""

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
MAGNITUDES = (0, 5, 10, 15, 20)
TWO_WAYS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def noise(size: int) -> Image:
    """Any value anywhere."""
    return np.random.Generator(np.random.Philox(7)).integers(0, 256, (size, size, 3)).astype(np.uint8)


def smooth(size: int) -> Image:
    """Colours that change slowly and do not reach black or white."""
    across = np.linspace(20, 200, size)
    return np.stack(
        [across[None] + 0 * across[:, None], across[:, None] + 0 * across, 220 - np.add.outer(across, across) / 2], -1
    ).astype(np.uint8)


def flat(size: int) -> Image:
    """One colour."""
    return np.full((size, size, 3), (9, 77, 255), np.uint8)


def sparse(size: int) -> Image:
    """White, but for some pixels in a corner: fewer than 255, or some more."""
    image = np.full((size, size, 3), 255, np.uint8)
    image[:5, :30] = noise(size)[:5, :30]
    image[:9, :30, 1] = noise(size)[:9, :30, 1]
    return image


IMAGES = {"noise": noise, "smooth": smooth, "flat": flat, "sparse": sparse}
