"""Pixels of labelled images: functions of (seed, epoch, sample), whatever loads them and however the work is split."""

import random
import shutil

import numpy as np
import pytest
import torch
from clipart import make_clipart, needs_clipart
from image_trees import images_of, joined, make_folders, make_tars, make_tfrecords, split_in
from PIL import Image

from prelora.data.sampler import epoch_order, eval_batches, train_batches

dali = pytest.importorskip("prelora.data.dali", reason="DALI is not installed", exc_type=ImportError)

LOADERS = ("dali", "plain")
SPLITS = {"1 × 20": (1, 20), "2 × 10": (2, 10), "4 × 5": (4, 5)}
"""Ranks × batch."""
TRAIN, EVAL = 40, 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Noise as PNGs with and without a palette and alpha, so that no decoder differs."""
    return make_folders(tmp_path_factory.mktemp("folders"), train=TRAIN // 2, val=EVAL // 2)


@pytest.fixture(scope="module")
def sources(folders):
    """A source of each loader, used by many tests as one is by many epochs."""
    return {loader: images_of(folders, loader) for loader in LOADERS}


@pytest.fixture(scope="module")
def augmented(folders):
    """The same with RandAugment."""
    return {loader: images_of(folders, loader, rand_augment=(2, 15)) for loader in LOADERS}


def of_rank(source, rank, ranks, batch_size, epoch=1, first=0):
    """What a rank is given of an epoch from a step on."""
    indices = train_batches(
        TRAIN,
        0,
        epoch,
        batch_size=batch_size,
        rank=rank,
        world_size=ranks,
        first=first,
        count=TRAIN // ranks // batch_size,
    )
    return list(source.train(list(indices), epoch))


# One sample, the same pixels.


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("loader", LOADERS)
def test_an_epochs_pixels_are_bit_identical_for_any_ranks_and_batch(loader, split, augmented):
    ranks, batch_size = split
    whole = joined(augmented[loader].train([epoch_order(TRAIN, 0, 1)], 1))

    by_rank = [of_rank(augmented[loader], rank, ranks, batch_size) for rank in range(ranks)]

    steps = [batch for step in zip(*by_rank, strict=True) for batch in step]
    images, labels = joined(steps)
    assert torch.equal(images, whole[0])
    assert torch.equal(labels, whole[1])


@pytest.mark.parametrize(("step", "rand_augment"), [(0, None), (3, (2, 15)), (7, None), (8, None)])
@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_resumed_at_a_step_goes_on_with_the_same_pixels(
    loader, step, rand_augment, sources, augmented, folders
):
    whole = of_rank((augmented if rand_augment else sources)[loader], 0, 1, 5)

    rest = of_rank(images_of(folders, loader, rand_augment=rand_augment), 0, 1, 5, first=step)

    assert len(rest) == 8 - step
    for (images, labels), expected in zip(rest, whole[step:], strict=True):
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_left_in_the_middle_does_not_show_in_the_next(loader, sources):
    whole = of_rank(sources[loader], 0, 1, 5, epoch=3)

    left = iter(sources[loader].train(split_in(epoch_order(TRAIN, 0, 2), 5), 2))
    next(left)
    left.close()

    again = of_rank(sources[loader], 0, 1, 5, epoch=3)
    assert torch.equal(joined(again)[0], joined(whole)[0])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("loader", LOADERS)
def test_workers_change_no_pixel(loader, workers, folders, sources):
    order = split_in(epoch_order(TRAIN, 0, 1), 7)

    images, labels = joined(images_of(folders, loader, workers=workers).train(order, 1))

    expected = joined(sources[loader].train(order, 1))
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])


@pytest.mark.parametrize("depth", ["QUEUE", "AHEAD"])
def test_how_far_ahead_dali_works_changes_no_pixel(depth, folders, sources, monkeypatch):
    for module in ("dali", "dali_loader"):
        monkeypatch.setattr(f"prelora.data.{module}.{depth}", 5, raising=False)
    order = split_in(epoch_order(TRAIN, 0, 1), 4)

    images, _ = joined(images_of(folders, "dali").train(order, 1))

    assert torch.equal(images, joined(sources["dali"].train(order, 1))[0])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("make", [make_tars, make_tfrecords])
def test_pixels_are_the_same_from_every_layout(make, loader, folders, sources, tmp_path):
    order = split_in(np.arange(TRAIN), 9)

    source = images_of(make(folders, tmp_path), loader)

    for made, expected in (
        (source.train(order, 1), sources[loader].train(order, 1)),
        (source.evaluate([np.arange(EVAL)]), sources[loader].evaluate([np.arange(EVAL)])),
    ):
        for ours, theirs in zip(joined(made), joined(expected), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("change", ["epoch", "seed"])
def test_another_epoch_or_seed_crops_every_image_anew(change, loader, folders):
    order = [np.arange(TRAIN)]
    other = images_of(folders, loader, seed=int(change == "seed"))

    changed, labels = joined(other.train(order, int(change == "epoch")))

    images, same = joined(images_of(folders, loader).train(order, 0))
    assert not any(torch.equal(*pair) for pair in zip(changed, images, strict=True))
    assert torch.equal(labels, same)


@pytest.mark.parametrize("loader", LOADERS)
def test_images_that_are_alike_are_each_augmented_in_their_own_way(loader, folders, tmp_path):
    for path in (tmp_path / split / "only" / f"{n}.png" for split in ("train", "val") for n in range(5)):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folders / "train" / "cat" / "0.png", path)

    images, _ = joined(images_of(tmp_path, loader).train([np.arange(5)], 0))

    assert len(images.unique(dim=0)) == 5


# Every sample once.


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluate"])
def test_over_the_ranks_an_epoch_has_each_sample_once(train, loader, sources):
    source, samples = sources[loader], TRAIN if train else EVAL
    # All are different: one can tell which sample an image is.
    whole = joined(source.train([np.arange(TRAIN)], 1) if train else source.evaluate([np.arange(EVAL)]))[0]

    made = [
        of_rank(source, rank, 4, 5)
        if train
        else source.evaluate(list(eval_batches(EVAL, batch_size=2, rank=rank, world_size=4)))
        for rank in range(4)
    ]

    seen = [[torch.equal(image, other) for other in whole].index(True) for part in made for image in joined(part)[0]]
    assert sorted(seen) == list(range(samples))


@pytest.mark.parametrize("sizes", [(4, 4, 2), (10,), (1,) * 10, (2, 8)])
@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_takes_batches_of_any_sizes(loader, sizes, sources):
    ends = np.cumsum(sizes)
    made = list(sources[loader].evaluate([np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]))

    assert [len(images) for images, _ in made] == list(sizes)
    assert torch.equal(joined(made)[0], joined(sources[loader].evaluate([np.arange(EVAL)]))[0])


# What the pixels are.


@pytest.mark.parametrize("loader", LOADERS)
def test_facts_of_a_source(loader, sources):
    source = sources[loader]

    _, labels = next(source.evaluate([np.arange(EVAL)]))

    assert (source.classes, source.channels, source.train_samples, source.eval_samples) == (2, 3, TRAIN, EVAL)
    assert labels.tolist() == [0] * 5 + [1] * 5
    assert source.quarantined == {}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluate"])
def test_pixels_are_fp32_in_minus_one_to_one_and_use_the_range(train, loader, sources):
    source = sources[loader]

    images, labels = next(source.train([np.arange(6)], 0) if train else source.evaluate([np.arange(6)]))

    assert (images.shape, images.dtype, labels.dtype) == ((6, 3, 16, 16), torch.float32, torch.int64)
    assert images.is_contiguous()
    assert -1 <= images.min() < -0.5
    assert 0.5 < images.max() <= 1


def test_the_loaders_agree_but_for_the_rounding_of_the_resize(sources):
    ours, theirs = (joined(sources[loader].evaluate([np.arange(EVAL)])) for loader in LOADERS)

    difference = (ours[0] - theirs[0]).abs() * 127.5
    assert difference.max() < 1.01
    assert difference.mean() < 0.25
    assert torch.equal(ours[1], theirs[1])


@needs_clipart
def test_clip_art_makes_the_same_pictures_each_time(tmp_path):
    trees = [make_clipart(tmp_path / name, train=3, val=2) for name in ("one", "other")]

    files = [{file.relative_to(tree): file.read_bytes() for file in tree.rglob("*.jpg")} for tree in trees]
    assert files[0] == files[1]
    assert len(set(files[0].values())) == 4 * 5


@needs_clipart
def test_the_loaders_agree_on_jpegs_of_pictures_without_and_nearly_with_rand_augment(tmp_path):
    root = make_clipart(tmp_path, classes=("animals", "food"), train=8, val=1)
    order = [np.arange(16)]

    for rand_augment, largest, mean in ((None, 1.01, 0.25), ((2, 15), 256, 2)):
        ours, theirs = (
            joined(images_of(root, loader, rand_augment=rand_augment, image_size=64).train(order, 0))
            for loader in LOADERS
        )
        difference = (ours[0] - theirs[0]).abs() * 127.5
        # An operation with a threshold makes more of a difference of 1, in few pixels.
        assert difference.max() < largest
        assert difference.mean() < mean
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("loader", LOADERS)
def test_rand_augment_changes_pixels(loader, sources, augmented):
    bare, changed = (joined(made[loader].train([np.arange(TRAIN)], 0))[0] for made in (sources, augmented))

    assert sum(torch.equal(*pair) for pair in zip(bare, changed, strict=True)) < TRAIN / 4


@pytest.mark.parametrize("loader", LOADERS)
def test_an_evaluation_crop_is_the_centre_of_the_resized_image(loader, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        raw = np.zeros((18, 36, 3), dtype=np.uint8)
        raw[:, 9:27] = 255
        Image.fromarray(raw).save(tmp_path / split / "only" / "0.png")

    images, _ = next(images_of(tmp_path, loader).evaluate([np.arange(1)]))

    assert bool((images == 1).all())


@pytest.mark.parametrize("loader", LOADERS)
def test_a_note_of_orientation_turns_no_image(loader, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        raw = np.zeros((32, 32, 3), dtype=np.uint8)
        raw[:16] = 255
        Image.fromarray(raw).save(tmp_path / split / "only" / "0.jpg", quality=95, exif=exif)

    images, _ = next(images_of(tmp_path, loader).evaluate([np.arange(1)]))

    assert images[:, :, :6].mean() > 0.9
    assert images[:, :, -6:].mean() < -0.9


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", LOADERS)
def test_loading_moves_no_global_random_state(loader, workers, folders):
    source = images_of(folders, loader, workers=workers)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002

    list(source.train([np.arange(6)], 0))
    list(source.evaluate([np.arange(6)]))

    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]  # noqa: NPY002
