"""Units: the module groups that switch and freeze as one, each on its own clock."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal, get_args

from prelora.config import Switch
from prelora.convergence import Verdict, joined
from prelora.monitor import Monitor
from prelora.targets import Target, by_module

Phase = Literal["full", "warmup", "lora"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In their order."""
Unit = tuple[str, ...]


def find_units(targets: Sequence[Target], switch: Switch) -> tuple[Unit, ...]:
    """The targets' groups in units that switch as one, in the order given.

    ``"together"``: one unit of all. ``"per_group"``: groups with targets in one module are one unit, because its
    weight is one parameter. So q, k and v of timm's fused ``attn.qkv`` are one; those of a Hugging Face ViT are three.
    """
    groups = list(dict.fromkeys(target.group for target in targets))
    if switch == "together":
        return (tuple(groups),)
    members = {group: {group} for group in groups}
    for slices in by_module(targets).values():
        joined = set().union(*(members[target.group] for target in slices))
        members |= dict.fromkeys(joined, joined)
    return tuple(dict.fromkeys(tuple(one for one in groups if one in members[group]) for group in groups))


class Clocks:
    """After which epoch each group switched and was frozen."""

    def __init__(self, units: Sequence[Unit]) -> None:
        """Args: units: as ``find_units`` gives them."""
        self.units = tuple(units)
        self.switch_epochs: dict[str, int] = {}
        self.freeze_epochs: dict[str, int] = {}

    def mark(self, epoch: int, switching: Collection[str], freezing: Collection[str]) -> None:
        """Groups that switch and groups that are frozen once ``epoch`` epochs are finished."""
        self.switch_epochs |= dict.fromkeys(switching, epoch)
        self.freeze_epochs |= dict.fromkeys(freezing, epoch)

    @property
    def phases(self) -> dict[str, Phase]:
        """Every group's own phase."""
        return {
            group: "lora" if group in self.freeze_epochs else "warmup" if group in self.switch_epochs else "full"
            for unit in self.units
            for group in unit
        }

    @property
    def phase(self) -> Phase:
        """``"full"`` until a group has switched, ``"lora"`` once every group is frozen, ``"warmup"`` in between."""
        phases = set(self.phases.values())
        return phases.pop() if len(phases) == 1 else "warmup"

    def due(self, epoch: int, warmup_epochs: int) -> list[str]:
        """The groups to be frozen: those whose warm-up is over once ``epoch`` epochs are finished."""
        phases = self.phases
        joint = [group for group in phases if phases[group] == "warmup"]
        return [group for group in joint if epoch - self.switch_epochs[group] >= warmup_epochs]


def decide(clocks: Clocks, monitor: Monitor, epoch: int) -> tuple[Verdict, list[str]]:
    """What there is to say of the units once ``epoch`` epochs are finished, and the groups that switch now.

    Each unit is tested on its own norms, and on the loss, until it switches.
    """
    verdicts: dict[Unit, Verdict] = {}
    switching: list[str] = []
    phases, warmup_epochs = clocks.phases, monitor.config.warmup_epochs
    for unit in clocks.units:
        phase = phases[unit[0]]
        if phase == "full":
            verdicts[unit], switches = monitor.decide(epoch, unit)
            switching += unit if switches else ()
        elif phase == "warmup":
            done = epoch - clocks.switch_epochs[unit[0]]
            verdicts[unit] = Verdict(done >= warmup_epochs, f"warm-up epoch {done} of {warmup_epochs}", {}, ())
        else:
            verdicts[unit] = Verdict(False, "training LoRA", {}, ())
    return joined(verdicts), switching


def history(switch_epochs: dict[str, int], freeze_epochs: dict[str, int]) -> Iterator[tuple[int, list[str], list[str]]]:
    """Each epoch after which something was done, in order: the epoch, the groups that switched, those frozen."""
    for epoch in sorted({*switch_epochs.values(), *freeze_epochs.values()}):
        yield (
            epoch,
            [group for group, at in switch_epochs.items() if at == epoch],
            [group for group, at in freeze_epochs.items() if at == epoch],
        )
