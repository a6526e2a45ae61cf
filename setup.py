"""Builds ``prelora._C`` of csrc/; the metadata stand in pyproject.toml.

Its CUDA part is built where nvcc and a CUDA build of torch are, a GPU need not be; ``PRELORA_CUDA=0|1`` forces it.
With 1, whatever is missing or fails is an error; else it leaves ``prelora/_C_build.txt`` in the extension's place.
"""

import os
import re
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None
ASKED = os.environ.get("PRELORA_CUDA") or "auto"
ARCHITECTURES = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")


def cuda_missing() -> str | None:
    """Why the CUDA part cannot be built; None: it can."""
    if torch is None or torch.version.cuda is None:
        return "no torch at build time" if torch is None else f"torch {torch.__version__} is a build without CUDA"
    home = cpp_extension.CUDA_HOME
    nvcc = Path(home or "", "bin", "nvcc")
    if not home or not nvcc.is_file():
        return f"no nvcc, neither on PATH nor in CUDA_HOME ({home or 'not set'})"
    said = subprocess.getoutput(f'"{nvcc}" --dryrun -x cu {os.devnull}')
    top, major = (re.search(pattern, said) for pattern in (r"TOP=(.+)", r"__CUDACC_VER_MAJOR__=(\d+)"))
    if not top or not major or major[1] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {major and major[1]}, torch of {torch.version.cuda}"
    if not Path(home, "include", "cuda_runtime_api.h").is_file():
        cpp_extension.CUDA_HOME = os.path.realpath(top[1])  # the nvcc on PATH may be a wrapper, far from its CUDA
    return None


def extension() -> Extension:
    """``prelora._C``, with its CUDA part if that is asked for or can be built."""
    missing = "PRELORA_CUDA=0" if ASKED == "0" else cuda_missing()
    if ASKED not in ("auto", "0", "1") or (ASKED == "1" and missing):
        raise SystemExit(f"PRELORA_CUDA={ASKED}: {missing if ASKED == '1' else 'accepted are 0 and 1'}")
    if torch is None:
        return Extension("prelora._C", ["csrc/bindings.cpp"], py_limited_api=True)
    built = f"without CUDA: {missing}" if missing else f"with CUDA {torch.version.cuda} for {ARCHITECTURES}"
    sources = [path for path in glob("csrc/**/*.c*", recursive=True) if not missing or "cuda" not in path]
    return (cpp_extension.CppExtension if missing else cpp_extension.CUDAExtension)(
        "prelora._C",
        sorted(sources),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args={"cxx": ["-O3", "-g0", "-fopenmp", f'-DPRELORA_BUILT="{built}"'], "nvcc": ["-O3"]},
        extra_link_args=["-fopenmp", "-s"],
        py_limited_api=True,
    )


class Build(cpp_extension.BuildExtension if torch else build_ext):
    """Builds the extension, or leaves the reason in the package."""

    def run(self) -> None:
        package = Path("prelora" if self.inplace else f"{self.build_lib}/prelora")
        for left in (*package.glob("_C.*"), package / "_C_build.txt"):
            left.unlink(missing_ok=True)
        try:
            if torch is None:
                raise ImportError("no torch at build time: it needs `pip install --no-build-isolation` beside torch")
            super().run()
        except Exception as error:
            if ASKED == "1":
                raise
            package.mkdir(parents=True, exist_ok=True)
            (package / "_C_build.txt").write_text(f"{error}; `pip install --verbose` says more\n", encoding="utf-8")


if __name__ == "__main__":
    setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
