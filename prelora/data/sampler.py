"""The order of samples and their random numbers, as pure functions: nothing to save, nothing to skip through."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``samples`` indices for an epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """A counter-based generator of its own for each sample of each epoch."""
    return np.random.Generator(np.random.Philox(counter=[0, 0, 0, index + 1], key=[seed, epoch]))


def train_batches(
    samples: int,
    seed: int,
    epoch: int,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    first: int,
    count: int,
    epochs_per_pass: int = 1,
) -> Iterator[np.ndarray]:
    """Indices of this rank's batches ``first`` to ``count`` − 1 of an epoch.

    Consecutive batches are dealt to the ranks in turn, so the same samples make up an optimizer step however it
    is split into ranks × micro-batches of the same total.

    Args:
        count: batches of an epoch, of this rank.
        epochs_per_pass: epochs in one pass over the samples; the next one takes up where the one before ended.
    """
    passes, part = divmod(epoch, epochs_per_pass)
    order = epoch_order(samples, seed, passes)
    for batch in range(part * count + first, (part + 1) * count):
        start = (batch * world_size + rank) * batch_size
        yield order[start : start + batch_size]


def eval_batches(samples: int, *, batch_size: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """Indices of this rank's evaluation batches: over all ranks every sample exactly once."""
    mine = np.arange(rank, samples, world_size)
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]
