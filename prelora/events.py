"""``Event``: what ``PreLoRA.end_epoch`` found and did at an epoch's end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from prelora.monitor import Norms
from prelora.units import Phase

Action = Literal["none", "switch", "freeze", "switch+freeze"]


def action_of(switching: Collection[str], freezing: Collection[str]) -> Action:
    """What an epoch's end does to the groups that switch and to those that are frozen."""
    if switching:
        return "switch+freeze" if freezing else "switch"
    return "freeze" if freezing else "none"


@dataclass(frozen=True)
class Event:
    """What an epoch's end found and did, and why."""

    epoch: int
    """Epochs finished."""
    phase: Phase
    """The phase from now on."""
    action: Action
    """With ``switch="per_group"`` of whichever groups it is due for, perhaps not the same ones."""
    reason: str
    loss: float
    """Mean training loss over ranks."""
    norms: Norms
    norm_changes: dict[str, tuple[float, ...]]
    """Each group's changes between the last k windows, in percent, to hold against tau; empty when not tested."""
    loss_changes: tuple[float, ...]
    """The loss's changes between the last k windows, in percent, to hold against zeta; empty when not tested."""
    ranks: dict[str, int]
    """The plan, by target, of the groups that have switched."""
    trainable: int
    """Parameters that train from now on."""
    trainable_share: float
    """``trainable`` over the model's parameters without LoRA."""
    released: dict[str, int] = field(default_factory=dict)
    """Bytes that this epoch's freeze gave back on this rank, by item."""
    update_ranks: dict[str, float] = field(default_factory=dict)
    """Stable rank of each target's change over the window that ended here; empty when not measured."""
    switched_groups: tuple[str, ...] = ()
    """The groups into which LoRA was injected now."""
    frozen_groups: tuple[str, ...] = ()
    """The groups whose base was frozen now."""
