"""The fastest of several launch configurations, measured once for a device and a shape and kept on disk.

Off unless ``PRELORA_AUTOTUNE=1``: then the first candidate, the heuristic's choice, is taken unmeasured. Configurations
may sum in different orders, so ranks that found different winners, or a run resumed after another tuning, differ in
last bits: where equal bits matter, tune once beforehand and share the file.

The file is ``autotune.json`` under ``$PRELORA_CACHE`` or ``~/.cache/prelora``.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

Config = TypeVar("Config")
"""A frozen dataclass of numbers and strings."""
Launch = Callable[[], Any]


def tuned(
    kernel: str,
    device: torch.device,
    shape: Sequence[Hashable],
    candidates: Sequence[Config],
    prepare: Callable[[Config], Launch],
) -> Config:
    """The configuration of ``candidates`` to launch ``kernel`` with.

    Args:
        kernel: its name, with what else decides its code, such as dtypes.
        shape: what the winner may depend on: sizes, rounded where near ones may share a winner.
        candidates: the heuristic's choice first.
        prepare: gives the launch of a configuration, with all work of the host that should not be measured done.
    """
    if os.environ.get("PRELORA_AUTOTUNE") != "1" or device.type != "cuda":
        return candidates[0]
    return _tuner(cache_directory() / "autotune.json").choose(
        f"{kernel} | {torch.cuda.get_device_name(device)} | triton {triton.__version__} | {' '.join(map(str, shape))}",
        candidates,
        prepare,
    )


def cache_directory() -> Path:
    """Where prelora keeps what it measured."""
    return Path(os.environ.get("PRELORA_CACHE") or Path.home() / ".cache" / "prelora")


def median_milliseconds(launch: Launch) -> float:
    """Of some tens of runs on the GPU, the L2 cache flushed before each."""
    return float(triton.testing.do_bench(launch, return_mode="median"))


class Tuner:
    """Winners by key, in memory and in one JSON file."""

    def __init__(self, path: Path, measure: Callable[[Launch], float] = median_milliseconds) -> None:
        self.path = path
        self.measure = measure
        self.winners: dict[str, Any] = {}

    def choose(self, key: str, candidates: Sequence[Config], prepare: Callable[[Config], Launch]) -> Config:
        """The winner kept under ``key``, if it still is a candidate; else measure them all and keep it.

        Raises:
            RuntimeError: no candidate can be launched.
        """
        if winner := _find(self.winners.get(key), candidates):
            return winner
        self.winners = self._load() | self.winners
        if winner := _find(self.winners.get(key), candidates):
            return winner
        times = [self._time(candidate, prepare) for candidate in candidates]
        if min(times) == math.inf:
            raise RuntimeError(f"no candidate can be launched for {key}: {', '.join(map(str, candidates))}")
        winner = candidates[times.index(min(times))]
        self.winners[key] = {"config": asdict(winner), "milliseconds": min(times)}
        self._save(key)
        return winner

    def _time(self, candidate: Config, prepare: Callable[[Config], Launch]) -> float:
        try:
            return self.measure(prepare(candidate))
        except triton.TritonError:  # it asks for more registers or shared memory than the device has
            return math.inf

    def _load(self) -> dict[str, Any]:
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(f"{self.path} cannot be read and is measured anew: {error}", RuntimeWarning, stacklevel=4)
            return {}
        if not isinstance(kept, dict):
            warnings.warn(f"{self.path} is not a JSON object and is measured anew", RuntimeWarning, stacklevel=4)
            return {}
        return kept

    def _save(self, key: str) -> None:
        """Add one winner to what the file holds by now: other processes write it, too."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a damaged file, ``choose`` has warned
                kept = self._load() | {key: self.winners[key]}
            descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(kept, file, indent=1, sort_keys=True)
                os.replace(name, self.path)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"{self.path} cannot be written, the next run measures anew: {error}", stacklevel=3)


def _find(kept: Any, candidates: Sequence[Config]) -> Config | None:
    config = kept.get("config") if isinstance(kept, dict) else None
    return next((candidate for candidate in candidates if asdict(candidate) == config), None)


@cache
def _tuner(path: Path) -> Tuner:
    return Tuner(path)
