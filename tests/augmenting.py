"""Images and draws of one operation each, for the tests of RandAugment."""

import numpy as np
import numpy.typing as npt

from prelora.data.randaugment import COLUMNS, OPS, arguments

Image = npt.NDArray[np.uint8]
MAGNITUDES = (0, 5, 10, 15, 20)
TWO_WAYS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def drawn(op: str, magnitude: float, size: int, sign: int = 1, centre: tuple[int, int] = (5, 30)) -> npt.NDArray:
    """A draw, float32 [1, 7], of this operation alone."""
    args = arguments(op, magnitude, size, sign, centre)
    draws = np.zeros((1, COLUMNS), np.float32)
    draws[0, 0] = OPS.index(op)
    draws[0, 1 : 1 + len(args)] = args
    return draws


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
