"""Which window of an image is seen: AugReg's inception crop, and the centre in evaluation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize

from prelora.data.augment import EvalViews, TrainViews, inception_crop

sides = st.integers(1, 900)


def views(epoch=0, seed=0, rand_augment=(2, 15)):
    return TrainViews(seed, epoch, 64, rand_augment)


@given(sides, sides, st.integers(0, 2**20))
def test_a_window_lies_inside_of_its_image_and_is_resized_to_the_square(height, width, index):
    view = views()(index, height, width)

    assert (view.start >= 0).all()
    assert (view.shape > 0).all()
    assert (view.start + view.shape <= [height, width]).all()
    assert view.resized.tolist() == [64, 64]
    assert view.offset.tolist() == [0, 0]


def test_windows_have_the_recipes_areas_and_ratios():
    shapes = np.array([views()(index, 300, 400).shape for index in range(4000)])
    area, ratio = shapes.prod(1) / (300 * 400), shapes[:, 1] / shapes[:, 0]

    assert 0.049 < area.min() < 0.06  # sides are whole pixels
    assert 0.9 < area.max() <= 1
    assert 0.73 < ratio.min() < 0.76
    assert 1.31 < ratio.max() < 1.36


def test_windows_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    image = torch.empty(3, 120, 200)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.05, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])

    rng = np.random.default_rng(0)
    ours = np.array([inception_crop(rng.random((10, 4)), 120, 200) for _ in range(4000)])

    quantiles = np.linspace(0.05, 0.95, 7)
    difference = np.quantile(ours, quantiles, axis=0) - np.quantile(theirs, quantiles, axis=0)
    assert np.abs(difference).max() <= 6


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(10, 400, (0, 193, 10, 13)), (400, 9, (194, 0, 12, 9)), (40, 41, (0, 0, 40, 41))],
)
def test_where_no_attempt_fits_the_window_is_the_centre(height, width, window):
    never = np.tile([1.0, 0.0, 0.5, 0.5] if height > width else [1.0, 1.0, 0.5, 0.5], (10, 1))

    assert inception_crop(never, height, width) == window


def test_half_of_the_windows_are_flipped():
    assert np.mean([views()(index, 50, 50).flip for index in range(2000)]) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}])
def test_another_epoch_or_seed_draws_anew(change):
    before, after = (make(7, 300, 400) for make in (views(), views(**change)))

    assert before.start.tolist() != after.start.tolist()
    assert not np.array_equal(before.operations, after.operations)


def test_a_crop_does_not_move_the_draws_that_follow_it():
    """A sample that stands in for another of another size is augmented like it."""
    small, large = views()(7, 12, 90), views()(7, 300, 400)

    assert np.array_equal(small.operations, large.operations)
    assert small.flip == large.flip


def test_draws_stay_what_they_were_when_runs_were_saved():
    """A resumed run of an earlier version must see the same windows."""
    view = TrainViews(3, 5, 224, None)(11, 375, 500)

    assert (view.start.tolist(), view.shape.tolist(), view.flip.item()) == ([34, 77], [325, 339], 0)


@settings(deadline=None)
@given(sides, sides, st.sampled_from([16, 64, 224]))
def test_an_evaluation_keeps_what_torchvisions_resize_and_centre_crop_keep(height, width, size):
    view = EvalViews(size)(0, height, width)
    resized = Resize(round(size * 256 / 224))(torch.empty(1, height, width, device="meta"))

    assert view.resized.tolist() == list(resized.shape[1:])
    assert view.shape.tolist() == [height, width]
    kept = CenterCrop(size)(torch.arange(resized.shape[1] * resized.shape[2]).view(1, *resized.shape[1:]))
    assert divmod(kept[0, 0, 0].item(), resized.shape[2]) == tuple(view.offset.tolist())
    assert not view.flip
