"""Trees of JPEGs to load: Debian's clip art, and noise whose files are as large as ImageNet's photographs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.clipart import CLIPART, make_clipart

CLASSES = ("animals", "food", "people", "recreation")
"""Folders of the clip art that hold enough of it."""
WIDTH, HEIGHT = 400, 350
"""ImageNet's mean; a file of it has about 110 kB."""
GRAIN = 28.0
"""Standard deviation of what no neighbour shares: it makes the files as large as photographs' are."""
VAL = 1
"""Images of each class for evaluation, which is not timed."""
DIFFERENT = 64
"""Photographs that are made; more are copies of them."""


def make_tree(kind: str, root: Path, images: int) -> Path:
    """``root`` with ``images`` JPEGs to train on.

    Args:
        kind: ``"photos"`` or ``"clipart"``.
    """
    if kind == "clipart":
        return make_clipart(root, CLASSES, train=images // len(CLASSES), val=VAL)
    for split, count in (("train", images), ("val", VAL)):
        (root / split / "noise").mkdir(parents=True)
        made = [jpeg(photo(number)) for number in range(min(count, DIFFERENT))]
        for number in range(count):
            (root / split / "noise" / f"{number:04}.jpg").write_bytes(made[number % DIFFERENT])
    return root


def jpeg(picture: Image.Image) -> bytes:
    """Encoded as photographs usually are."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def refusal(kind: str) -> str | None:
    """Why such pictures cannot be had here."""
    return (
        f"{CLIPART} is not there: apt-get install openclipart-png"
        if kind == "clipart" and not CLIPART.is_dir()
        else None
    )


def photo(number: int) -> Image.Image:
    """Colours whose spectrum falls with the frequency, as photographs' does, and grain."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.normal(size=(3, HEIGHT, WIDTH))) / frequency
    shapes = np.fft.irfft2(spectrum, s=(HEIGHT, WIDTH))
    values = 128 + 50 * shapes / shapes.std() + rng.normal(scale=GRAIN, size=(1, HEIGHT, WIDTH))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
