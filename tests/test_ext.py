"""How ``prelora._C`` is built, loaded and reported, and that it runs in torch's own threads."""

import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from prelora import _ext

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}

extension = pytest.mark.skipif(_ext.reason() is not None, reason=_ext.reason() or "")


def python(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# Building


@pytest.fixture
def build_file(monkeypatch):
    """The names of setup.py, run as it would be with this PRELORA_CUDA, nvcc's home and torch's CUDA."""

    def run(asked=None, home="/nowhere", torch_cuda="13.0"):
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("PRELORA_CUDA", asked or "")
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", home)
        monkeypatch.setattr("torch.version.cuda", torch_cuda)
        return runpy.run_path(str(ROOT / "setup.py"))

    return run


def fake_nvcc(folder, major, top="/usr/local/cuda"):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={top}\n#$ gcc -D__CUDACC_VER_MAJOR__={major}' >&2\n")
    nvcc.chmod(0o755)
    return str(folder)


def has_cuda(extension):
    return any(source.endswith(".cu") for source in extension.sources)


def test_without_nvcc_the_extension_is_built_for_the_cpu(build_file):
    assert not has_cuda(build_file()["extension"]())


def test_with_nvcc_of_torchs_cuda_it_is_built_for_both_be_there_a_gpu_or_not(build_file, tmp_path):
    extension = build_file(home=fake_nvcc(tmp_path, 13, "/opt/cuda/bin/.."))["extension"]()

    assert has_cuda(extension)
    assert "/opt/cuda/include" in extension.include_dirs, "that nvcc is a wrapper, and says where its CUDA is"


def test_zero_leaves_cuda_out(build_file, tmp_path):
    assert not has_cuda(build_file("0", home=fake_nvcc(tmp_path, 13))["extension"]())


@pytest.mark.parametrize(
    ("major", "torch_cuda", "missing"),
    [
        (None, "13.0", r"no nvcc, neither on PATH nor in CUDA_HOME \(.+\)"),
        (13, None, "torch .+ is a build without CUDA"),
        (12, "13.0", r".+/nvcc is of CUDA 12, torch of 13\.0"),
    ],
)
def test_one_fails_with_what_is_missing(build_file, tmp_path, major, torch_cuda, missing):
    home = fake_nvcc(tmp_path, major) if major else str(tmp_path)

    with pytest.raises(SystemExit, match=f"PRELORA_CUDA=1: {missing}"):
        build_file("1", home, torch_cuda)["extension"]()


def test_another_value_is_refused(build_file):
    with pytest.raises(SystemExit, match="PRELORA_CUDA=yes: accepted are 0 and 1"):
        build_file("yes")["extension"]()


def test_the_whole_build_fails_loudly_where_cuda_is_asked_for_and_missing():
    result = python("setup.py", "--version", PRELORA_CUDA="1", **NOWHERE)

    assert result.returncode != 0
    assert "PRELORA_CUDA=1: no nvcc" in result.stderr


@pytest.fixture(scope="module")
def failed_build(tmp_path_factory):
    """A copy of the tree in which the compiler failed."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("prelora", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    result = python("setup.py", "build_ext", "--inplace", cwd=tree, CXX="false", PRELORA_CUDA="0")
    assert result.returncode == 0, result.stderr
    return tree


# An editable install of this tree would serve prelora._C to the copy, too.
ALONE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


def test_a_failing_compiler_leaves_a_package_that_says_so(failed_build):
    code = ALONE + "import prelora.info; prelora.info.main()"
    shown = python("-c", code, cwd=failed_build, PYTHONPATH=str(failed_build)).stdout

    (line,) = [line for line in shown.splitlines() if line.startswith("prelora._C")]
    assert "prelora._C was not built: Command '['false'" in line
    assert any(
        line.split()[:3] == ["grouped_gemm", "cpu", "no:"] and "not built" in line for line in shown.splitlines()
    )


def test_without_the_extension_everything_is_served_by_others(failed_build):
    code = """
import prelora.ops as ops, torch
assert ops.__file__.startswith({tree!r}), ops.__file__
w, a, b = torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 2)
layer = ([w], [a], [b], [1], [4], [2], [0.5])
print(ops.lora_merge.chosen(*layer, torch.float32), ops.grouped_gemm.chosen([b], [a]), ops.merged_norms.chosen(*layer))
print(ops.merged_norms(*layer, True).item(), ops.grouped_gemm([b], [a], [w], [0.5], [1.0], [False], [False], w.dtype))
""".replace("{tree!r}", repr(str(failed_build)))

    result = python("-c", ALONE + code, cwd=failed_build, PYTHONPATH=str(failed_build))

    assert result.stdout.startswith("cpu reference reference\n48.0 [tensor([[2., 2., 2.]"), result.stderr


# Loading


def test_import_prelora_does_not_load_it():
    result = python(
        "-c", "import sys, prelora, prelora.ops; print([m for m in sys.modules if '_C' in m and 'prelora' in m])"
    )

    assert result.stdout == "[]\n", result.stderr


@extension
def test_it_loads_without_a_driver_and_info_says_what_it_has():
    shown = python("-m", "prelora.info", CUDA_VISIBLE_DEVICES="").stdout

    (line,) = [line for line in shown.splitlines() if line.startswith("prelora._C")]
    assert f"{torch.ops.prelora_C.isa()} on the CPU, with" in line
    if "without CUDA" not in line:
        assert "no CUDA device is available" in next(
            x for x in shown.splitlines() if x.split()[:2] == ["merged_norms", "cuda"]
        )


def test_what_cannot_be_loaded_is_told_once(monkeypatch):
    calls = []

    def fail(name):
        calls.append(name)
        raise ImportError("libtorch_cuda.so: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", fail)
    monkeypatch.setattr(_ext.Path, "is_file", lambda self: False)
    _ext.reason.cache_clear()
    try:
        assert [_ext.reason(), _ext.reason()] == [
            "prelora._C cannot be loaded: libtorch_cuda.so: cannot open shared object file"
        ] * 2
        assert _ext.description() == _ext.reason()
        assert calls == ["prelora._C"]
    finally:
        _ext.reason.cache_clear()


# Threads

SIZES = """
import os, sys, time, torch
from prelora import _ext
assert _ext.reason() is None
torch.set_num_threads(1)
a, b, out = torch.ones(1500, 300), torch.ones(300, 1500), torch.empty(1500, 1500)
def multiply(): torch.ops.prelora_C.grouped_gemm_([a], [b], [], [out], [1.0], [], [False], [False])
def threads(): return len(os.listdir("/proc/self/task"))
"""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@extension
@linux
def test_one_openmp_runtime_is_there_and_it_is_torchs():
    result = python("-c", SIZES + "multiply(); print(open('/proc/self/maps').read())")

    mapped = {line.split()[-1] for line in result.stdout.splitlines() if "omp" in line.rpartition("/")[2]}
    assert len(mapped) == 1, mapped
    assert Path(*map(Path, mapped)).is_relative_to(Path(torch.__file__).parents[1])


@extension
@linux
def test_it_runs_in_torchs_own_threads_and_as_many_as_torch_is_told():
    code = """
multiply(); one = threads()
torch.set_num_threads(3); multiply(); three = threads()
torch.ones(4_000_000).add_(1); print(three - one, threads() - three)
"""
    result = python("-c", SIZES + code)

    assert result.stdout == "2 0\n", result.stderr


@extension
def test_other_python_threads_run_meanwhile():
    a, b, out = torch.ones(1500, 1000), torch.ones(1000, 1500), torch.empty(1500, 1500)
    stop, ticks = threading.Event(), []

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    ticker = threading.Thread(target=tick)
    ticker.start()
    groups = 8
    begin = time.perf_counter()
    torch.ops.prelora_C.grouped_gemm_(
        [a] * groups, [b] * groups, [], [out] + [torch.empty_like(out) for _ in range(groups - 1)],
        [1.0] * groups, [], [False] * groups, [False] * groups,
    )  # fmt: skip
    end = time.perf_counter()
    stop.set()
    ticker.join()

    assert sum(begin < tick < end for tick in ticks) > 5
