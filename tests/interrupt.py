"""Run the trainer and let a signal hit it at an exact point: ``interrupt.py SIGNAL POINT N train ARGUMENTS``.

The N-th call of the function at POINT sends SIGNAL to this process (of several ranks: to rank 0's) before the
function does its work.
"""

import importlib
import os
import signal
import sys

POINTS = {
    "step": ("prelora.train.loop", "Trainer._update"),
    "epoch_end": ("prelora.train.loop", "Trainer._end_epoch"),
    "surgery": ("prelora.controller", "PreLoRA._change"),
    "rebuild": ("prelora.optim", "rebuild_optimizer"),
    "rewrap": ("prelora.distributed", "rewrap"),
    "evaluation": ("prelora.train.evaluate", "logits"),
    "record": ("prelora.train.run_dir", "MetricsLog.write"),
    "tensors": ("prelora.checkpoint", "save_file"),
    "manifest": ("prelora.checkpoint", "_sha256"),
    "prune": ("prelora.train.loop", "prune"),
}


def arm(name, point, count):
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
            os.kill(os.getpid(), signal.Signals[name])
        return original(*args, **kwargs)

    setattr(owner, attribute, interrupted)


def train(interruption, arguments, log=None):
    """The trainer's exit code becomes this process's; what it prints goes to ``log``."""
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    if interruption:
        arm(interruption[0], interruption[1], int(interruption[2]))
    from prelora.train.__main__ import main

    sys.exit(main(arguments))


if __name__ == "__main__":
    split = sys.argv.index("train")
    train(sys.argv[1:split], sys.argv[split + 1 :])
