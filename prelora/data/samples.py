"""One split's samples as they are read: checked, and those that cannot be used set aside."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from prelora.data.encoded import image_size
from prelora.data.manifest import Facts, verify
from prelora.data.quarantine import Quarantine
from prelora.data.storage import Storage, UnusableError, read_sample
from prelora.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """A sample that was read and found whole."""

    index: int
    data: bytes
    height: int
    width: int
    label: int


class Samples:
    """A split's images by index.

    What stands in for a sample that cannot be used is a function of the data alone: the next one that can. So ranks
    need not agree on it, and a resumed run, which has set nothing aside yet, finds the same.
    """

    def __init__(self, storage: Storage, quarantine: Quarantine, facts: list[Facts] | None) -> None:
        """Args: facts: of each sample, from a manifest; None: nothing is known of them.

        Raises:
            DataError: the manifest lists more bad files than the quarantine takes.
        """
        self.storage = storage
        self._quarantine = quarantine
        self._facts = facts
        self._bad: set[int] = set()
        for index, known in enumerate(facts or ()):
            if known.problem is not None:
                self.set_aside(index, known.problem)

    def set_aside(self, index: int, reason: str) -> None:
        """Use this sample no more.

        Raises:
            DataError: more files are set aside than may be.
        """
        self._bad.add(index)
        self._quarantine.add(self.storage.name(index), reason)

    def read(self, index: int) -> Encoded:
        """A sample's bytes, checked without decoding them.

        Raises:
            UnusableError: it is missing, cut, not an image or not what the manifest knows.
        """
        data = read_sample(self.storage, index)
        if self._facts is not None:
            verify(data, self._facts[index])
        return Encoded(index, data, *image_size(data), int(self.storage.labels[index]))

    def first_usable(
        self,
        index: int,
        use: Callable[[Encoded], T],
        *,
        replace: bool,
        report: Callable[[int, str], None] | None = None,
    ) -> T | None:
        """What ``use`` makes of the sample or, where it must be replaced, of the next one that can be used.

        Args:
            use: may raise UnusableError.
            replace: whether another sample may stand in; if not, None is given.
            report: is told index and reason of a sample found unusable, before it is set aside.

        Raises:
            DataError: more files are set aside than may be, or none is left.
        """
        total = len(self.storage)
        after: Iterable[int] = range(index + 1, index + total) if replace else ()
        for number in itertools.chain([index], after):
            candidate = number % total
            if candidate in self._bad:
                continue
            try:
                return use(self.read(candidate))
            except UnusableError as error:
                if report is not None:
                    report(candidate, str(error))
                self.set_aside(candidate, str(error))
        if replace:
            raise DataError(f"none of the {total} files from {self.storage.name(0)} on can be used")
        return None
