"""What a run shows on the terminal: a bar an epoch where there is one, and a line an epoch anywhere."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prelora.errors import PreLoRAWarning


class Display:
    """Progress with phase, loss, img/s and the time left of the whole run."""

    def __init__(self, epochs: int, steps_per_epoch: int, enabled: bool) -> None:
        self._epochs = epochs
        self._steps = steps_per_epoch
        self._enabled = enabled
        self._bar: Any = None
        self._epoch = 0
        self._epoch_began = 0.0

    def start_run(self, loader: str) -> None:
        """Args: loader: what loads the images, and why that."""
        if self._enabled:
            print(f"images: {loader}", flush=True)

    def start_epoch(self, epoch: int, phase: str, done: int) -> None:
        """Args: epoch: 1-based; done: steps of it that are done already."""
        self._epoch = epoch
        self._epoch_began = time.perf_counter()
        self._bar = tqdm(
            total=self._steps,
            initial=done,
            desc=f"epoch {epoch}/{self._epochs} {phase}",
            disable=not (self._enabled and sys.stderr.isatty()),
            leave=False,
            unit="step",
        )

    def step(self, loss: float, images: int, seconds: float) -> None:
        """One step done; loss: mean of the epoch so far; images and seconds: of the epoch so far."""
        if self._bar is None or self._bar.disable:
            return
        self._bar.update()
        done = self._bar.n
        eta = _clock(((self._epochs - self._epoch + 1) * self._steps - done) * seconds / done)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {images / seconds:,.0f} img/s, ETA {eta}")

    def end_epoch(self, record: dict[str, Any]) -> None:
        """The epoch's line, with what PreLoRA did and why."""
        self.close()
        if not self._enabled:
            return
        score = f"{record['eval']['top1']:5.2f} %" if record["eval"] is not None else "   —   "
        spent = time.perf_counter() - self._epoch_began if self._epoch_began else record["seconds"]
        event = record["event"]
        print(
            f"epoch {record['epoch']:>3}/{self._epochs} {record['phase']:<6} loss {record['loss']:.4f}  "
            f"top-1 {score}  {record['img_per_s']:,.0f} img/s  "
            f"ETA {_clock((self._epochs - record['epoch']) * spent)}  {event['reason']}",
            flush=True,
        )
        if event["action"] != "none":
            print(f"  {event['action']}: {_change(event)}", flush=True)
        if record["quarantined"]:
            name, reason = list(record["quarantined"].items())[-1]
            print(f"  {len(record['quarantined'])} files cannot be used, as {name}: {reason}", flush=True)

    def end_run(self, phase: str, method: str, output: Path) -> None:
        """The last line: in which phase the run ended, and what can be done with it."""
        if not self._enabled:
            return
        if phase == "full" and method == "prelora":
            print(
                "The convergence test never passed: the run stayed at full rank to the end "
                "(wider prelora.tau and prelora.zeta, or a prelora.deadline, would switch it)."
            )
        if phase == "warmup":
            print("The run ended within the warm-up: not all was frozen (fewer prelora.warmup-epochs would).")
        print(f"Finished. Next: prelora export {output}, prelora report {output}", flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Show our own warnings as one line for a user, without the source line that gave them."""
    original = warnings.formatwarning

    def format_warning(message: Any, category: type[Warning], *where: Any, **line: Any) -> str:
        ours = issubclass(category, PreLoRAWarning)
        return f"prelora: warning: {message}\n" if ours else original(message, category, *where, **line)

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = original


def _change(event: dict[str, Any]) -> str:
    ranks = list(event["ranks"].values())
    counts = ", ".join(f"{ranks.count(rank)} × {rank}" for rank in sorted(set(ranks)))
    # Of the base's size: in the warm-up of a small model, base and LoRA together are over 100 %.
    share = f"trainable {100 * event['trainable_share']:.2f} % of the base model's size"
    released = sum(event["released"].values())
    return f"ranks {counts}; {share}" + (f"; {released / 2**20:,.1f} MiB released" if released else "")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
