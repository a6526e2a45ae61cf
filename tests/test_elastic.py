"""Nodes meet, train, lose one of them, take in another in its place, and go on where they stood.

A node is a torchrun agent on loopback, with one rank.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from tiny_runs import finished, metrics, tiny

from prelora.train.config import save_yaml
from prelora.train.process_group import generation_store

CHANGES = {"data": {"batch_size": 80}, "checkpoint": {"every_steps": 3, "keep_last": 20}}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Node:
    """One agent and the worker below it."""

    def __init__(self, config, port, nodes, log):
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=run", "--max-restarts=3"]
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1", *rendezvous]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            # With the store shared between rounds, torch 2.14 never tells a node that joins a later one its address.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        self.log = log
        with log.open("w") as file:
            self.agent = subprocess.Popen(
                [*launch, "-m", "prelora.train", "--config", str(config)], stdout=file, stderr=file, env=environment
            )

    def lose(self):
        """Kill the worker and the agent at once, as when a machine loses its power."""
        pid = self.agent.pid
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            workers = [int(worker) for worker in file.read().split()]
        for process in (pid, *workers):
            os.kill(process, signal.SIGKILL)
        self.agent.wait()

    def end(self):
        code = self.agent.wait(timeout=120)
        print(self.log.read_text())  # pytest shows it with a failure
        return code


def run_nodes(output):
    """Train on two nodes, of which one is lost within the warm-up and replaced; the exit codes of those that end."""
    save_yaml(tiny(output, resume="auto", **CHANGES), output.with_suffix(".yaml"))
    port, nodes = free_port(), []

    def start():
        nodes.append(Node(output.with_suffix(".yaml"), port, 2, output.with_suffix(f".{len(nodes)}.log")))
        return nodes[-1]

    kept = start()
    while not _listens(port):  # the first node holds the rendezvous, and this one must be it
        time.sleep(0.05)
    lost = start()
    deadline = time.monotonic() + 120
    while not (output / "checkpoints" / "step-000000019").exists():
        assert time.monotonic() < deadline, kept.log.read_text()
        time.sleep(0.02)
    lost.lose()
    successor = start()
    return [kept.end(), successor.end()]


def _listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_lost_node_is_replaced_and_the_run_ends_as_if_nothing_had_happened(tmp_path):
    alone = finished(tmp_path / "alone", data={"batch_size": 160})

    assert run_nodes(tmp_path / "run") == [0, 0]

    logs = [(tmp_path / f"run.{node}.log").read_text() for node in (0, 2)]
    assert any("resume: going on from" in log for log in logs)
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(alone), strict=True):
        assert (mine["phase"], mine["event"]["ranks"]) == (theirs["phase"], theirs["event"]["ranks"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def met(store, ranks):
    """What each rank's part of the store is after they have met, in threads."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda rank: generation_store(store, rank, ranks, seconds=20), range(ranks)))


def test_ranks_meet_in_a_part_of_the_store_that_an_earlier_generation_never_saw():
    store = dist.HashStore()
    before = met(store, 3)
    before[1].set("address", "of a dead process")

    now = met(store, 3)
    now[2].set("from 2", "live")

    assert now[0].get("from 2") == b"live"
    assert not now[0].check(["address"])


def test_a_rank_that_does_not_come_is_named():
    store = dist.HashStore()
    store.set("hello/1", "of a dead process")

    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not come within 0 s"):
        generation_store(store, 0, 2, seconds=0.1)
