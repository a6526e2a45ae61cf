"""MNIST's file format: read exactly, whether zipped or not, and refused where it is not that."""

import gzip

import numpy as np
import pytest
import torch

from prelora.data import build_source
from prelora.errors import DataError

SIDE, TRAIN, HELD_OUT = 14, 30, 10


def idx_bytes(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture(params=["", ".gz"], ids=["plain", "gzip"])
def folder(request, tmp_path):
    """Its four files; the arrays are of generator 0."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", TRAIN), ("t10k", HELD_OUT)):
        for name, array in (
            (f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (count, SIDE, SIDE))),
            (f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10),
        ):
            content = idx_bytes(array)
            zipped = gzip.compress(content) if request.param else content
            (tmp_path / f"{name}{request.param}").write_bytes(zipped)
    return tmp_path


def source(folder, image_size=SIDE):
    return build_source("idx", path=folder, image_size=image_size, seed=0)


def test_held_out_images_are_the_files_own_scaled_to_minus_one_to_one(folder):
    rng = np.random.default_rng(0)
    rng.integers(0, 256, (TRAIN, SIDE, SIDE))
    own = torch.from_numpy(rng.integers(0, 256, (HELD_OUT, SIDE, SIDE)))

    images, labels = next(source(folder).evaluate([np.arange(HELD_OUT)]))

    assert torch.equal(images, (own.float() / 127.5 - 1).unsqueeze(1))
    assert torch.equal(labels, torch.arange(HELD_OUT) % 10)


def test_its_sizes_are_the_files(folder):
    found = source(folder)

    assert (found.train_samples, found.eval_samples, found.classes, found.channels) == (TRAIN, HELD_OUT, 10, 1)


def test_training_images_are_the_files_own_shifted_by_at_most_a_fourteenth_of_their_side(folder):
    own = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (TRAIN, SIDE, SIDE))).float() / 127.5 - 1
    padded = torch.nn.functional.pad(own, (1, 1, 1, 1), value=-1.0)

    images, _ = next(source(folder).train([np.arange(TRAIN)], 3))

    for index, image in enumerate(images):
        windows = [padded[index, y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(3)]
        assert any(torch.equal(image[0], window) for window in windows)


def test_another_size_is_refused(folder):
    with pytest.raises(ValueError, match=r"image_size = 28: the images .* are 14×14"):
        source(folder, image_size=28)


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has neither train-images-idx3-ubyte nor train-images-idx3-ubyte\.gz"):
        source(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not an IDX file"),
        (idx_bytes(np.zeros((TRAIN, SIDE, SIDE)))[:-1], "or is cut off"),
        (idx_bytes(np.zeros((TRAIN, SIDE))), "in 3 dimension"),
        (idx_bytes(np.zeros((TRAIN - 1, SIDE, SIDE))), "holds 29 train images and 30 labels"),
    ],
    ids=["empty", "cut off", "flat", "one too few"],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(folder, content, complaint):
    for file in folder.glob("train-images*"):
        file.unlink()
    (folder / "train-images-idx3-ubyte").write_bytes(content)

    with pytest.raises(DataError, match=complaint):
        source(folder)


def test_a_file_that_is_not_gzip_is_refused(folder):
    for file in folder.glob("train-images*"):
        file.unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")

    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is not gzip"):
        source(folder)


def test_it_needs_a_path():
    with pytest.raises(ValueError, match="data 'idx' needs a path"):
        build_source("idx", image_size=28, seed=0)
