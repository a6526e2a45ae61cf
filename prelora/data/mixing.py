"""Mixup and CutMix on the device, after the loader: what is drawn is a function of (seed, step) alone."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CUTMIX_SHARE = 0.5
"""How often CutMix is taken where both are on, as in timm."""


def batch_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one optimizer step, alike on every rank, for every micro-batch and after a resume."""
    # The third word keeps it apart from the samples' generators, which have the same keys.
    return np.random.Generator(np.random.Philox(counter=[0, 0, 1, 0], key=[seed, step]))


def mix(
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    mixup: float,
    cutmix: float,
    label_smoothing: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Each image mixed with the one in the mirrored place of its batch: the first with the last.

    How strongly, whether by Mixup or CutMix, and CutMix's box are one draw for the whole batch; with ``batch_rng`` for
    the whole global batch, as AugReg has it, however that is split into ranks and micro-batches. Only the partners
    depend on the split: they come from the same rank's micro-batch, so that no images travel.

    Args:
        images: floating [N, C, H, W], on any device; left as they are.
        labels: int64 [N].
        classes: of the targets.
        mixup: p of Mixup's Beta(p, p); 0: no Mixup.
        cutmix: p of CutMix's Beta(p, p); 0: no CutMix. With both, each is as likely.
        label_smoothing: share of a target that is spread evenly over the classes.
        rng: of the batch, from ``batch_rng``.

    Returns:
        Images as they came, [N, C, H, W], and targets, fp32 [N, classes], whose rows sum to 1.
    """
    share = 1.0
    if cutmix and (not mixup or rng.random() < CUTMIX_SHARE):
        images, share = _cut(images, rng.beta(cutmix, cutmix), rng)
    elif mixup:
        share = rng.beta(mixup, mixup)
        images = torch.lerp(images.flip(0), images, share)
    targets = F.one_hot(labels, classes).float() * (1 - label_smoothing) + label_smoothing / classes
    return images, torch.lerp(targets.flip(0), targets, share)


def _cut(images: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """The images with a box of the partner's, and the share that is left of them where the edge cuts the box."""
    height, width = images.shape[-2:]
    side = (1 - share) ** 0.5
    (top, bottom), (left, right) = (_span(length, int(length * side), rng) for length in (height, width))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _span(length: int, extent: int, rng: np.random.Generator) -> tuple[int, int]:
    """``extent`` pixels around any of ``length``, as far as they are inside."""
    centre = int(rng.integers(length))
    return max(0, centre - extent // 2), min(length, centre + (extent + 1) // 2)
