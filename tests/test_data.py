"""Order and pixels are functions of (seed, epoch, sample): nothing is lost, doubled or dependent on the split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prelora.data import build_source
from prelora.data.sampler import epoch_order, eval_batches, train_batches


def dealt(samples, epoch, batch_size, world_size, count, first=0):
    """[micro-batch][rank] → indices."""
    ranks = [
        list(
            train_batches(
                samples, 5, epoch, batch_size=batch_size, rank=rank, world_size=world_size, first=first, count=count
            )
        )
        for rank in range(world_size)
    ]
    return list(zip(*ranks, strict=True))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 20), (4, 5), (2, 10), (20, 1)])
def test_a_step_holds_the_same_samples_however_it_is_split(world_size, batch_size):
    steps = [np.concatenate(step) for step in dealt(103, 2, batch_size, world_size, count=5)]

    assert np.array_equal(np.concatenate(steps), epoch_order(103, 5, 2)[:100])


@given(st.integers(1, 300), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_an_epoch_is_a_permutation(samples, epoch):
    assert sorted(epoch_order(samples, 0, epoch)) == list(range(samples))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}

    assert len(orders) == 9


@given(st.integers(0, 6))
@settings(max_examples=10, deadline=None)
def test_starting_late_skips_and_changes_nothing(first):
    whole = dealt(103, 1, 7, 2, count=7)

    late = dealt(103, 1, 7, 2, count=7, first=first)

    assert [[b.tolist() for b in step] for step in late] == [[b.tolist() for b in step] for step in whole[first:]]


@given(st.integers(1, 100), st.integers(1, 9), st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_evaluation_sees_every_sample_once(samples, batch_size, world_size):
    ranks = [
        eval_batches(samples, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]

    assert sorted(int(i) for batches in ranks for batch in batches for i in batch) == list(range(samples))


def digits():
    return build_source("digits", image_size=16, seed=3)


def test_digits_have_the_same_pixels_in_any_batch():
    indices = np.arange(40)
    together, _ = next(digits().train([indices], epoch=2))
    apart = torch.cat([images for images, _ in digits().train(np.split(indices, 8), epoch=2)])

    assert torch.equal(together, apart)


def test_digits_are_augmented_anew_each_epoch_but_not_in_evaluation():
    source, indices = digits(), [np.arange(40)]

    assert not torch.equal(next(source.train(indices, 0))[0], next(source.train(indices, 1))[0])
    assert torch.equal(next(source.evaluate(indices))[0], next(source.evaluate(indices))[0])


def test_digits_lie_in_the_unit_range():
    images, labels = next(digits().train([np.arange(1000)], 0))

    assert images.min() == -1
    assert 0.9 < images.max() <= 1
    assert labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize("size", [4, 12, 0])
def test_digits_refuse_a_size_that_is_no_multiple_of_8(size):
    with pytest.raises(ValueError, match=f"image_size = {size}"):
        build_source("digits", image_size=size, seed=0)


@pytest.fixture(scope="module")
def image_tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def folder(root, workers=0):
    return build_source("folder", path=root, image_size=32, seed=1, workers=workers, rand_augment=(2, 9))


def test_folder_pixels_do_not_depend_on_workers_or_batches(image_tree):
    one = torch.cat([images for images, _ in folder(image_tree).train([np.arange(12)], 0)])
    two = torch.cat([images for images, _ in folder(image_tree, workers=2).train(np.split(np.arange(12), 4), 0)])

    assert torch.equal(one, two)


def test_folder_leaves_the_global_random_state_alone(image_tree):
    before = torch.get_rng_state()
    list(folder(image_tree).train([np.arange(12)], 0))

    assert torch.equal(torch.get_rng_state(), before)


def test_folder_changes_its_augmentation_by_epoch(image_tree):
    source = folder(image_tree)

    assert not torch.equal(next(source.train([np.arange(4)], 0))[0], next(source.train([np.arange(4)], 1))[0])


@pytest.mark.parametrize(
    ("path", "message"), [(None, "needs a path"), ("missing", "has no folder 'train'")], ids=["none", "missing"]
)
def test_folder_without_images_is_refused(path, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_source("folder", path=path and tmp_path / path, image_size=32, seed=0)


def test_unknown_source_is_refused():
    with pytest.raises(ValueError, match="accepted are digits, folder"):
        build_source("cifar", image_size=32, seed=0)
