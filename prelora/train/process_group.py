"""Device, process group and global switches of a process that torchrun may have started."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from prelora.train.config import TrainConfig

JOIN_SECONDS = 600


def start(config: TrainConfig) -> tuple[torch.device, dist.Store | None]:
    """The device, and the store of this generation of ranks where there are several.

    Raises:
        ValueError: CUDA was asked for and is not there.
        TimeoutError: some ranks did not come.
    """
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ValueError("device = cuda: torch sees no CUDA device; accepted here is cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store = None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        common, rank, ranks = next(dist.rendezvous("env://"))
        store = generation_store(common, rank, ranks)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks, device_id=device if cuda else None
        )
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device, store


def generation_store(store: dist.Store, rank: int, world_size: int, seconds: float = JOIN_SECONDS) -> dist.Store:
    """A part of ``store`` that only the processes see which are there now.

    torchrun's store outlives its workers: restarted ones would find the addresses of dead ones. Its count of restarts
    does not tell generations apart, for a node that took another's place counts from 0. So rank 0 draws a name and
    answers every rank's own nonce with it, until each has said that it read the answer.

    Raises:
        TimeoutError: naming the ranks that did not come.
    """
    mine = uuid.uuid4().hex
    if rank != 0:
        store.set(f"hello/{rank}", mine)
        answer = f"welcome/{rank}/{mine}"
        store.wait([answer], timedelta(seconds=seconds))
        generation = store.get(answer).decode()
        store.set(f"joined/{generation}/{rank}", "")
        return dist.PrefixStore(generation, store)
    absent = set(range(1, world_size))
    deadline = time.monotonic() + seconds
    while absent:
        for other in sorted(absent):
            if store.check([f"joined/{mine}/{other}"]):
                absent.discard(other)
            elif store.check([f"hello/{other}"]):  # perhaps a dead process's, which nobody reads the answer to
                store.set(f"welcome/{other}/{store.get(f'hello/{other}').decode()}", mine)
        if absent and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(absent)} did not come within {seconds:.0f} s")
        time.sleep(0.02 if absent else 0)
    return dist.PrefixStore(mine, store)
