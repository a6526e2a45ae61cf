"""Two gloo processes that live as long as a test module and do what its tests hand them."""

import datetime as dt
import multiprocessing
import os

import torch
import torch.distributed as dist

WORLD = 2


def serve(rank, folder, pipe):
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=dt.timedelta(seconds=60))
    while (work := pipe.recv()) is not None:
        function, arguments = work
        try:
            pipe.send((function(*arguments), None))
        except Exception as error:  # noqa: BLE001 (the test's process shows it)
            pipe.send((None, f"rank {rank}: {type(error).__name__}: {error}"))
    dist.destroy_process_group()


class Ranks:
    """Called with a module-level function and its arguments, runs it on every rank; returns what each returned."""

    def __init__(self, folder):
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(WORLD)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(rank, str(folder), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self.pipes]
        assert [error for _, error in answers] == [None] * WORLD
        return [value for value, _ in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=30)
            process.kill()
