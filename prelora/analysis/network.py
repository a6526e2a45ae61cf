"""Collectives of a training step: DDP's buckets, how long they take, and what backward does not hide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prelora.analysis.hardware import Cluster

MIB = 2**20
FIRST_BUCKET, BUCKET = 1 * MIB, 25 * MIB
"""DDP's defaults: a small first bucket, so that communication starts early."""


def bucket_bytes(sizes: Iterable[int]) -> list[int]:
    """Bytes of DDP's buckets as it builds them after its first step, in the order in which they are reduced.

    Args:
        sizes: bytes of the gradients that are reduced, in the order in which backward gives them.
    """
    buckets, filling, limit = [], 0, FIRST_BUCKET
    for size in sizes:
        filling += size
        if filling >= limit:
            buckets.append(filling)
            filling, limit = 0, BUCKET
    return [*buckets, filling] if filling else buckets


def all_reduce_seconds(size: float, cluster: Cluster) -> float:
    """Of one ring all-reduce of ``size`` bytes: each GPU sends and receives 2·(n − 1)/n of them."""
    return 2 * gather_seconds(size, cluster) - cluster.latency if cluster.gpus > 1 else 0.0


def gather_seconds(size: float, cluster: Cluster) -> float:
    """Of one all-gather to, or reduce-scatter of, ``size`` bytes: half an all-reduce."""
    if cluster.gpus == 1:
        return 0.0
    return cluster.latency + (cluster.gpus - 1) / cluster.gpus * size / cluster.bus


def exposed_seconds(seconds: Sequence[float], computing: float) -> float:
    """What a chain of collectives adds to the computation beside which it runs.

    The i-th may start once its share of the computation is done, and after the one before it; computation is taken
    to be spread evenly over the collectives, as backward's is over the bytes of gradients that it gives.

    Args:
        seconds: of each collective.
        computing: seconds of the computation, as backward.
    """
    done = 0.0
    for place, length in enumerate(seconds, start=1):
        done = max(done, computing * place / len(seconds)) + length
    return max(0.0, done - computing)
