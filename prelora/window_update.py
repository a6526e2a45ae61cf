"""The change of the targets' weights since the last window's end: its rank, and a LoRA that starts along it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from prelora import distributed
from prelora.errors import PreLoRAWarning
from prelora.shards import from_local, full, local
from prelora.sketch import leading_directions, stable_rank
from prelora.surgery import stream
from prelora.targets import Target, by_module, target_linear

Change = tuple[Target, Tensor]


@torch.no_grad()
def update_ranks(
    model: nn.Module, targets: Sequence[Target], start: Mapping[str, Tensor], *, seed: int, epoch: int
) -> dict[str, float]:
    """Stable rank of every target's change, by name, the same on every rank; a collective.

    NaN where a weight did not move, or not finitely. The sketch is drawn from ``seed``, the target's name and
    ``epoch``.

    Args:
        model: the plain model in FULL, or one in FSDP2 that holds its shards.
        start: what ``monitor.take_snapshot`` gave at the window's start.
    """
    found: dict[str, Tensor] = {}
    for changes in _changes(model, targets, start):
        for target, change in changes:
            found[target.name] = stable_rank(change, stream(seed, f"{target.name}@{epoch}"))
    values = torch.stack(list(found.values())).tolist() if found else []
    ranks = dict(zip(found, values, strict=True))
    return distributed.broadcast_json({target.name: ranks[target.name] for target in targets} if ranks else None)


@torch.no_grad()
def initial_a(
    model: nn.Module, targets: Sequence[Target], ranks: Mapping[str, int], start: Mapping[str, Tensor], *, seed: int
) -> dict[str, Tensor]:
    """A of every target module, [sum of ranks, in] by path, along what moved; rank 0's on every rank: a collective.

    A slice's rows are the leading right singular vectors of its change, each as long as a Kaiming-uniform row is on
    average: RMS 1/√(3·in). Where the change has fewer, the rest is the Kaiming draw that ``inject`` makes, turned
    orthogonal to them; where it has none, that draw itself, with a warning on rank 0.

    Args:
        model, start: as in ``update_ranks``.
        ranks: the plan, by target name.
    """
    found: dict[str, Tensor] = {}
    unmoved: list[str] = []
    for (path, slices), changes in zip(by_module(targets).items(), _changes(model, targets, start), strict=True):
        weight = local(target_linear(model, slices[0]).weight)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a = torch.empty(sum(ranks[target.name] for target in slices), weight.shape[1])
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=torch.Generator().manual_seed(stream(seed, path)))
        a = a.to(weight.device, dtype)
        rows = a.split([ranks[target.name] for target in slices])
        for (target, change), drawn in zip(changes, rows, strict=False):  # no changes but on rank 0
            if not len(drawn):  # a layer that the plan leaves without LoRA
                continue
            directions = leading_directions(change, len(drawn), stream(seed, f"{target.name}@switch"))
            unmoved += [] if len(directions) else [target.name]
            _lead_with(directions, drawn)
        found[path] = distributed.broadcast_tensor(a)
    if unmoved:
        warnings.warn(
            f"lora_init = 'window_update': the weights of {len(unmoved)} of {len(targets)} targets, as {unmoved[0]}, "
            f"did not move over the last window, or are not finite: their A is drawn as by 'kaiming'",
            PreLoRAWarning,
            stacklevel=2,
        )
    return found


def _changes(model: nn.Module, targets: Sequence[Target], start: Mapping[str, Tensor]) -> Iterator[list[Change]]:
    """Module by module every slice's weight less that at the start; on rank 0, the others only take part."""
    for path, slices in by_module(targets).items():
        weight = target_linear(model, slices[0]).weight
        change = full(from_local(local(weight) - local(start[path]), weight))
        yield [(t, change if t.rows is None else change[slice(*t.rows)]) for t in slices] if _decides() else []


def _decides() -> bool:
    return distributed.rank() == 0


def _lead_with(directions: Tensor, drawn: Tensor) -> None:
    """Write orthonormal ``directions`` [found, in] into the first rows of ``drawn`` [rank, in]; all rows as long."""
    if not len(directions):
        return
    rest = drawn[len(directions) :]
    rest = rest - (rest @ directions.t()) @ directions
    rows = torch.cat([directions, nn.functional.normalize(rest)])
    drawn.copy_(rows / math.sqrt(3))
