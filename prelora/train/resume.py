"""What a checkpoint of one run may be resumed with, and each rank's own share of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from prelora import distributed
from prelora.errors import CheckpointError
from prelora.train.config import TrainConfig, to_dict
from prelora.train.rng import rng_state, seed_all, set_rng_state

# What may differ between the run that wrote a checkpoint and the one that goes on from it.
FREE = ("output", "resume", "checkpoint", "recipe", "eval_every", "distributed", "loggers", "data.path", "data.workers")
# These may if the global batch stays what it was: the same samples then make up the same steps.
SPLIT = ("data.batch_size", "optim.accumulate")


def check_resumable(saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Hold a checkpoint's config and number of ranks against this run's.

    Args:
        saved: the checkpoint's ``"train"`` entry.
        config: this run's config, as plain values.

    Raises:
        CheckpointError: naming the first field that differs and may not, with both values.
    """
    # A setting that is younger than the checkpoint was at its default.
    theirs, ours = flat(to_dict(TrainConfig())) | flat(saved["config"]), flat(config)
    for key in [*ours, *theirs]:
        if key in FREE or key.partition(".")[0] in FREE or key in SPLIT:
            continue
        if theirs.get(key) != ours.get(key):
            raise CheckpointError(
                f"the checkpoint was written with {key} = {theirs.get(key)}, the config says {ours.get(key)}: resume "
                f"with the same, or give another output to start anew"
            )
    before, now = _batch(theirs, saved["world_size"]), _batch(ours, distributed.world_size())
    if before[0] != now[0]:
        raise CheckpointError(
            f"the checkpoint was written with a global batch of {before[1]}, this run's is {now[1]}: steps, schedule "
            f"and the order of samples are counted in it; accepted is any split into images, accumulated batches and "
            f"ranks that gives {before[0]}"
        )


def rank_share(loss_sum: float) -> dict[str, Any]:
    """What is each rank's own in a checkpoint."""
    return {"rng": rng_state(), "loss_sum": loss_sum}


def restore_rank_share(saved: Mapping[str, Any], seed: int, step: int) -> float:
    """Set this rank's random states as they were; returns its sum of losses of the epoch under way.

    With another number of ranks there is no state to restore: they are drawn anew from (seed, step, rank).
    """
    shares = saved["ranks"]
    if len(shares) == distributed.world_size():
        set_rng_state(shares[distributed.rank()]["rng"])
    else:
        drawn = hashlib.sha256(f"{seed}:{step}:{distributed.rank()}".encode()).digest()
        seed_all(int.from_bytes(drawn[:4], "big"))
    return distributed.own_share([share["loss_sum"] for share in shares])


def _batch(config: Mapping[str, Any], ranks: int) -> tuple[int, str]:
    images, accumulated = (config[key] for key in SPLIT)
    total = images * accumulated * ranks
    return total, f"{total} = {images} images × {accumulated} accumulated × {ranks} rank(s)"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    keyed: dict[str, Any] = {}
    for key, value in values.items():
        keyed |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return keyed
