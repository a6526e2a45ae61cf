"""What the loaders are timed at: pictures as large as ImageNet's, every image of an epoch once, whole steps."""

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))  # bench is not installed

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from bench import loading, pictures
from bench.loading import LoadCell


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return pictures.make_tree("photos", tmp_path_factory.mktemp("photos") / "tree", 6)


def test_photos_are_as_large_as_imagenets(photos):
    for file in (photos / "train").rglob("*.jpg"):
        assert Image.open(file).size == (400, 350)
        assert 100_000 < file.stat().st_size < 120_000


def test_photos_differ_and_are_the_same_every_time():
    first, again, other = (pictures.jpeg(pictures.photo(number)) for number in (0, 0, 1))
    assert first == again
    assert first != other
    assert Image.open(io.BytesIO(first)).mode == "RGB"


def test_every_way_to_load_gives_all_images_of_an_epoch(photos, monkeypatch):
    monkeypatch.setattr(loading, "WORKERS", 0)
    cell = LoadCell("photos", True, 6, 2)
    data = loading.source(photos, "plain", True)
    assert [len(labels) for _, labels in loading.batches(data, 2, 0)] == [2, 2, 2]
    assert loading.torchvisions(cell, photos)(0) == [2, 2, 2]
