"""How much of the machine other processes took meanwhile: with them about, a time says little."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

STAT = Path("/proc/stat")


class Others:
    """The share of all cores that other processes took, once it is known."""

    share: float | None = None

    def __str__(self) -> str:
        if self.share is None:
            return "the load by others is unknown"
        return f"other processes took {self.share:.0%} of the cores"


@contextlib.contextmanager
def watched() -> Iterator[Others]:
    """Fills in the ``Others`` that it gives at the end."""
    others = Others()
    start, busy, own = time.perf_counter(), _busy(), _own()
    yield others
    seconds = time.perf_counter() - start
    now = _busy()
    if busy is not None and now is not None:
        cores = os.cpu_count() or 1
        others.share = min(1.0, max(0.0, (now - busy) - (_own() - own)) / (seconds * cores))


def _busy() -> float | None:
    """Seconds that all cores were busy, since the machine started; what the host took of it counts."""
    if not STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Seconds of this process and of those that it waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
