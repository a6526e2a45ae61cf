"""What a figure depends on beside the code: machine, versions, threads, allocator, load, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("triton", "timm", "peft", "transformers", "numpy", "pytest-benchmark")
PREFIXES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "DNNL_", "PYTORCH_")
PREFIXES += ("TORCH_", "TORCHINDUCTOR_", "CUDA_", "NVIDIA_", "TRITON_", "PRELORA_")


def environment() -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "niceness": os.nice(0) if hasattr(os, "nice") else None,
        "load_average": load_average(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **_math_libraries(),
        **{name: _version(name) for name in LIBRARIES},
        "fp32_matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
        **_commit(),
        "gpu": _gpu(),
    }


def load_average() -> list[float] | None:
    """Processes that wanted to run, over 1, 5 and 15 minutes: with others about, times are theirs too."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def cpu_name() -> str:
    """As the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _math_libraries() -> dict[str, str | None]:
    """Versions of MKL and oneDNN, and the widest vectors that torch uses."""
    built = torch.__config__.show()
    found = {
        "mkl": re.search(r"Math Kernel Library Version ([\d.]+)", built),
        "onednn": re.search(r"MKL-DNN v([\d.]+)", built),
    }
    versions: dict[str, str | None] = {name: match and match[1] for name, match in found.items()}
    return {**versions, "vectors": torch.backends.cpu.get_cpu_capability()}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """Commit, and whether the tree differs from it."""
    return {"commit": _output("git", "rev-parse", "HEAD"), "dirty": bool(_output("git", "status", "--porcelain"))}


def _gpu() -> dict[str, Any] | None:
    """Name, memory, clocks, driver; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    told = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0")
    return {
        "name": properties.name,
        "bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "nvidia_smi": dict(zip(query.split(","), told.split(", "), strict=False)) if told else None,
    }


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    # git would otherwise refresh its index, and a benchmark writes nothing into the tree.
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    result = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
