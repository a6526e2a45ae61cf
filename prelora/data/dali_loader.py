"""Batches by DALI: read ahead by threads, in an order that is ours, past files that DALI cannot decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from prelora.data.augment import View, Views
from prelora.data.dali import Columns, build_pipeline, columns, decode_alone, to_tensor
from prelora.data.samples import Encoded, Samples
from prelora.data.source import Batches
from prelora.errors import DataError

AHEAD = 2
"""Batches that are read before DALI asks for them."""
MAX_REBUILDS = 16
"""How often a pipeline may be built anew for files that DALI cannot decode."""


class _Batch(NamedTuple):
    samples: list[tuple[Encoded, View]]
    end: int
    """Batches of the epoch that are done when this one is."""


class _Feed:
    """Hands DALI one batch after the other, and keeps those that it has not given back yet."""

    def __init__(self) -> None:
        self.under_way: deque[_Batch] = deque()
        self._batches: Iterator[_Batch] = iter(())

    def start(self, batches: Iterator[_Batch]) -> None:
        self.under_way.clear()
        self._batches = batches

    def __call__(self) -> Columns:
        batch = next(self._batches)  # its StopIteration ends DALI's epoch
        self.under_way.append(batch)
        return columns(batch.samples)


class DaliLoader:
    """The batches of one split. A file that DALI cannot decode costs its pipeline, which is then built anew."""

    def __init__(
        self,
        samples: Samples,
        *,
        image_size: int,
        rand_augment: tuple[int, float] | None,
        threads: int,
        device: torch.device,
    ) -> None:
        """Args:
        image_size: side of the batches' images.
        rand_augment: operations and magnitude of the views.
        threads: that read, and as many that decode.
        device: where the images come out; decoding is done there, too.
        """
        self._samples = samples
        self._device = device
        self._image_size, self._rand_augment, self._threads = image_size, rand_augment, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-images")
        self._feed = _Feed()
        self._pipeline: Any = None
        self._rebuilds = 0
        self._turn: object = None

    def batches(self, indices: Sequence[np.ndarray], views: Views, *, replace: bool) -> Batches:
        """See ``prelora.data.images.Loader.batches``. Batches asked for later end those before.

        Raises:
            RuntimeError: later ones have been asked for.
        """
        done = 0
        mine = self._turn = object()
        self._rewind()
        try:
            self._start(indices, done, views, replace)
            while done < len(indices):
                if self._turn is not mine:
                    raise RuntimeError("other batches of this split have been asked for, which ended these")
                try:
                    (images,) = self._pipeline.run()
                except StopIteration:
                    return  # what is left are batches without a sample that can be used
                except DataError:  # of the feed
                    raise
                except RuntimeError as error:
                    self._pipeline = None
                    self._set_culprits_aside(error)
                    self._start(indices, done, views, replace)
                    continue
                batch = self._feed.under_way.popleft()
                done = batch.end
                yield to_tensor(images, self._device), self._labels(batch)
        finally:
            if self._turn is mine:
                self._rewind()

    def _start(self, indices: Sequence[np.ndarray], done: int, views: Views, replace: bool) -> None:
        """Feed the batches from ``done`` on to a pipeline that is large enough for them."""
        self._feed.start(self._read_ahead(indices, done, views, replace))
        largest = max((len(batch) for batch in indices), default=1)
        if self._pipeline is None or self._pipeline.max_batch_size < largest:
            self._pipeline = build_pipeline(
                self._feed,
                batch_size=largest,
                image_size=self._image_size,
                rand_augment=self._rand_augment,
                threads=self._threads,
                device=self._device,
            )

    def _read_ahead(self, indices: Sequence[np.ndarray], done: int, views: Views, replace: bool) -> Iterator[_Batch]:
        def sample(index: int) -> tuple[Encoded, View] | None:
            return self._samples.first_usable(
                index, lambda encoded: (encoded, views(index, encoded.height, encoded.width)), replace=replace
            )

        waiting: deque[tuple[int, list[Future[tuple[Encoded, View] | None]]]] = deque()
        upcoming = iter(range(done, len(indices)))
        try:
            while True:
                while len(waiting) <= AHEAD and (number := next(upcoming, None)) is not None:
                    waiting.append((number, [self._pool.submit(sample, int(index)) for index in indices[number]]))
                if not waiting:
                    return
                number, futures = waiting.popleft()
                samples = [found for future in futures if (found := future.result()) is not None]
                if samples:
                    yield _Batch(samples, number + 1)
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _set_culprits_aside(self, error: RuntimeError) -> None:
        """Decode each sample under way alone, and set aside those that fail.

        Raises:
            DataError: the pipeline was built anew too often, or too many files are set aside.
            RuntimeError: none fails alone.
        """
        culprits = []
        for encoded, view in [sample for batch in self._feed.under_way for sample in batch.samples]:
            reason = decode_alone(encoded, view, self._device)
            if reason is not None:
                culprits.append(encoded.index)
                self._samples.set_aside(encoded.index, reason)
        if not culprits:
            raise error
        self._rebuilds += 1
        if self._rebuilds > MAX_REBUILDS:
            raise DataError(
                f"{self._samples.storage.name(culprits[-1])} cannot be decoded: files like it have ended DALI's "
                f"pipeline {self._rebuilds} times, accepted are {MAX_REBUILDS}; `prelora data check` finds them first"
            )

    def _rewind(self) -> None:
        """Leave the pipeline at its start, empty; one with a file that it cannot decode under way is given up."""
        self._feed.start(iter(()))
        if self._pipeline is None:
            return
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:
            self._pipeline = None

    def _labels(self, batch: _Batch) -> torch.Tensor:
        labels = torch.tensor([encoded.label for encoded, _ in batch.samples], dtype=torch.int64)
        return labels.to(self._device, non_blocking=True)
