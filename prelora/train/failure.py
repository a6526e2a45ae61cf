"""One rank fails: the others, which wait for it in a collective, end too instead of hanging."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from types import TracebackType

import torch.distributed as dist

from prelora.exits import EXIT_OTHER_RANK
from prelora.train.stop import StopRequested

KEY = "failed"
POLL_SECONDS = 0.5
GRACE_SECONDS = 2.0


class FailureWatch:
    """Tells the other ranks when this one fails, and ends this process when one of them has.

    A rank that waits in a collective runs no Python: neither torchrun's SIGTERM nor an exception reaches it, so a
    thread of its own looks into the store that the ranks met in.

    Args:
        store: of this group of processes alone.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store = store.clone()
        self._rank = rank
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> FailureWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not isinstance(error, StopRequested):
            with contextlib.suppress(RuntimeError):  # the store's holder is gone, and nobody is left to tell
                self._store.compare_set(KEY, "", f"rank {self._rank}: {error}")
        self.close()

    def failure(self) -> str | None:
        """What the first rank that failed said of it; None while none has."""
        try:
            return self._store.get(KEY).decode() if self._store.check([KEY]) else None
        except RuntimeError:
            # Whoever holds the store is gone, at a run's end or with its node: of that torchrun tells.
            return None

    def close(self) -> None:
        """Watch no longer."""
        self._done.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            failure = self.failure()
            if failure is not None and not self._done.wait(GRACE_SECONDS):
                print(f"prelora: error: rank {self._rank} ends with {failure}", file=sys.stderr, flush=True)
                # The main thread is inside a collective, from where no exception can get it.
                os._exit(EXIT_OTHER_RANK)
