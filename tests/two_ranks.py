"""Gloo processes, two unless told otherwise, that live as long as a test module and do what its tests hand them."""

import contextlib
import datetime as dt
import hashlib
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist

WORLD = 2


def serve(rank, folder, pipe):
    torch.set_num_threads(1)
    met = None
    while (work := pipe.recv()) is not None:
        world, meeting, function, arguments = work
        if meeting != met:
            join(rank, world, os.path.join(folder, meeting))
            met = meeting
        try:
            pipe.send((function(*arguments), None))
        except Exception as error:  # noqa: BLE001 (the test's process shows it)
            pipe.send((None, f"rank {rank}: {type(error).__name__}: {error}"))
    if dist.is_initialized():
        dist.destroy_process_group()


def join(rank, world, meeting):
    """Have the default process group be one of ``world`` ranks; of one rank, be none."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if world > 1:
        store = dist.FileStore(meeting, world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=dt.timedelta(seconds=60))


class Ranks:
    """Called with a module-level function and its arguments, runs it on every rank; returns what each returned."""

    def __init__(self, folder, world=WORLD, preload=()):
        # Forked from a process that has imported what takes seconds; its own and the test's threads stay out of it.
        context = multiprocessing.get_context("forkserver")
        imported = ["prelora", "timm", "torch.distributed.fsdp", "torch.distributed.tensor", *preload]
        context.set_forkserver_preload(imported)
        pipes = [context.Pipe() for _ in range(world)]
        self.world = self.met = world
        self.meetings = 0
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(rank, str(folder), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *arguments):
        return self.only(self.world, function, *arguments)

    def only(self, world, function, *arguments):
        """The same on the first ``world`` of the ranks, as a process group of their own."""
        if world != self.met:
            self.met, self.meetings = world, self.meetings + 1
        for pipe in self.pipes[:world]:
            pipe.send((world, f"store{self.meetings}", function, arguments))
        answers = [pipe.recv() for pipe in self.pipes[:world]]
        assert [error for _, error in answers] == [None] * world
        return [value for value, _ in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=30)
            process.kill()


@contextlib.contextmanager
def running(folder, world=WORLD, preload=()):
    """``Ranks`` with one thread each, closed at the end.

    Args:
        folder: an empty one, where they meet.
        preload: what else the process that they are forked from imports, if it is not running yet.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        started = Ranks(folder, world, preload)
        yield started
        started.close()


def bits(tree):
    """A hash of every tensor, by name; plain values as they are."""
    if isinstance(tree, torch.Tensor):
        return hashlib.sha256(tree.detach().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    return [bits(item) for item in tree] if isinstance(tree, (list, tuple)) else tree
