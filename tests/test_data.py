"""Which images a run sees, and their pixels: functions of (seed, epoch, sample), however the work is split."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from prelora.data import build_source
from prelora.data.sampler import epoch_order, eval_batches, sample_rng, train_batches

SAMPLES = 103
SPLITS = {
    "1 × 20": (1, 20, 1),
    "4 × 5": (4, 5, 1),
    "2 × 10": (2, 10, 1),
    "2 × 5 × 2": (2, 5, 2),
    "1 × 4 × 5": (1, 4, 5),
}
"""Ranks × batch × accumulated, each 20 samples a step."""


def dealt(samples, ranks, batch_size, accumulate=1, seed=0, epoch=0, first_step=0):
    """``[step]`` → the samples of an optimizer step, over all ranks and micro-batches."""
    count = samples // (ranks * batch_size * accumulate) * accumulate
    by_rank = [
        list(
            train_batches(
                samples,
                seed,
                epoch,
                batch_size=batch_size,
                rank=rank,
                world_size=ranks,
                first=first_step * accumulate,
                count=count,
            )
        )
        for rank in range(ranks)
    ]
    steps = range(count // accumulate - first_step)
    return [
        np.concatenate([batch for batches in by_rank for batch in batches[step * accumulate : (step + 1) * accumulate]])
        for step in steps
    ]


sizes = st.tuples(st.integers(1, 400), st.integers(1, 5), st.integers(1, 12), st.integers(1, 4)).filter(
    lambda sizes: sizes[1] * sizes[2] * sizes[3] <= sizes[0]
)


# The order of training.


@given(sizes, st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_an_epoch_sees_every_sample_once_but_for_the_tail_that_fills_no_step(sizes, seed, epoch):
    samples, ranks, batch_size, accumulate = sizes

    seen = np.concatenate(dealt(samples, ranks, batch_size, accumulate, seed, epoch))

    assert len(seen) == samples - samples % (ranks * batch_size * accumulate)
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(range(samples))


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_step_sees_the_same_samples_however_it_is_split(split):
    steps = [set(step.tolist()) for step in dealt(SAMPLES, *split)]

    assert steps == [set(epoch_order(SAMPLES, 0, 0)[first : first + 20].tolist()) for first in range(0, 100, 20)]


@given(sizes, st.data())
def test_an_epoch_resumed_at_a_step_goes_on_with_what_it_had_not_seen(sizes, data):
    samples, ranks, batch_size, accumulate = sizes
    whole = dealt(samples, ranks, batch_size, accumulate)
    done = data.draw(st.integers(0, len(whole)))

    rest = dealt(samples, ranks, batch_size, accumulate, first_step=done)

    assert [step.tolist() for step in rest] == [step.tolist() for step in whole[done:]]


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 8), st.integers(0, 3))
def test_the_epochs_of_a_pass_see_its_samples_once_and_in_its_order(samples, epochs_per_pass, batch_size, passes):
    count = samples // epochs_per_pass // batch_size

    seen = [
        batch
        for epoch in range(passes * epochs_per_pass, (passes + 1) * epochs_per_pass)
        for batch in train_batches(
            samples,
            0,
            epoch,
            batch_size=batch_size,
            rank=0,
            world_size=1,
            first=0,
            count=count,
            epochs_per_pass=epochs_per_pass,
        )
    ]

    order = epoch_order(samples, 0, passes)
    assert [len(batch) for batch in seen] == [batch_size] * (count * epochs_per_pass)
    assert np.concatenate([*seen, order[:0]]).tolist() == order[: count * epochs_per_pass * batch_size].tolist()


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0), (1, 1)])
def test_another_seed_or_epoch_has_another_order(seed, epoch):
    assert not np.array_equal(epoch_order(SAMPLES, seed, epoch), epoch_order(SAMPLES, 0, 0))


def test_the_order_hangs_on_no_global_random_state():
    before = epoch_order(SAMPLES, 3, 5)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 (the global state is the point)
    torch.manual_seed(1)

    assert np.array_equal(epoch_order(SAMPLES, 3, 5), before)


def test_the_order_stays_what_it_was_when_runs_were_saved():
    """A resumed run of an earlier version must go on in the same order."""
    assert epoch_order(10, seed=1, epoch=2).tolist() == [1, 4, 5, 0, 7, 6, 8, 2, 3, 9]
    assert sample_rng(seed=1, epoch=2, index=3).integers(0, 100, size=4).tolist() == [51, 24, 81, 4]


def test_every_sample_of_every_epoch_and_seed_draws_numbers_of_its_own():
    keys = [(seed, epoch, index) for seed in range(3) for epoch in range(4) for index in range(50)]

    draws = {tuple(sample_rng(*key).integers(0, 2**63, size=4).tolist()) for key in keys}

    assert len(draws) == len(keys)


# Evaluation.


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40))
def test_no_sample_is_lost_or_counted_twice_in_evaluation(samples, world_size, batch_size):
    ranks = [
        list(eval_batches(samples, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]

    seen = [index for batches in ranks for batch in batches for index in batch.tolist()]
    assert sorted(seen) == list(range(samples))
    assert all(0 < len(batch) <= batch_size for batches in ranks for batch in batches)


# Digits.


def digits(image_size=16, seed=0):
    return build_source("digits", image_size=image_size, seed=seed)


def pixels(source, epoch, batch_size, order):
    """Images and labels of ``order``, loaded in batches."""
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    images, labels = zip(*source.train(batches, epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("batch_size", [1, 7, 50, 100])
def test_digits_are_bit_identical_whatever_the_batch(batch_size):
    order = epoch_order(1437, 0, 3)[:100]

    images, labels = pixels(digits(), 3, batch_size, order)

    expected = pixels(digits(), 3, 100, order)
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])


@pytest.mark.parametrize("change", ["epoch", "seed"])
def test_another_epoch_or_seed_shifts_the_digits_anew(change):
    order = np.arange(50)

    changed, labels = pixels(digits(seed=change == "seed"), int(change == "epoch"), 50, order)

    images, same = pixels(digits(), 0, 50, order)
    assert not torch.equal(changed, images)
    assert torch.equal(labels, same)


@pytest.mark.parametrize("image_size", [8, 16, 24])
def test_digits_are_fp32_in_minus_one_to_one_and_use_the_range(image_size):
    source = digits(image_size)

    images, labels = next(source.evaluate([np.arange(source.eval_samples)]))

    assert images.shape == (source.eval_samples, source.channels, image_size, image_size)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)


def test_training_digits_are_the_data_sets_own_shifted_by_at_most_one_pixel():
    images, _ = pixels(digits(8), 0, 200, np.arange(200))
    own = torch.from_numpy(load_digits().images).float() / 8 - 1
    padded = torch.nn.functional.pad(own, (1, 1, 1, 1), value=-1.0)
    shifted = {
        padded[:, y : y + 8, x : x + 8][i].numpy().tobytes() for i in range(1797) for y in range(3) for x in range(3)
    }

    assert [i for i, image in enumerate(images) if image[0].contiguous().numpy().tobytes() not in shifted] == []


def test_the_digits_split_is_disjoint_complete_stratified_and_the_same_for_every_seed():
    source, other = digits(8), digits(8, seed=9)

    held_out, labels = next(source.evaluate([np.arange(source.eval_samples)]))

    assert source.train_samples + source.eval_samples == 1797
    train_labels = pixels(source, 0, 1437, np.arange(source.train_samples))[1]
    everything = torch.cat([labels, train_labels])
    assert torch.equal(everything.bincount(), torch.from_numpy(np.bincount(load_digits().target)))
    assert (labels.bincount() / everything.bincount() - 0.2).abs().max() < 0.01
    assert torch.equal(held_out, next(other.evaluate([np.arange(other.eval_samples)]))[0])
    own = torch.from_numpy(load_digits().images).float() / 8 - 1
    both = torch.cat([source._train[0], source._held_out[0]])
    assert sorted(image.numpy().tobytes() for image in both) == sorted(image.numpy().tobytes() for image in own)


@pytest.mark.parametrize("image_size", [4, 18, 28])
def test_a_size_that_is_no_multiple_of_8_is_refused(image_size):
    with pytest.raises(ValueError, match=rf"image_size = {image_size}: .* multiples of 8"):
        digits(image_size)


# Synthetic images.


def synthetic(**options):
    return build_source("synthetic", image_size=8, seed=0, **options)


def test_synthetic_images_are_as_many_as_imagenets_unless_told_otherwise():
    source, other = synthetic(), synthetic(classes=3, train_samples=10, eval_samples=4)

    assert (source.classes, source.train_samples, source.eval_samples) == (1000, 1_281_167, 50_000)
    assert (other.classes, other.train_samples, other.eval_samples) == (3, 10, 4)


def test_synthetic_images_are_made_once_for_each_size_of_batch():
    source = synthetic(classes=3)

    first, second, last = source.train([np.arange(4), np.arange(4, 8), np.arange(8, 10)], 0)

    assert first[0] is second[0]
    assert (first[0].shape, last[0].shape) == ((4, 3, 8, 8), (2, 3, 8, 8))
    assert (first[0].dtype, first[1].dtype) == (torch.float32, torch.int64)
    assert -1 <= first[0].min() < -0.5 < 0.5 < first[0].max() <= 1
    assert set(first[1].tolist()) <= {0, 1, 2}


# Options.


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("images", {}, "data 'images' needs a path"),
        ("digits", {"path": "here"}, "data 'digits' takes no path, got here"),
        ("digits", {"rand_augment": (2, 15)}, r"data 'digits' takes no rand_augment, got \(2, 15\)"),
        ("digits", {"loader": "dali"}, "data 'digits' takes no loader, got dali: only 'images' does"),
        ("synthetic", {"path": "here"}, "data 'synthetic' takes no path, got here"),
        ("cifar", {}, "data 'cifar': accepted are digits, idx, images, synthetic"),
    ],
)
def test_an_option_that_is_missing_or_not_wanted_is_refused(name, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        build_source(name, image_size=16, seed=0, **options)
