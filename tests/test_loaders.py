"""Which loader serves labelled images, and what it keeps over many epochs."""

import sys

import numpy as np
import pytest
import torch
from image_trees import images_of, joined, make_folders, split_in

import prelora.data

dali = pytest.importorskip("prelora.data.dali", reason="DALI is not installed", exc_type=ImportError)

TRAIN = 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders"), train=TRAIN // 2, val=1)


def test_memory_does_not_grow_over_50_epochs(folders):
    source = images_of(folders, "dali", image_size=64)
    order = split_in(np.arange(TRAIN), 20)

    resident = []
    for epoch in range(50):
        assert sum(len(images) for images, _ in source.train(order, epoch)) == TRAIN
        resident.append(resident_mb())

    # A batch is 1 MB: one kept in each epoch would be 30 MB more over these.
    assert np.median(resident[40:]) - np.median(resident[10:20]) < 8


def test_an_epoch_left_behind_disturbs_no_later_one(folders):
    source = images_of(folders, "dali")
    order = split_in(np.arange(TRAIN), 5)
    whole = joined(source.train(order, 1))[0]
    left, later = source.train(order, 0), source.train(order, 1)
    next(left)
    images = [next(later)[0] for _ in range(4)]

    with pytest.raises(RuntimeError, match="other batches of this split have been asked for"):
        next(left)
    del left

    assert torch.equal(torch.cat([*images, *(images for images, _ in later)]), whole)


def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


# Which loader serves.


def test_auto_takes_dali_and_says_so(folders):
    assert images_of(folders).loader.startswith("dali: DALI 2")
    assert images_of(folders).loader.endswith("on cpu")


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("prelora.data.dali.refusal", "DALI does not run on cpu: no driver"),
        ("prelora.data.images._dali_refusal", "DALI cannot be imported"),
    ],
)
def test_auto_takes_the_plain_loader_where_dali_does_not_run_and_says_why(where, reason, folders, monkeypatch):
    monkeypatch.setattr(where, lambda device: reason)

    source = images_of(folders)

    assert source.loader == f"plain: {reason}"
    assert len(next(source.train([np.arange(3)], 0))[0]) == 3


def test_a_loader_asked_for_is_never_replaced(folders, monkeypatch):
    monkeypatch.delattr(prelora.data, "dali", raising=False)
    monkeypatch.setitem(sys.modules, "prelora.data.dali", None)

    with pytest.raises(ValueError, match=r"data.loader = 'dali' cannot serve: DALI cannot be imported \(.*dali-cu13"):
        images_of(folders, "dali")
    assert images_of(folders, "plain").loader == "plain: as asked for"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_dali_on_a_gpu_that_is_not_there_is_refused_with_dalis_reason(folders):
    with pytest.raises(ValueError, match=r"cannot serve: DALI 2.* does not run on cuda:0: .+"):
        images_of(folders, "dali", device=torch.device("cuda", 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("rand_augment", [None, (2, 15)])
def test_the_pipeline_for_a_gpu_lacks_nothing_but_the_gpu(rand_augment):
    """DALI refuses an argument on the wrong device where an operator is called, the rest where it builds."""
    pipeline = dali._images(lambda: (), 224, rand_augment, torch.device("cuda", 0), batch_size=4, num_threads=1)

    with pytest.raises(RuntimeError, match="requires a CUDA-capable GPU"):
        pipeline.build()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"loader": "fast"}, "data.loader = 'fast': accepted are auto, dali, plain"),
        ({"rand_augment": (0, 15)}, r"rand_augment = \(0, 15\): accepted are 1 and more operations"),
        ({"rand_augment": (2, 21)}, r"rand_augment = \(2, 21\): .* of a magnitude from 0 to 20"),
    ],
)
def test_options_that_no_loader_takes_are_refused(options, complaint, folders):
    with pytest.raises(ValueError, match=complaint):
        images_of(folders, **options)
