"""Where the time of an optimizer step goes, on the device's own clock."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

PARTS = ("data", "forward", "backward", "communication", "optimizer")
"""``data``: waiting for images; ``communication``: what of it is not hidden behind the backward pass."""


class StepClock:
    """Shares out the time between two marks to the part that the second one names.

    On CUDA the marks are events on the current stream, so that a host that runs ahead counts for nothing; they are
    read later, without holding up the stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def start(self) -> None:
        """A step begins: what lies before it belongs to no part."""
        self.mark("")

    def mark(self, part: str) -> None:
        """The time since the last mark was spent on ``part``."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def mark_when_computed(self, loss: Tensor, part: str) -> None:
        """Mark ``part`` when the backward pass from ``loss`` has computed everything, before it waits for other ranks.

        DDP and FSDP wait in callbacks that the autograd engine calls at the end, in the order in which they were
        queued; this one is queued first.
        """

        def queue(_: Tensor) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.mark(part))

        loss.register_hook(queue)

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            if part:
                self._seconds[part] += before.elapsed_time(after) / 1000 if self._cuda else after - before
        del self._marks[:-1]
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return taken
