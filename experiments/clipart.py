"""Debian's openclipart-png as a labelled data set of real images: ``python -m experiments.clipart``.

Drawings, not photographs: no package ships labelled ones. A class is a folder of the package; folders that name no
subject, or hold fewer than a hundred pictures, are left out. Every sixth picture of a class is held out.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from experiments.declaration import RUNS

CLIPART = Path("/usr/share/openclipart/png")
CLASSES = (
    "animals", "computer", "food", "geography", "office", "people", "recreation", "shapes", "signs_and_symbols",
    "tools", "transportation",
)  # fmt: skip
OUT = RUNS / "data" / "openclipart"
SIDE = 64
"""Longest side in pixels of what is written."""
HELD_OUT = 6
LARGEST = 200_000
"""Bytes of a PNG; a few are of more than 100 megapixels."""


def distinct(folder: Path) -> list[Path]:
    """The PNGs under ``folder`` in order, each only where it really lies: many are linked to from elsewhere."""
    return sorted(path for path in folder.rglob("*.png") if path.resolve() == path and path.stat().st_size < LARGEST)


def on_white(path: Path, side: int) -> Image.Image:
    """The picture without its alpha, no longer than ``side`` pixels."""
    picture = Image.open(path).convert("RGBA")
    picture.thumbnail((side, side))
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def pictures() -> Iterator[tuple[str, Image.Image]]:
    """Class and picture, each picture once however many files hold it."""
    seen: set[str] = set()
    for name in CLASSES:
        for path in distinct(CLIPART / name):
            picture = on_white(path, SIDE)
            digest = hashlib.sha256(picture.tobytes()).hexdigest()
            if digest not in seen:
                seen.add(digest)
                yield name, picture


def main() -> int:
    """Write the data set; returns 1 if the package is not installed."""
    if not CLIPART.is_dir():
        print(f"{CLIPART} is not there: apt-get install openclipart-png", file=sys.stderr)
        return 1
    counts = dict.fromkeys(CLASSES, 0)
    for name, picture in pictures():
        split = "val" if counts[name] % HELD_OUT == 0 else "train"
        folder = OUT / split / name
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{counts[name]:05}.png")
        counts[name] += 1
    print(f"{OUT}: {sum(counts.values())} pictures; " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
