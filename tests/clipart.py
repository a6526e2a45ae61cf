"""A small labelled tree of real JPEGs of varied sizes, from the clip art that Debian's openclipart-png installs."""

import pytest

from experiments.clipart import CLIPART, distinct, on_white

CLASSES = ("animals", "buildings", "food", "plants")
SIDES = (96, 120, 150, 180, 225, 260)
"""Longer sides in pixels, in turn."""

needs_clipart = pytest.mark.skipif(
    not CLIPART.is_dir(), reason=f"{CLIPART} is not there: apt-get install openclipart-png"
)


def make_clipart(root, classes=CLASSES, train=8, val=4):
    """``root``, with ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``; equal for equal arguments.

    Args:
        classes: folders of the clip art.
        train, val: images of each class.
    """
    for name in classes:
        pictures = iter(distinct(CLIPART / name))
        for split, count in (("train", train), ("val", val)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                on_white(next(pictures), SIDES[number % len(SIDES)]).save(
                    root / split / name / f"{number:04}.jpg", quality=90
                )
    return root
