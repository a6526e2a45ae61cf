"""``csrc/cuda`` compiles and links for sm_80 and sm_90, and its machine code keeps what the source promises."""

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
ARCHITECTURES = (80, 90)
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
if NVCC is None:
    pytest.skip("no nvcc, neither on PATH nor in CUDA_HOME", allow_module_level=True)

BUDGET = re.compile(r"// Budget: (\d+) registers, (\d+) bytes of shared memory\.\n(?:.*\n)??.*?\b(\w+_kernel)\(")
USAGE = re.compile(r"Function (\w+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
FUNCTION = re.compile(r"^\s*Function : (\w+)$", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
GEMMS = {"44": 3, "42": 2, "24": 2, "22": 1}
"""Bytes of an element of A and of B, and how many tensor-core products make one of fp32."""
VARIANTS = 4 * 16
"""Of a chunk's code, by what is transposed; and tensor-core steps in it."""


def cuobjdump():
    triton = pytest.importorskip("triton", reason="cuobjdump and nvdisasm ship with triton")
    folder = Path(triton.knobs.nvidia.cuobjdump.path).parent
    return [folder / "cuobjdump"], os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def call(command, **options):
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder of the object file and of what ptxas said, made once for all workers of this run of pytest."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "grouped_gemm_cuda"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
            command = [NVCC, "-std=c++17", "-O3", "-t", "2", "-Xptxas", "-v", "-Werror", "all-warnings", *codes]
            command += ["-gencode=arch=compute_90,code=compute_90", "-Xcompiler", "-fPIC"]
            said = call([*command, "-c", CUDA / "grouped_gemm.cu", "-o", folder / "kernels.o"])
            (folder / "ptxas.txt").write_text(said, encoding="utf-8")
    return folder


def kernel_of(function):
    """The kernel's name in the source; with the bytes of its operands' elements where it is a template."""
    name = re.search(r"\d(grouped_[a-z]+_kernel)(?:ILi(\d)ELi(\d)E)?", function)
    return name[1] + (f" {name[2]}{name[3]}" if name[2] else "")


@pytest.fixture(scope="session", params=ARCHITECTURES, ids="sm_{}".format)
def code(request, compiled):
    """Of each kernel, how often each instruction stands in it; and its registers, stack, shared and local memory."""
    command, environment = cuobjdump()
    arguments = ["-arch", f"sm_{request.param}", compiled / "kernels.o"]
    _, *listing = FUNCTION.split(call([*command, "-sass", *arguments], env=environment))
    instructions = {
        kernel_of(function): Counter(INSTRUCTION.findall(text))
        for function, text in zip(listing[::2], listing[1::2], strict=True)
    }
    usage = USAGE.findall(call([*command, "-res-usage", *arguments], env=environment))
    return instructions, {kernel_of(function): tuple(map(int, numbers)) for function, *numbers in usage}


KERNELS = sorted([*(f"grouped_gemm_kernel {x}" for x in GEMMS), "grouped_combine_kernel", "grouped_squares_kernel"])


def budgets():
    """(registers, bytes of shared memory) by kernel, as they stand above each in the source."""
    found = BUDGET.findall((CUDA / "grouped_gemm.cu").read_text(encoding="utf-8"))
    return {name: (int(registers), int(shared)) for registers, shared, name in found}


def count(instructions, kernel, prefix):
    return sum(times for name, times in instructions[kernel].items() if name.startswith(prefix))


def test_every_kernel_is_there_and_has_a_budget(code):
    instructions, usage = code
    assert sorted(instructions) == sorted(usage) == KERNELS
    assert set(budgets()) == {kernel.split()[0] for kernel in KERNELS}


def test_nothing_is_spilled(code, compiled):
    instructions, usage = code
    assert {kernel: (stack, local) for kernel, (_, stack, _, local) in usage.items() if stack or local} == {}
    assert [kernel for kernel in KERNELS if count(instructions, kernel, ("LDL", "STL"))] == []
    spilled = re.findall(r"(\d+) bytes spill", (compiled / "ptxas.txt").read_text(encoding="utf-8"))
    assert set(spilled) == {"0"}


def test_registers_and_shared_memory_are_inside_the_budget(code):
    allowed = budgets()
    for kernel, (registers, _, shared, _) in code[1].items():
        assert registers <= allowed[kernel.split()[0]][0], kernel
        assert shared - 1024 <= allowed[kernel.split()[0]][1], f"{kernel}, of which the driver takes 1 KiB"


def test_three_blocks_fit_a_multiprocessor_of_sm_80():
    for kernel in ("grouped_gemm_kernel", "grouped_combine_kernel"):
        registers, shared = budgets()[kernel]
        assert 3 * 128 * registers <= 65536
        assert 3 * (shared + 1024) <= 164 * 1024


@pytest.mark.parametrize(("widths", "products"), GEMMS.items(), ids=GEMMS)
def test_products_are_made_by_tensor_cores(code, widths, products):
    assert count(code[0], f"grouped_gemm_kernel {widths}", "HMMA.1688.F32.TF32") >= VARIANTS * products


@pytest.mark.parametrize("widths", GEMMS)
def test_tiles_are_copied_asynchronously_16_bytes_at_a_time_and_padded_with_zeros(code, widths):
    instructions, kernel = code[0], f"grouped_gemm_kernel {widths}"
    assert count(instructions, kernel, "LDGSTS.E.BYPASS.128.ZFILL") > 0
    assert count(instructions, kernel, "LDGSTS") == count(instructions, kernel, "LDGSTS.E.BYPASS.128.ZFILL")


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if "squares" not in kernel])
def test_results_are_stored_16_bytes_at_a_time(code, kernel):
    assert count(code[0], kernel, "STG.E.128") > 0


def test_parts_of_a_sum_are_loaded_16_bytes_at_a_time(code):
    assert count(code[0], "grouped_combine_kernel", "LDG.E.128") > 0


def test_no_access_is_generic(code):
    assert [kernel for kernel in KERNELS if count(code[0], kernel, ("LD.", "ST."))] == []


def test_nothing_is_atomic(code):
    atomic = ("ATOM", "RED")
    assert [kernel for kernel in KERNELS if count(code[0], kernel, atomic)] == []


def test_architectures_to_come_find_ptx(compiled):
    command, environment = cuobjdump()
    assert "sm_90.ptx" in call([*command, "-lptx", compiled / "kernels.o"], env=environment)


def test_the_object_links_with_the_host_code(compiled):
    library = compiled / "grouped_gemm.so"
    sources = [CUDA / "table.cpp", compiled / "kernels.o"]
    call([NVCC, "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-Xlinker", "--no-undefined", *sources, "-o", library])
    assert library.stat().st_size > 0
