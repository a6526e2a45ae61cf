"""``python -m prelora.info``: versions, devices, and which provider can serve each operator, or why not."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import prelora
import prelora.ops
from prelora import _ext
from prelora.registry import ENVIRONMENT, OPERATORS, REFERENCE

PACKAGES = ("triton", "timm", "transformers", "peft", "nvidia-dali-cuda130")
NAME = f"<{max(map(len, (*PACKAGES, ENVIRONMENT))) + 2}"


def main() -> None:
    """Print the table."""
    print("\n".join([*versions(), "", *providers()]))


def versions() -> list[str]:
    """One line for each part of the environment that matters."""
    lines = [
        f"{'prelora':{NAME}}{prelora.__version__}",
        f"{'python':{NAME}}{platform.python_version()}",
        f"{'torch':{NAME}}{torch.__version__}, {torch.get_num_threads()} threads, CPU capability "
        f"{torch.backends.cpu.get_cpu_capability()}, oneDNN {'yes' if torch.backends.mkldnn.is_available() else 'no'}",
    ]
    lines.append(f"{'prelora._C':{NAME}}{_ext.description()}")
    for package in PACKAGES:
        try:
            lines.append(f"{package:{NAME}}{importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package:{NAME}}not installed")
    if torch.cuda.is_available():
        lines += [f"{f'cuda:{i}':{NAME}}{torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        lines.append(f"{'cuda':{NAME}}no device")
    asked = os.environ.get(ENVIRONMENT)
    return [*lines, f"{ENVIRONMENT:{NAME}}{asked or 'not set: each operator takes the first provider that can'}"]


def providers() -> list[str]:
    """Operator × provider × available or the reason why not, in order of preference."""
    width = max(map(len, OPERATORS))
    lines = [f"{'operator':<{width}}  {'provider':<9}  available"]
    for name, operator in OPERATORS.items():
        for provider in operator.providers:
            reason = provider.refusal()
            lines.append(f"{name:<{width}}  {provider.name:<9}  {'yes' if reason is None else f'no: {reason}'}")
        lines.append(f"{name:<{width}}  {REFERENCE:<9}  yes")
    return lines


if __name__ == "__main__":
    main()
