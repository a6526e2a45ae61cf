"""Which Linear layers, or row slices of them, carry LoRA: found by exact module path, never by suffix.

A layout is written as ``{group: pattern}``, the pattern being a module path in which ``*`` stands for every
index of a ModuleList or Sequential, and ``[i/n]`` for the i-th of n equal row slices of a fused Linear::

    {"q": "blocks.*.attn.qkv[0/3]", "k": "blocks.*.attn.qkv[1/3]", "v": "blocks.*.attn.qkv[2/3]",
     "mlp_in": "blocks.*.mlp.fc1"}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prelora.errors import TargetError
from prelora.nn import LoRALinear
from prelora.ranks import LayerShape

Layout = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Target:
    """One Linear, or one row slice of one, that has its own norm, rank, A and B."""

    path: str
    """Exact path of the module, as in ``model.named_modules()``."""
    group: str
    """Module group a of Algorithm 1, such as ``"q"`` or ``"mlp_in"``."""
    layer: int
    """Index within the group."""
    rows: tuple[int, int] | None = None
    """Row slice [start, stop) of the weight; None: all rows."""

    @property
    def name(self) -> str:
        """Unique key: the path, with the group in brackets for a slice."""
        return self.path if self.rows is None else f"{self.path}[{self.group}]"


TIMM_VIT: Layout = {
    "q": "blocks.*.attn.qkv[0/3]",
    "k": "blocks.*.attn.qkv[1/3]",
    "v": "blocks.*.attn.qkv[2/3]",
    "attn_out": "blocks.*.attn.proj",
    "mlp_in": "blocks.*.mlp.fc1",
    "mlp_out": "blocks.*.mlp.fc2",
}
TRANSFORMERS_VIT: Layout = {
    "q": "layers.*.attention.q_proj",
    "k": "layers.*.attention.k_proj",
    "v": "layers.*.attention.v_proj",
    "attn_out": "layers.*.attention.o_proj",
    "mlp_in": "layers.*.mlp.fc1",
    "mlp_out": "layers.*.mlp.fc2",
}
TRANSFORMERS_4_VIT: Layout = {
    "q": "encoder.layer.*.attention.attention.query",
    "k": "encoder.layer.*.attention.attention.key",
    "v": "encoder.layer.*.attention.attention.value",
    "attn_out": "encoder.layer.*.attention.output.dense",
    "mlp_in": "encoder.layer.*.intermediate.dense",
    "mlp_out": "encoder.layer.*.output.dense",
}

PAPER_GROUPS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "mlp_in": "dense",
    "attn_out": "output",
    "mlp_out": "output",
}


def _prefixed(layout: Layout, prefix: str) -> Layout:
    return {group: f"{prefix}.{pattern}" for group, pattern in layout.items()}


# Class (or its full name, so that the library need not be installed) → the layouts it may have.
_families: dict[str, tuple[Layout, ...]] = {
    "timm.models.vision_transformer.VisionTransformer": (TIMM_VIT,),
    "transformers.models.vit.modeling_vit.ViTForImageClassification": (
        _prefixed(TRANSFORMERS_VIT, "vit"),
        _prefixed(TRANSFORMERS_4_VIT, "vit"),
    ),
    "transformers.models.vit.modeling_vit.ViTModel": (TRANSFORMERS_VIT, TRANSFORMERS_4_VIT),
}


def register_targets(model_class: type[nn.Module] | str, *layouts: Layout) -> None:
    """Tell where the targets of a model family are; subclasses inherit it.

    Args:
        model_class: the class, or its full name ``"package.module.Class"``.
        layouts: ``{group: pattern or patterns}``, as in this module's docstring; the first that fits is taken.

    Raises:
        ValueError: no layout given.
    """
    if not layouts or not all(layouts):
        raise ValueError(f"register_targets({model_class}): give at least one layout {{group: pattern}}")
    _families[model_class if isinstance(model_class, str) else _full_name(model_class)] = layouts


def find_targets(model: nn.Module, targets: Layout | Sequence[Target] | str | None = None) -> tuple[Target, ...]:
    """The model's targets, group by group in layer order, each verified to be able to carry LoRA.

    Args:
        model: the plain model, not wrapped.
        targets: None takes the family's groups q, k, v, attn_out, mlp_in, mlp_out; ``"paper"`` the paper's five
            (query, key, value, dense, output = attn_out + mlp_out); a layout or a list of ``Target`` overrides.

    Raises:
        TargetError: unknown model family; a target that matches no module, more than one group, or a module that
            is not a plain floating-point ``nn.Linear``; a fused Linear not covered by its slices; tied weights.
    """
    if isinstance(targets, str) and targets != "paper":
        raise TargetError(f"targets = {targets!r}: accepted are None, 'paper', {{group: pattern}} or a list of Target")
    if targets is None or isinstance(targets, str):
        found = _family_targets(model)
        if targets == "paper":
            found = _regroup(found)
    elif isinstance(targets, Mapping):
        found = _layout_targets(model, targets)
    else:
        found = list(targets)
    if not found:
        raise TargetError("targets is empty: give at least one")
    _verify(model, found)
    return tuple(found)


def target_linear(model: nn.Module, target: Target) -> nn.Linear:
    """The module that ``target`` names.

    Raises:
        TargetError: there is none, or it is not an ``nn.Linear`` that can carry LoRA.
    """
    try:
        module = model.get_submodule(target.path)
    except AttributeError:
        near = ", ".join(_near(model, target.path)) or "none"
        raise TargetError(f"target {target.path!r} matches no module; Linear layers with a like name: {near}") from None
    # A subclass may not use its forward (nn.MultiheadAttention.out_proj) or hold packed weights (quantised).
    if type(module) is not nn.Linear and type(module) is not LoRALinear:
        raise TargetError(f"target {target.path!r} is a {_full_name(type(module))}; accepted is torch.nn.Linear itself")
    if not isinstance(module.weight, nn.Parameter):
        raise TargetError(f"target {target.path!r} computes its weight (weight or spectral norm): remove that first")
    if not module.weight.is_floating_point():
        raise TargetError(
            f"target {target.path!r} has a {module.weight.dtype} weight; accepted are floating-point weights"
        )
    return module


def target_shape(model: nn.Module, target: Target) -> LayerShape:
    """in and out features of the target's Linear or slice."""
    linear = target_linear(model, target)
    start, stop = target.rows or (0, linear.out_features)
    return LayerShape(linear.in_features, stop - start)


def from_dicts(saved: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The targets that ``dataclasses.asdict`` made dicts of, also after JSON, which knows no tuples."""
    return [Target(**{**target, "rows": target["rows"] and tuple(target["rows"])}) for target in saved]


def base_parameters(targets: Sequence[Target]) -> set[str]:
    """Qualified names of the targets' weights and biases: what LoRA stands in for once they are frozen."""
    return {f"{target.path}.{part}" for target in targets for part in ("weight", "bias")}


def by_module(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """Targets by module path, slices in row order."""
    modules: dict[str, list[Target]] = {}
    for target in targets:
        modules.setdefault(target.path, []).append(target)
    return {path: sorted(slices, key=lambda target: target.rows or (0, 0)) for path, slices in modules.items()}


def by_group(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """Targets by group, in the order given."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(target)
    return groups


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _family_targets(model: nn.Module) -> list[Target]:
    layouts = next((_families[name] for name in map(_full_name, type(model).__mro__) if name in _families), None)
    if layouts is None:
        raise TargetError(
            f"no targets are known for {_full_name(type(model))} (known: {', '.join(_families)}). Register them:\n"
            f"    prelora.register_targets({type(model).__name__}, {{'q': 'layers.*.attn.q_proj', "
            f"'mlp_in': 'layers.*.mlp.fc1'}})\n"
            f"or pass targets= to PreLoRA. Its Linear layers: {', '.join(_linear_patterns(model)) or 'none'}"
        )
    failures = []
    for layout in layouts:
        try:
            return _layout_targets(model, layout)
        except TargetError as error:
            failures.append(str(error))
    raise TargetError(
        f"{_full_name(type(model))} does not have the layout of its family: {' / '.join(failures)}. "
        f"Pass targets= with its own paths. Its Linear layers: {', '.join(_linear_patterns(model))}"
    )


def _layout_targets(model: nn.Module, layout: Layout) -> list[Target]:
    found = []
    for group, patterns in layout.items():
        patterns = [patterns] if isinstance(patterns, str) else patterns
        matches = [match for pattern in patterns for match in _expand(model, group, pattern)]
        found += [Target(path, group, layer, rows) for layer, (path, rows) in enumerate(matches)]
    return found


def _expand(model: nn.Module, group: str, pattern: str) -> list[tuple[str, tuple[int, int] | None]]:
    """``"blocks.*.attn.qkv[0/3]"`` → every (path, rows); every index of the container must have the path."""
    match = re.fullmatch(r"([^\[\]]+?)(?:\[(\d+)/(\d+)\])?", pattern)
    if match is None:
        raise TargetError(f"target pattern {pattern!r}: accepted is a path, '*' for an index, '[i/n]' for a slice")
    path, index, parts = match.groups()
    results: list[tuple[str, tuple[int, int] | None]] = []
    for full in _expand_path(model, path):
        linear = target_linear(model, Target(full, group, 0))
        if parts is None:
            results.append((full, None))
            continue
        if int(index) >= int(parts) or linear.out_features % int(parts):
            raise TargetError(f"target {pattern!r}: {linear.out_features} rows have no slice {index} of {parts}")
        size = linear.out_features // int(parts)
        results.append((full, (int(index) * size, (int(index) + 1) * size)))
    return results


def _expand_path(model: nn.Module, path: str) -> list[str]:
    head, star, tail = path.partition("*")
    if not star:
        return [path]
    head = head.removesuffix(".")
    try:
        container = model.get_submodule(head)
    except AttributeError:
        raise TargetError(f"target {path!r} matches no module: there is no {head!r}") from None
    indices = [name for name, _ in container.named_children() if name.isdigit()]
    if not indices:
        raise TargetError(f"target {path!r} matches no module: {head!r} has no numbered children")
    return [full for index in indices for full in _expand_path(model, f"{head}.{index}{tail}".removeprefix("."))]


def _regroup(targets: Sequence[Target]) -> list[Target]:
    """The six groups as the paper's five, each numbered anew."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(PAPER_GROUPS.get(target.group, target.group), []).append(target)
    return [Target(t.path, group, i, t.rows) for group, members in groups.items() for i, t in enumerate(members)]


def tied_modules(model: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Each of ``paths`` whose module shares a parameter with others, and all names of that parameter."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path in paths:
        for own in model.get_submodule(path).parameters():
            if len(owners[id(own)]) > 1:
                yield path, owners[id(own)]


def _verify(model: nn.Module, targets: Sequence[Target]) -> None:
    modules = by_module(targets)
    linears = {path: target_linear(model, slices[0]) for path, slices in modules.items()}
    for path, names in tied_modules(model, linears):
        raise TargetError(f"target {path!r} shares a parameter with others ({', '.join(names)}); untie it first")
    for path, slices in modules.items():
        linear = linears[path]
        spans = [target.rows or (0, linear.out_features) for target in slices]
        if len(set(spans)) < len(spans):
            raise TargetError(f"target {path!r} is matched more than once: {', '.join(t.group for t in slices)}")
        groups = [target.group for target in slices]
        if len(set(groups)) < len(groups):
            raise TargetError(f"target {path!r}: slices {spans} are in groups {groups}; each needs a group of its own")
        edges = [edge for span in spans for edge in span]
        whole = edges[0] == 0 and edges[-1] == linear.out_features and edges[1:-1:2] == edges[2::2]
        if not whole or any(start >= stop for start, stop in spans):
            raise TargetError(
                f"target {path!r}: slices {spans} must cover its {linear.out_features} rows exactly, without overlap "
                f"(the weight is frozen as a whole)"
            )


def _linear_patterns(model: nn.Module) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


def _near(model: nn.Module, path: str) -> list[str]:
    last = path.rpartition(".")[2]
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and last in name][:4]
