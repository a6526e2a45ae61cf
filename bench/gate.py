"""No figure without green tests: an operator's tests run once a session, before anything of it is timed."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "test_operators.py"


@dataclass(frozen=True)
class Verdict:
    """How an operator's tests ended."""

    green: bool
    summary: str
    """pytest's last line, or the first failure and that line."""


@functools.cache
def verdict(operator: str, file: Path = TESTS) -> Verdict:
    """Run the tests whose names hold ``operator``; no such test counts as red."""
    # The tests decide for themselves where Triton runs; what this session has asked for is not theirs.
    environment = {name: value for name, value in os.environ.items() if name != "PRELORA_PROVIDER"}
    environment["OMP_NUM_THREADS"] = "1"  # their tensors are small: threads would only wait for each other
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    # With its own folder as root: -k also looks at the folders above a file, whose names say nothing of operators.
    select = ["--rootdir", str(file.parent), str(file), "-k", operator]
    command = [sys.executable, "-m", "pytest", *select, "-x", "--tb=line", "--color=no", *plugins]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.strip()] or result.stderr.splitlines() or ["no output"]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:1]
    return Verdict(result.returncode == 0, "; ".join([*failures, lines[-1].strip("= ")]))
