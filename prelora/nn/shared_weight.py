"""``SharedWeight``: one layer's W_eff, kept for longer than one forward, and never stale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SharedWeight:
    """W_eff within ``merge_once``, with what it was made of; no copy of a model takes it along."""

    def __init__(self, forward_only: bool) -> None:
        """Args: forward_only: opened by one forward of the model, and to be let go of at its end."""
        self.forward_only = forward_only
        self._w_eff: Tensor | None = None
        self._sources: list[tuple[Tensor, int]] = []

    def keep(self, w_eff: Tensor, *sources: Tensor) -> None:
        """Remember W_eff and the tensors W, A and B that it was made of, as they are now."""
        # Held, not only their addresses noted: memory that is let go of may come back with other numbers in it.
        self._w_eff, self._sources = w_eff, [(source.detach(), source._version) for source in sources]

    def current(self, dtype: torch.dtype, *sources: Tensor) -> Tensor | None:
        """W_eff, unless it is not there, of another dtype, or one of its sources was replaced or written since."""
        if self._w_eff is None or self._w_eff.dtype != dtype:
            return None
        # Versions cannot be read under Dynamo; within ``merge_once`` nothing may write parameters anyway.
        return self._w_eff if torch.compiler.is_compiling() or self._made_of(sources) else None

    def _made_of(self, sources: tuple[Tensor, ...]) -> bool:
        pairs = zip(self._sources, sources, strict=True)
        return all(old.data_ptr() == new.data_ptr() and version == new._version for (old, version), new in pairs)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
