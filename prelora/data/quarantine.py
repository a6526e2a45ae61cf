"""The files that a run found unusable, by name and reason, and how many it may."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from prelora.errors import DataError


class Quarantine:
    """Files set aside by this process, over all splits; several threads may add to it."""

    def __init__(self, where: str, cap: int) -> None:
        """Args: where: the data's path, for messages; cap: how many files may be set aside."""
        self._where = where
        self._cap = cap
        self._reasons: dict[str, str] = {}

    @property
    def reasons(self) -> Mapping[str, str]:
        """File → reason."""
        return MappingProxyType(self._reasons)

    def add(self, name: str, reason: str) -> None:
        """Set a file aside.

        Raises:
            DataError: it is one more than the cap.
        """
        self._reasons.setdefault(name, reason)
        count = len(self._reasons)
        if count > self._cap:
            raise DataError(
                f"{name} of {self._where} cannot be used: {reason}. That makes {count} such files, and "
                f"data.max_quarantined accepts {self._cap}; `prelora data check {self._where}` lists all of them"
            )
