"""``prelora data check``, and what training makes of the manifest that it writes."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from image_trees import images_of, make_folders, make_tars, make_tfrecords
from PIL import Image

from prelora.cli import main
from prelora.data.manifest import NAME
from prelora.errors import DataError
from prelora.exits import EXIT_BAD_INPUT, EXIT_DATA


@pytest.fixture
def root(tmp_path):
    """Four JPEGs and four PNGs to train with, two of each to evaluate."""
    root = make_folders(tmp_path / "images", train=4, val=2, kinds=("RGB",))
    for file in sorted((root / "train" / "cat").iterdir()) + sorted((root / "val" / "cat").iterdir()):
        Image.open(file).resize((120, 100)).save(file.with_suffix(".jpg"), quality=95)
        file.unlink()
    return root


def check(root, *options):
    return main(["data", "check", str(root), *options])


def lines(path, split):
    return json.loads(path.read_text())["splits"][split]


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def met(source):
    """File → reason, after an epoch and an evaluation."""
    list(source.train([np.arange(source.train_samples)], 0))
    list(source.evaluate([np.arange(source.eval_samples)]))
    return dict(source.quarantined)


# The check.


@pytest.mark.parametrize("make", [lambda folders, root: folders, make_tars, make_tfrecords])
def test_a_manifest_lists_every_image_of_every_layout(make, root, tmp_path):
    data = make(root, tmp_path / "data")

    assert check(data) == 0

    listed = lines(data / NAME, "train") + lines(data / NAME, "val")
    files = [file for split in ("train", "val") for file in sorted((root / split).rglob("*.*"))]
    assert [line["sha256"] for line in listed] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert [(line["bytes"], line["width"], line["height"]) for line in listed] == [
        (file.stat().st_size, *Image.open(file).size) for file in files
    ]
    assert {line["problem"] for line in listed} == {None}
    assert len({line["name"] for line in listed}) == 12


def test_bad_files_are_named_counted_and_told_by_the_exit_code(root, capsys):
    (root / "train/cat/1.jpg").write_bytes((root / "train/cat/1.jpg").read_bytes()[:700])
    flip(root / "val/dog/0.png", -30)

    assert check(root, "--jobs", "2") == EXIT_DATA

    said = capsys.readouterr().out
    assert "train: 7 of 8 images are good, 2 classes" in said
    assert "train/cat/1.jpg: the JPEG is cut: its end marker is missing" in said
    assert "val/dog/0.png: it cannot be decoded: " in said
    assert "2 of 12 files cannot be used" in said
    assert [line["problem"] is None for line in lines(root / NAME, "val")] == [True, True, False, True]


def test_the_manifest_goes_where_it_is_wanted(root, tmp_path):
    assert check(root, "--out", str(tmp_path / "elsewhere.json")) == 0

    assert len(lines(tmp_path / "elsewhere.json", "train")) == 8
    assert not (root / NAME).exists()


def test_what_cannot_be_checked_is_bad_input(root, capsys):
    shutil.rmtree(root / "val")

    assert check(root) == EXIT_BAD_INPUT
    assert "has no split 'val'" in capsys.readouterr().err
    assert check(root, "--jobs", "0") == EXIT_BAD_INPUT
    assert "--jobs 0: must be above 0" in capsys.readouterr().err


# What a source makes of it.


@pytest.mark.parametrize("loader", ["dali", "plain"])
def test_a_flipped_bit_that_still_decodes_is_found(loader, root):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    check(root)
    for file in (root / "train/cat/2.jpg", root / "val/cat/0.jpg"):
        flip(file, file.stat().st_size // 2)

    found = met(images_of(root, loader))

    assert found == dict.fromkeys(("train/cat/2.jpg", "val/cat/0.jpg"), "its SHA-256 is not the manifest's")
    (root / NAME).unlink()
    assert met(images_of(root, loader)) == {}  # without the manifest it would have gone unnoticed


def test_a_file_of_another_size_is_found(root):
    check(root)
    (root / "train/dog/0.png").write_bytes((root / "train/dog/1.png").read_bytes())

    assert "bytes, the manifest says" in met(images_of(root, "plain"))["train/dog/0.png"]


def test_a_file_listed_as_bad_is_set_aside_from_the_start(root):
    (root / "train/cat/1.jpg").write_bytes(b"")
    check(root)

    assert dict(images_of(root, "plain").quarantined) == {"train/cat/1.jpg": "it is empty"}


def test_more_bad_files_listed_than_accepted_end_the_run_at_its_start(root):
    for number in range(3):
        (root / f"train/cat/{number}.jpg").write_bytes(b"")
    check(root)

    with pytest.raises(DataError, match=r"That makes 3 such files, and data\.max_quarantined accepts 2"):
        images_of(root, "plain", max_quarantined=2)


def test_a_listed_file_that_is_gone_keeps_its_place_in_the_order(root):
    check(root)
    whole = images_of(root, "plain")
    expected = next(whole.train([np.array([6, 7])], 0))
    (root / "train/cat/0.jpg").unlink()

    source = images_of(root, "plain")

    assert source.train_samples == 8
    images, labels = next(source.train([np.array([6, 7])], 0))
    assert bool((images == expected[0]).all())
    assert labels.tolist() == expected[1].tolist()
    assert met(source) == {"train/cat/0.jpg": "No such file or directory"}


def test_a_manifest_of_other_files_is_refused(root):
    check(root)
    shutil.copy(root / "train/dog/0.png", root / "train/dog/9.png")

    with pytest.raises(ValueError, match=rf"{NAME} and the data differ in 1 files, of which train/dog/9.png is only h"):
        images_of(root, "plain")


def test_an_archive_that_lost_members_since_is_refused(root, tmp_path):
    data = make_tars(root, tmp_path / "data", shards=4)
    check(data)
    (data / "train-0003.tar").unlink()

    with pytest.raises(ValueError, match=r"train-0003\.tar:dog/2\.png is only there"):
        images_of(data, "plain")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2, "splits": {}}', '{"format": 1, "splits": {"val": [{}]}}']
)
def test_what_is_no_manifest_is_refused(text, root):
    (root / NAME).write_text(text)

    with pytest.raises(ValueError, match=rf"{NAME} is not a manifest of `prelora data check`: "):
        images_of(root, "plain")
