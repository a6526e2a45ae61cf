"""Files that cannot be used: replaced in training, left out in evaluation, named, counted, and only so many."""

import io
import re
import shutil

import numpy as np
import pytest
import torch
from image_trees import images_of, joined, make_folders, make_tfrecords, split_in
from PIL import Image

from prelora.data.encoded import EOI
from prelora.errors import DataError

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

LOADERS = ("dali", "plain")
TRAIN, EVAL = 16, 8
JPEG, PNG = 3, 4
"""Samples of either kind, neither the last of its class."""


def flip_in_the_pixels(data):
    """A PNG's header stays sound: only who decodes it notices."""
    at = data.rindex(b"IDAT") + 40
    return data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :]


def grey_of_16_bits():
    file = io.BytesIO()
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)).save(file, "PNG")
    return file.getvalue()


DAMAGE = {
    "empty": (PNG, lambda data: b"", "it is empty"),
    "no image": (PNG, lambda data: b"<html>not found</html>" * 9, "no JPEG, PNG, WEBP, BMP, TIFF or PPM header"),
    "cut png": (PNG, lambda data: data[: len(data) // 2], "cannot"),
    "cut jpeg": (JPEG, lambda data: data[: len(data) // 2], "the JPEG is cut: its end marker is missing"),
    "flipped bit": (PNG, flip_in_the_pixels, "cannot"),
    "16 bits": (PNG, lambda data: grey_of_16_bits(), "pixels of mode I;16, accepted are"),
    "missing": (PNG, None, "No such file or directory"),
}
"""Which sample, what becomes of its bytes (None: it goes away), and what is said of it."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """PNGs, but for one JPEG in each class and split."""
    root = make_folders(tmp_path_factory.mktemp("sound"), train=TRAIN // 2, val=EVAL // 2)
    for folder in (path for split in ("train", "val") for path in (root / split).iterdir()):
        (folder / "3.png").unlink()
        pixels = np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "3.jpg", quality=95)
    return root


@pytest.fixture
def root(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "images")


def file_of(root, split, index):
    return sorted((root / split).rglob("*.*"))[index]


def damage(file, change):
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("loader", LOADERS)
def test_in_training_the_next_file_stands_in_with_the_same_draws(loader, kind, workers, root, sound, tmp_path):
    index, change, reason = DAMAGE[kind]
    source = images_of(root, loader, workers=workers)
    bad = file_of(root, "train", index)
    damage(bad, change)

    images, labels = joined(source.train(split_in(np.arange(TRAIN), 4), 0))

    like = shutil.copytree(sound, tmp_path / "like")
    shutil.copy(file_of(like, "train", index + 1), file_of(like, "train", index))
    expected = joined(images_of(like, loader).train(split_in(np.arange(TRAIN), 4), 0))
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])
    name = bad.relative_to(root).as_posix()
    assert list(source.quarantined) == [name]
    assert reason in source.quarantined[name]


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("loader", LOADERS)
def test_in_evaluation_it_is_left_out(loader, kind, root, sound):
    index, change, reason = {JPEG: 3, PNG: 1}[DAMAGE[kind][0]], *DAMAGE[kind][1:]
    source = images_of(root, loader)
    bad = file_of(root, "val", index)
    damage(bad, change)

    made = list(source.evaluate(split_in(np.arange(EVAL), 3)))

    keep = np.delete(np.arange(EVAL), index)
    expected = joined(images_of(sound, loader).evaluate([keep]))
    assert [len(images) for images, _ in made] == [3 - (index < 3), 3 - (index >= 3), 2]
    assert torch.equal(joined(made)[0], expected[0])
    assert torch.equal(joined(made)[1], expected[1])
    assert reason in source.quarantined[bad.relative_to(root).as_posix()]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_of_which_nothing_is_left_is_no_batch(loader, root):
    for index in (2, 3, 6, 7):
        damage(file_of(root, "val", index), flip_in_the_pixels if index in (2, 6) else lambda data: b"")

    made = list(images_of(root, loader).evaluate(split_in(np.arange(EVAL), 2)))

    assert [labels.tolist() for _, labels in made] == [[0, 0], [1, 1]]


@pytest.mark.parametrize("loader", LOADERS)
def test_what_stands_in_hangs_neither_on_the_batch_nor_on_where_an_epoch_began(loader, root):
    """Ranks, whose batches differ, and a resumed run, which has met no damage yet, see the same."""
    for index in (1, 4, 5, 15):
        damage(file_of(root, "train", index), flip_in_the_pixels)
    order = np.random.default_rng(3).permutation(TRAIN)
    whole, labels = joined(images_of(root, loader).train([order], 0))

    source = images_of(root, loader)
    for size in (1, 5):
        made = joined(source.train(split_in(order, size), 0))
        assert torch.equal(made[0], whole)
        assert torch.equal(made[1], labels)
    rest = joined(images_of(root, loader).train(split_in(order[9:], 3), 0))
    assert torch.equal(rest[0], whole[9:])
    assert sorted(source.quarantined) == sorted(
        file_of(root, "train", index).relative_to(root).as_posix() for index in (1, 4, 5, 15)
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_is_found_unusable_once_and_then_avoided(loader, root):
    damage(file_of(root, "train", PNG), flip_in_the_pixels)
    source = images_of(root, loader)

    epochs = [joined(source.train([np.arange(TRAIN)], 7))[0] for _ in range(3)]

    assert all(torch.equal(images, epochs[0]) for images in epochs)
    assert len(source.quarantined) == 1


def test_a_flipped_bit_in_a_tfrecord_is_quarantined_by_its_name(sound, tmp_path):
    archive = make_tfrecords(sound, tmp_path, shards=1) / "train-00000-of-00001"
    data = bytearray(archive.read_bytes())
    data[data.index(EOI) - 100] ^= 1  # in a JPEG, which would still decode
    archive.write_bytes(data)
    source = images_of(tmp_path, "dali")

    list(source.train([np.arange(TRAIN)], 0))

    assert dict(source.quarantined) == {"train-00000-of-00001:3": "the record fails its CRC-32C"}


# How many.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", [flip_in_the_pixels, lambda data: b""], ids=["pixels", "header"])
@pytest.mark.parametrize("loader", LOADERS)
def test_one_file_more_than_the_cap_ends_it_naming_file_count_and_cap(loader, change, workers, root):
    for index in (0, 2, 6):
        damage(file_of(root, "train", index), change)
    source = images_of(root, loader, workers=workers, max_quarantined=2)

    with pytest.raises(DataError) as error:
        list(source.train(split_in(np.arange(TRAIN), 4), 0))

    assert re.match(r"train/cat/[026]\.png of .*images cannot be used: .*That makes 3 such files", str(error.value))
    assert "data.max_quarantined accepts 2" in str(error.value)


@pytest.mark.parametrize("loader", LOADERS)
def test_as_many_files_as_the_cap_are_accepted_over_both_splits(loader, root):
    damage(file_of(root, "train", 0), flip_in_the_pixels)
    damage(file_of(root, "val", 0), lambda data: b"")
    source = images_of(root, loader, max_quarantined=2)

    assert len(joined(source.train([np.arange(TRAIN)], 0))[1]) == TRAIN
    assert len(joined(source.evaluate([np.arange(EVAL)]))[1]) == EVAL - 1
    assert len(source.quarantined) == 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("loader", LOADERS)
def test_data_of_which_nothing_is_left_ends_it(loader, workers, root):
    for index in range(TRAIN):
        file_of(root, "train", index).write_bytes(b"")

    with pytest.raises(DataError, match=f"none of the {TRAIN} files from train/cat/0.png on can be used"):
        next(images_of(root, loader, workers=workers).train([np.arange(TRAIN)], 0))


def test_dali_is_not_built_anew_forever(root, monkeypatch):
    monkeypatch.setattr("prelora.data.dali_loader.MAX_REBUILDS", 1)
    for index in (0, 12):
        damage(file_of(root, "train", index), flip_in_the_pixels)
    source = images_of(root, "dali")
    batches = source.train(split_in(np.arange(TRAIN), 1), 0)

    made = [next(batches) for _ in range(8)]
    with pytest.raises(DataError, match=r"train/dog/4\.png cannot be decoded: .* 2 times, accepted are 1"):
        list(batches)

    assert len(made) == 8


@pytest.mark.parametrize("loader", LOADERS)
def test_a_source_goes_on_after_an_epoch_that_failed(loader, root):
    source = images_of(root, loader, max_quarantined=0)
    bad = file_of(root, "train", PNG)
    whole, data = joined(source.train([np.arange(TRAIN)], 0))[0], bad.read_bytes()
    damage(bad, flip_in_the_pixels)
    with pytest.raises(DataError):
        list(source.train(split_in(np.arange(TRAIN), 2), 0))
    bad.write_bytes(data)

    good = np.delete(np.arange(TRAIN), PNG)

    assert torch.equal(joined(source.train([good], 0))[0], whole[good])
