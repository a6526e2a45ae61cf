"""A rank that fails ends the others, wherever they wait."""

import threading

import pytest
import torch.distributed as dist

from prelora.errors import DataError
from prelora.train import failure
from prelora.train.failure import FailureWatch
from prelora.train.stop import StopRequested


@pytest.fixture
def ended(monkeypatch):
    """Set when a process would have been ended from within."""
    event = threading.Event()
    monkeypatch.setattr(failure, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(failure, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(failure.os, "_exit", lambda code: event.set())
    return event


def fail(store, rank, error):
    with pytest.raises(type(error)), FailureWatch(store, rank):
        raise error


def test_the_first_failure_is_what_every_rank_hears_of(ended):
    store = dist.HashStore()
    fail(store, 3, DataError("cat.jpg is cut"))
    fail(store, 1, RuntimeError("connection closed"))

    with FailureWatch(store, 0) as watch:
        assert watch.failure() == "rank 3: cat.jpg is cut"


def test_a_rank_that_waits_in_a_collective_is_ended_naming_the_one_that_failed(ended, capfd):
    store = dist.HashStore()
    with FailureWatch(store, 0):
        fail(store, 3, DataError("cat.jpg is cut"))
        assert ended.wait(10)

    assert "rank 0 ends with rank 3: cat.jpg is cut" in capfd.readouterr().err


def test_a_rank_that_ends_by_itself_in_time_is_left_to_it(ended):
    store = dist.HashStore()
    with FailureWatch(store, 0):
        fail(store, 3, DataError("cat.jpg is cut"))

    assert not ended.wait(0.2)


def test_a_stop_that_all_ranks_agreed_to_is_no_failure(ended):
    store = dist.HashStore()
    fail(store, 3, StopRequested("SIGTERM"))

    with FailureWatch(store, 0) as watch:
        assert watch.failure() is None
