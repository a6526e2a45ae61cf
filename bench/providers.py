"""Which of an operator's providers a suite measures beside the one that is chosen by itself."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

import torch

from bench.interleave import NotRun, Variant
from prelora.registry import Operator, use_provider


def forced(
    operators: Sequence[Operator], device: torch.device, build: Callable[[str], Variant]
) -> list[Variant | NotRun]:
    """A variant for each kernel provider of these operators, or why it is not run.

    Args:
        build: from the name to the variant, which is then served by that provider alone.
    """
    sample = torch.empty(1, device=device)
    names = dict.fromkeys(provider.name for operator in operators for provider in operator.providers)
    variants: list[Variant | NotRun] = []
    for name in names:
        if all(operator.chosen(sample) == name for operator in operators):
            continue
        variant = build(name)
        reason = _refusal(name, operators, sample)
        if reason:
            variants.append(NotRun(variant.name, reason))
        else:
            served = {part: _served_by(name, call) for part, call in variant.parts.items()}
            variants.append(dataclasses.replace(variant, parts=served))
    return variants


def served_by(operators: Sequence[Operator], device: torch.device) -> str:
    """Which provider serves each operator when none is asked for."""
    sample = torch.empty(1, device=device)
    by_provider: Mapping[str, list[str]] = {}
    for operator in operators:
        by_provider.setdefault(operator.chosen(sample), []).append(operator.name)
    if len(by_provider) == 1:
        return f"provider {next(iter(by_provider))}"
    return ", ".join(f"{name}: {' '.join(served)}" for name, served in by_provider.items())


def _refusal(name: str, operators: Sequence[Operator], sample: torch.Tensor) -> str | None:
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter says nothing about time"
    for operator in operators:
        provider = next((provider for provider in operator.providers if provider.name == name), None)
        if provider is None:
            return f"{operator.name} has no such provider"
        if reason := provider.refusal() or provider.refusal(sample):
            return reason
    return None


def _served_by(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def served() -> object:
        with use_provider(name):
            return call()

    return served
