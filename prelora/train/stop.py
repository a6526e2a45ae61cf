"""Stop on SIGTERM or SIGINT where all ranks agree to."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from prelora import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(Exception):  # noqa: N818 (a request, not an error)
    """All ranks agreed to stop; raised at a boundary from which the run can be resumed."""


class Stopper:
    """Notes a signal, and lets the ranks agree on it together with whether the step's loss is finite."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            # Ctrl-C after a signal means it: the handlers that were there before decide. A second SIGTERM does not:
            # Slurm sends one to every process, and torchrun hands its own on.
            self.restore()
            signal.raise_signal(number)
        self.signal = signal.Signals(number).name

    def restore(self) -> None:
        """Put the former signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agree(self, finite: Tensor | None = None) -> tuple[bool, bool]:
        """(Some rank was asked to stop, every rank's ``finite`` holds): one small collective, the same on all."""
        flags = torch.tensor([self.signal is not None, False], dtype=torch.float32)
        if finite is not None:
            flags[1] = (~finite).float().to(flags.device)
        if distributed.world_size() > 1:
            flags = flags.to(distributed.collective_device())
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, bad = flags.tolist()
        return bool(stop), not bad

    def check(self) -> None:
        """Raise ``StopRequested`` on all ranks if any was asked to stop."""
        if self.agree()[0]:
            raise StopRequested(self.signal or "a signal on another rank")
