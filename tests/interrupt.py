"""Run the trainer and let a signal hit it at an exact point: ``interrupt.py SIGNALS POINT N train ARGUMENTS``.

The N-th call of the function at POINT sends SIGNALS to this process (of several ranks: to rank 0's) before the
function does its work. SIGNALS is one, or several joined by ``+``; ``torchrun:SIGTERM`` goes to torchrun, which hands
it on to every rank.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

POINTS = {
    "step": ("prelora.train.loop", "Trainer._update"),
    "epoch_end": ("prelora.train.loop", "Trainer._end_epoch"),
    "surgery": ("prelora.controller", "PreLoRA._operate"),
    "rebuild": ("prelora.optim", "rebuild_optimizer"),
    "rewrap": ("prelora.distributed", "rewrap"),
    "evaluation": ("prelora.train.evaluate", "logits"),
    "record": ("prelora.train.run_dir", "MetricsLog.write"),
    "checkpoint": ("prelora.train.loop", "save_together"),
    "tensors": ("prelora.checkpoint", "save_file"),
    "manifest": ("prelora.checkpoint", "_sha256"),
    "prune": ("prelora.train.loop", "prune"),
    "removal": ("shutil", "rmtree"),
}


def send(name):
    number = signal.Signals[name.rpartition(":")[2]]
    if not name.startswith("torchrun:"):
        # To this very thread: sent to the process, two of a kind may meet in another thread and count as one.
        return signal.raise_signal(number)
    came = []
    handler = signal.signal(number, lambda *_: came.append(True))
    os.kill(os.getppid(), number)
    while not came:
        time.sleep(0.01)
    signal.signal(number, handler)
    return signal.raise_signal(number)


def arm(names, point, count):
    module, path = POINTS[point]
    owner = importlib.import_module(module)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, attribute)
    calls = 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and os.environ.get("RANK", "0") == "0":
            for name in names.split("+"):
                send(name)
        return original(*args, **kwargs)

    setattr(owner, attribute, interrupted)


def train_rank(environment, *arguments):
    """As ``train``, in one of several ranks, which ``environment`` makes it."""
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    train(*arguments)


def train(interruption, arguments, log=None):
    """The trainer's exit code becomes this process's; what it prints goes to ``log``."""
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    if interruption:
        # As at a terminal: what a shell starts in the background ignores Ctrl-C, and hands that on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        arm(interruption[0], interruption[1], int(interruption[2]))
    from prelora.train.__main__ import main

    code = main(arguments)
    # A thread of gloo's that is still there when Python ends may abort the process: seen once in seventeen runs.
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    lasting = [name for name in threads if "gloo" in name]
    sys.exit(f"threads outlive the run: {lasting}" if lasting else code)


if __name__ == "__main__":
    split = sys.argv.index("train")
    train(sys.argv[1:split], sys.argv[split + 1 :])
