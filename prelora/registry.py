"""One operator, several implementations: ``define`` an operator, give it providers, choose one by ``use_provider``.

An operator is a ``torch.library`` op in namespace ``prelora`` whose one kernel looks for a provider at run time,
inside the op: eager and compiled agree, and Dynamo never traces the choice.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prelora.errors import ProviderError

NAMESPACE = "prelora"
REFERENCE = "reference"
ENVIRONMENT = "PRELORA_PROVIDER"

OPERATORS: dict[str, Operator] = {}
"""Every operator by name."""

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_asked: list[str | None] = [os.environ.get(ENVIRONMENT)]
# Of the whole process, not of a thread or context: backward runs in threads of its own.

Unsupported = Callable[..., "str | None"]


@dataclass(frozen=True)
class Provider:
    """One implementation of an operator."""

    name: str
    module: str
    """Module whose function of the operator's name is the implementation; loaded when first chosen."""
    unsupported: Unsupported
    """From the operator's arguments, or from none at all, to why it cannot serve; None: it can."""

    def refusal(self, *args: Any) -> str | None:
        """Why this provider cannot serve these arguments (none: any at all); None: it can."""
        return _load_failure(self.module) or self.unsupported(*args)


class Operator:
    """An operator of ``torch.ops.prelora``, called with the signature of its reference."""

    def __init__(self, reference: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
        self.name: str = reference.__name__
        self.reference = reference
        """What the operator means, in plain PyTorch: the oracle, the fake, and the last provider."""
        self.providers: list[Provider] = []
        """In order of preference; the reference comes after them."""
        self._mutated = [i for i, name in enumerate(inspect.signature(reference).parameters) if name in mutates]
        schema = torch.library.infer_schema(reference, mutates_args=mutates)
        _library.define(self.name + schema)
        _library.impl(self.name, self._serve, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", reference, lib=_library)
        self.op = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        functools.update_wrapper(self, reference)

    def __call__(self, *args: Any) -> Any:
        return self.op(*args)

    def provider(self, name: str, module: str, unsupported: Unsupported) -> None:
        """Add a provider: the function of this operator's name in ``module``; the first added is the first asked."""
        self.providers.append(Provider(name, module, unsupported))

    def chosen(self, *args: Any) -> str:
        """Name of the provider that serves these arguments.

        Raises:
            ProviderError: the one asked for cannot, or does not exist; with every reason.
        """
        asked = _asked[-1]
        if asked == REFERENCE:
            return REFERENCE
        if asked is None:
            return next((provider.name for provider in self.providers if not provider.refusal(*args)), REFERENCE)
        provider = next((provider for provider in self.providers if provider.name == asked), None)
        if provider is None:
            known = ", ".join([*(provider.name for provider in self.providers), REFERENCE])
            raise ProviderError(f"{self.name} has no provider {asked!r}; it has {known}")
        if reason := provider.refusal(*args):
            others = [f"{other.name}: {other.refusal(*args) or 'would serve'}" for other in self.providers]
            raise ProviderError(
                f"provider {asked!r} was asked for and cannot serve {self.name}: {reason} "
                f"(of all: {'; '.join(others)}; {REFERENCE}: would serve)"
            )
        return asked

    def implementation(self, name: str) -> Callable[..., Any]:
        """The function behind a provider's name."""
        if name == REFERENCE:
            return self.reference
        module = next(provider.module for provider in self.providers if provider.name == name)
        return getattr(importlib.import_module(module), self.name)

    def _serve(self, *args: Any) -> Any:
        result = self.implementation(self.chosen(*args))(*args)
        if self._mutated:  # autograd then sees that what it saved was written to, as after torch's own methods
            torch.autograd.graph.increment_version(tensors_of([args[i] for i in self._mutated]))
        return result


def define(reference: Callable[..., Any], mutates: Sequence[str] = ()) -> Operator:
    """Make an operator of its reference; the schema is that of the signature, and that it writes to ``mutates``."""
    operator = Operator(reference, mutates)
    OPERATORS[operator.name] = operator
    return operator


def autograd(operator: Operator, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give an operator its gradient, the same for every provider.

    As ``torch.library.register_autograd``, which serves operators that take lists of tensors; of the others, which a
    model calls once a layer, it would cost each call a third of its time on the host.

    Args:
        backward: from ctx and the results' gradients to one of each argument, None where there is none.
        setup_context: from ctx, inputs and output to nothing; saves what backward takes.
    """
    if any(torch._library.utils.is_tensorlist_like_type(argument.type) for argument in operator.op._schema.arguments):
        torch.library.register_autograd(
            f"{NAMESPACE}::{operator.name}", backward, setup_context=setup_context, lib=_library
        )
        return

    def below(keyset: Any, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args  # last, so that ctx.needs_input_grad counts from the first input
        output = below(keyset, inputs)
        setup_context(ctx, inputs, output)
        return output

    def gradients(ctx: Any, *grads: Any) -> Any:
        return *backward(ctx, *grads), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(operator.name, (torch.autograd.Function,), methods)

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        return below(keyset, args)

    _library.impl(operator.name, kernel, "Autograd", with_keyset=True)


def autocast(operator: Operator, cast: Callable[..., Sequence[Any]]) -> None:
    """Say what autocast does to an operator's arguments.

    Args:
        cast: from autocast's dtype and the arguments to the arguments that the operator then runs on.
    """
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any, device: str = device, without: Any = without) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(without):
                return operator.op(*cast(torch.get_autocast_dtype(device), *args))

        _library.impl(operator.name, kernel, key)


@contextlib.contextmanager
def use_provider(name: str | None) -> Iterator[None]:
    """Have every operator served by this provider, or raise why it cannot; None: each takes the first that can.

    Raises:
        ValueError: no operator has a provider of this name.
    """
    known = {REFERENCE} | {provider.name for operator in OPERATORS.values() for provider in operator.providers}
    if name is not None and name not in known:
        raise ValueError(f"provider {name!r}: accepted are {', '.join(sorted(known))}")
    _asked.append(name)
    try:
        yield
    finally:
        _asked.pop()


def tensors_of(args: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments, also in lists."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (item for item in arg if isinstance(item, Tensor))


def lower(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: to its dtype, but for float64, which it leaves alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


@functools.cache
def _load_failure(module: str) -> str | None:
    """Why a provider's module cannot be imported; None: it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported: {error}"
    return None
