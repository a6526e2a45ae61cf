"""Mixup and CutMix: one draw for a step, whatever rank or micro-batch asks; targets that say what is in the image."""

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target, rand_bbox
from torch import Tensor

from prelora.data.mixing import batch_rng, mix
from prelora.data.sampler import sample_rng

CLASSES = 8
WAYS = pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0.0), (0.0, 1.0), (0.5, 1.0)])


def batch(images: int = 6) -> tuple[Tensor, Tensor]:
    """Random images, each with a label of its own."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(images, 3, 16, 16, generator=generator), torch.arange(images) % CLASSES


def mixed(step: int, mixup: float, cutmix: float, smoothing: float = 0.0, images: int = 6) -> tuple[Tensor, Tensor]:
    pixels, labels = batch(images)
    return mix(
        pixels,
        labels,
        classes=CLASSES,
        mixup=mixup,
        cutmix=cutmix,
        label_smoothing=smoothing,
        rng=batch_rng(3, step),
    )


@WAYS
def test_the_same_step_mixes_the_same_bits(mixup: float, cutmix: float) -> None:
    for step in range(8):
        for first, again in zip(mixed(step, mixup, cutmix), mixed(step, mixup, cutmix), strict=True):
            assert torch.equal(first, again)


@WAYS
def test_steps_differ(mixup: float, cutmix: float) -> None:
    assert len({tuple(mixed(step, mixup, cutmix)[1][0].tolist()) for step in range(20)}) > 10


@WAYS
def test_ranks_of_any_batch_size_mix_equally_strongly(mixup: float, cutmix: float) -> None:
    for step in range(8):
        large, small = mixed(step, mixup, cutmix, images=8)[1], mixed(step, mixup, cutmix, images=2)[1]
        assert torch.equal(large[0].max(), small[0].max())


@WAYS
def test_each_image_is_mixed_with_its_mirror_in_the_shares_of_its_target(mixup: float, cutmix: float) -> None:
    for step in range(8):
        images, _ = batch(2)
        pixels, targets = mixed(step, mixup, cutmix, images=2)
        own = targets[0, 0]
        if torch.isin(pixels, images).all():
            taken = (pixels[0] == images[0]).all(0).float().mean()
            torch.testing.assert_close(taken, own, rtol=0, atol=1e-6)
        else:
            torch.testing.assert_close(pixels[0], own * images[0] + (1 - own) * images[1], rtol=0, atol=1e-6)


def test_both_are_taken_where_both_are_on() -> None:
    images, _ = batch()
    cut = [bool(torch.isin(mixed(step, 0.5, 1.0)[0], images).all()) for step in range(40)]
    assert 10 < sum(cut) < 30


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_timms(smoothing: float) -> None:
    _, labels = batch()
    share = batch_rng(3, 7).beta(0.5, 0.5)
    expected = mixup_target(labels, CLASSES, share, smoothing)
    torch.testing.assert_close(mixed(7, 0.5, 0.0, smoothing)[1], expected)


def test_cutmix_boxes_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(20):
        images, _ = batch()
        rng = batch_rng(3, step)
        share = rng.beta(1.0, 1.0)
        monkeypatch.setattr(np.random, "randint", lambda low, high, size, rng=rng: rng.integers(low, high, size=size))
        top, bottom, left, right = rand_bbox(images.shape, share)
        expected = images.clone()
        expected[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
        assert torch.equal(mixed(step, 0.0, 1.0)[0], expected)


def test_shares_follow_the_beta_distribution() -> None:
    shares = np.array([mixed(step, 0.5, 0.0)[1][0, 0].item() for step in range(400)])
    # Beta(½, ½): mean ½, variance ⅛.
    assert abs(shares.mean() - 0.5) < 0.06
    assert abs(shares.var() - 0.125) < 0.02


def test_neither_leaves_the_images_and_smooths_the_labels() -> None:
    images, labels = batch()
    pixels, targets = mixed(0, 0.0, 0.0, smoothing=0.1)
    assert torch.equal(pixels, images)
    assert torch.equal(targets.argmax(1), labels)
    torch.testing.assert_close(targets.max(1).values, torch.full((6,), 0.9 + 0.1 / CLASSES))


def test_the_batch_that_came_is_left_as_it_was() -> None:
    images, labels = batch()
    kept = images.clone()
    for cutmix in (0.0, 1.0):
        mix(images, labels, classes=CLASSES, mixup=0.5, cutmix=cutmix, label_smoothing=0.0, rng=batch_rng(0, 1))
    assert torch.equal(images, kept)


def test_a_steps_generator_is_no_samples() -> None:
    step = batch_rng(0, 4).integers(2**62, size=64)
    samples = np.concatenate([sample_rng(0, 4, index).integers(2**62, size=64) for index in range(20)])
    assert not np.isin(step, samples).any()
