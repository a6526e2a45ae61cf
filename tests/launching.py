"""Runs of the trainer in processes of their own, alone or by torchrun, and what they leave."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import interrupt
import torch
import torch.distributed as dist
from tiny_runs import MEASURED

from prelora.checkpoint import checkpoints, load_checkpoint, newest_valid, read_manifest
from prelora.train.config import save_yaml

# Children are forked from a server that has torch, timm and the trainer loaded: real processes at a second each.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["interrupt", "timm", "prelora.train.__main__", "sklearn.datasets"])


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# The same number of threads in every run: sums round by it.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def prepare(config, output):
    output.parent.mkdir(parents=True, exist_ok=True)
    save_yaml(dataclasses.replace(config, output=output, resume="auto"), output.with_suffix(".yaml"))
    return ["--config", str(output.with_suffix(".yaml"))]


def run(config, output, *interruption):
    """Train in a process of its own; returns the exit code, negative for the signal that killed it."""
    log = output.with_suffix(".log")
    child = FORKSERVER.Process(target=interrupt.train, args=(interruption, prepare(config, output), str(log)))
    child.start()
    child.join(timeout=120)
    print(log.read_text())  # pytest shows it with a failure
    assert child.exitcode is not None, "the run hangs"
    return child.exitcode


def run_ranks(config, output, *interruption, ranks):
    """Train on gloo ranks forked as in ``run``, with what torchrun would tell them; returns their exit codes."""
    log = output.with_suffix(".log")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives them, as the agent's does
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    arguments = (interruption, prepare(config, output), str(log))
    children = []
    for rank in map(str, range(ranks)):
        environment = common | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks)}
        children.append(FORKSERVER.Process(target=interrupt.train_rank, args=(environment, *arguments)))
        children[-1].start()
    for child in children:
        child.join(timeout=300)
        child.kill()  # which is nothing to one that has ended
    print(log.read_text())
    return [child.exitcode for child in children]


def run_example(name, *options, ranks=None):
    """Run a script of ``examples/``, by torchrun if on ``ranks``; returns what it printed."""
    start = [sys.executable] if ranks is None else launch(ranks)
    command = [*start, str(EXAMPLES / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launch(ranks, *options):
    """The command line up to the script."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", *options]


def torchrun(config, output, *interruption, ranks, options=()):
    """Train on gloo ranks; returns torchrun's exit code, and its output in ``output``'s log."""
    command = [*launch(ranks, *options), interrupt.__file__, *map(str, interruption), "train", *prepare(config, output)]
    log = output.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=ENVIRONMENT, timeout=300, check=False)
    print(log.read_text())
    return done.returncode


def outcome(output):
    """Everything a run leaves that is not a measurement: every tensor of the last checkpoint, and the metrics."""
    tree = load_checkpoint(checkpoints(output / "checkpoints")[0])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
    kept = ("model", "ema", "optimizer", "scheduler", "phase", "step", "ranks", "ramps", "monitor")
    return {"metrics": metrics, "of ranks": tree["train"]["ranks"], **{key: tree[key] for key in kept}}


def assert_equal(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}/{index}")
    else:
        assert one == other or (one != one and other != other), where


def left(output):
    """The checkpoint to go on from, as "<step> <phase>"."""
    path = newest_valid(output / "checkpoints")[0]
    if path is None:
        return "nothing"
    return f"{path.name.removeprefix('step-').lstrip('0')} {read_manifest(path).about['phase']}"
