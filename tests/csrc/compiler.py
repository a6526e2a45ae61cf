"""The host's C++ compiler, with warnings as errors."""

from __future__ import annotations

import subprocess
from pathlib import Path


def compile_cpp(target: Path, *arguments: str | Path) -> Path:
    """``target``, built by g++ from the sources and flags of ``arguments``."""
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *arguments, "-o", target]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return target
