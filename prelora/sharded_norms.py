"""Norms and effective weights of targets whose rows are spread over ranks: each rank's own rows, then one sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prelora.nn import LoRALinear
from prelora.ops import lora_merge, merged_norms, weight_norms
from prelora.ops.slices import split_lora
from prelora.shards import from_local, full, local, local_rows, rows_here, sum_over_shards
from prelora.targets import Target

KINDS = ("base", "lora", "effective", "update")


@dataclass(frozen=True)
class _Part:
    """The rows of one target that are here; perhaps none."""

    name: str
    weight: Tensor
    """[rows here, in]."""
    a: Tensor | None
    """[rank, in], all of it; None without LoRA."""
    b: Tensor
    """[rows here, rank]."""
    scaling: float


@torch.no_grad()
def sharded_norms(
    layers: Mapping[str, nn.Linear], modules: Mapping[str, Sequence[Target]], snapshot: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """‖W‖, ‖s·B·A‖, ‖W + s·B·A‖ and ‖update since the snapshot‖, by kind and target name; a collective.

    Args:
        layers, modules: each module and its targets, by path; all sharded over one mesh.
        snapshot: what ``sharded_effective_weight`` gave earlier, by path.
    """
    squares: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for path, layer in layers.items():
        parts = [part for part in _parts(layer, modules[path]) if len(part.weight)]
        adapted = [part for part in parts if part.a is not None]
        squares["base"] |= _squares(parts, [part.weight for part in parts])
        squares["lora"] |= {
            p.name: p.scaling**2 * _gram(p.a).mul(_gram(p.b.t())).sum() for p in adapted if p.a is not None
        }
        if adapted:
            merged = merged_norms([part.weight for part in adapted], *_arguments(adapted), True)
            squares["effective"] |= {part.name: value for part, value in zip(adapted, merged, strict=True)}
        if parts and path in snapshot:
            change = _effective(parts, layer.weight.dtype) - local(snapshot[path])
            squares["update"] |= _squares(parts, change.split([len(part.weight) for part in parts]))
    with_lora = [path for path, layer in layers.items() if isinstance(layer, LoRALinear)]
    paths = {"base": layers, "lora": with_lora, "effective": with_lora, "update": snapshot}
    keys = [(kind, target.name) for kind in KINDS for path in paths[kind] for target in modules[path]]
    like = next(iter(layers.values())).weight
    nothing = torch.zeros((), dtype=torch.float64, device=local(like).device)
    sums = torch.stack([squares[kind].get(name, nothing).double() for kind, name in keys])
    norms: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for (kind, name), norm in zip(keys, sum_over_shards(sums, like).sqrt().tolist(), strict=True):
        norms[kind][name] = norm
    return norms


@torch.no_grad()
def sharded_effective_weight(layer: nn.Linear, targets: Sequence[Target]) -> Tensor:
    """W + s·B·A, a copy, spread as W is; A and B are gathered for it: a collective."""
    return from_local(_effective(_parts(layer, targets), layer.weight.dtype), layer.weight)


def _parts(layer: nn.Linear, targets: Sequence[Target]) -> list[_Part]:
    here, (first, _) = local(layer.weight), local_rows(layer.weight)
    adapters: list[tuple[Tensor, Tensor] | None] = [None] * len(targets)
    scaling = (1.0,) * len(targets)
    if isinstance(layer, LoRALinear):
        adapters = [*split_lora(full(layer.lora_A), full(layer.lora_B), layer.rows, layer.rank)]
        scaling = layer.scaling
    slices = [target.rows or (0, layer.out_features) for target in targets]
    own = rows_here(layer.weight, slices)
    parts = []
    for target, (start, _), (begin, end), adapter, s in zip(targets, slices, own, adapters, scaling, strict=True):
        a, b = adapter or (None, here)
        parts.append(_Part(target.name, here[begin - first : end - first], a, b[begin - start : end - start], s))
    return parts


def _effective(parts: Sequence[_Part], dtype: torch.dtype) -> Tensor:
    adapted = [part for part in parts if part.a is not None and len(part.weight)]
    if not adapted:
        return torch.cat([part.weight for part in parts])
    return torch.cat(lora_merge.reference([part.weight for part in adapted], *_arguments(adapted), dtype))


def _arguments(parts: Sequence[_Part]) -> tuple[list, ...]:
    """``lora_a``, ``lora_b``, ``slices``, ``rows``, ``ranks``, ``scaling``: each part as a layer of one slice."""
    return (
        [part.a for part in parts],
        [part.b for part in parts],
        [1] * len(parts),
        [len(part.b) for part in parts],
        [part.b.shape[1] for part in parts],
        [part.scaling for part in parts],
    )


def _squares(parts: Sequence[_Part], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    sums = weight_norms(list(tensors), True) if parts else ()
    return {part.name: value for part, value in zip(parts, sums, strict=True)}


def _gram(matrix: Tensor | None) -> Tensor:
    assert matrix is not None
    return matrix.double() @ matrix.double().t()
