"""Every kernel compiles ahead of time for sm_80, sm_90 and sm_100, and its machine code is inside its budget."""

import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

pytest.importorskip("triton", reason="the kernels are Triton's")

from prelora.kernels import inspect
from prelora.kernels.specimen import Specimen

SPECIMENS = {specimen.label: specimen for _, _, specimen in inspect.specimens_of(inspect.kernel_modules())}


def run_inspect(*arguments, **environment):
    """The command in a process of its own: in this one, the kernels are interpreted and have no machine code."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "prelora.kernels.inspect", *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session", params=inspect.ARCHITECTURES, ids="sm_{}".format)
def readings(request, tmp_path_factory):
    """What the command says of every specimen, compiled once for all workers of this run of pytest."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    file = shared / f"sm_{request.param}.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            result = run_inspect("--arch", str(request.param), "--json")
            assert result.returncode in (0, 1), result.stderr
            file.write_text(result.stdout, encoding="utf-8")
    return [inspect.Reading(**reading) for reading in json.loads(file.read_text(encoding="utf-8"))]


def assert_none(broken):
    """``broken`` has a line for each reading that breaks the promise."""
    lines = list(broken)
    assert not lines, "\n".join(lines)


def test_every_specimen_compiles(readings):
    assert sorted(reading.label for reading in readings) == sorted(SPECIMENS)
    assert_none(f"{r.label}: {', '.join(r.problems)}" for r in readings if not r.registers)


def test_nothing_is_spilled(readings):
    assert_none(f"{r.label}: {r.spilled} bytes" for r in readings if r.spilled)


def test_registers_are_inside_the_budget(readings):
    allowed = {label: specimen.max_registers for label, specimen in SPECIMENS.items()}
    assert_none(f"{r.label}: {r.registers} of {allowed[r.label]}" for r in readings if r.registers > allowed[r.label])


def test_shared_memory_is_inside_the_budget(readings):
    allowed = {label: specimen.max_shared for label, specimen in SPECIMENS.items()}
    assert_none(f"{r.label}: {r.shared} of {allowed[r.label]}" for r in readings if r.shared > allowed[r.label])


def test_products_are_made_by_tensor_cores(readings):
    assert_none(r.label for r in readings if SPECIMENS[r.label].tensor_cores and not r.tensor_core_instructions)


def test_tiles_are_copied_asynchronously(readings):
    assert_none(r.label for r in readings if SPECIMENS[r.label].asynchronous and not r.asynchronous)


def test_what_is_aligned_is_loaded_16_bytes_at_a_time(readings):
    assert_none(
        f"{r.label}: {r.load_bytes}"
        for r in readings
        if SPECIMENS[r.label].wide_loads and SPECIMENS[r.label].divisible_by_16 and r.load_bytes < 16
    )


def test_tiles_of_aligned_merges_are_stored_16_bytes_at_a_time(readings):
    merges = [r for r in readings if r.kernel.startswith("lora_merge") and SPECIMENS[r.label].divisible_by_16]
    assert len(merges) > 10
    assert_none(f"{r.label}: {r.store_bytes}" for r in merges if r.store_bytes < 16)


def test_problems_are_named_exactly_where_the_budget_is_exceeded(readings):
    for reading in readings:
        assert list(reading.problems) == list(inspect.problems(SPECIMENS[reading.label], reading))


def test_labels_are_unique():
    assert len(SPECIMENS) == sum(1 for _ in inspect.specimens_of(inspect.kernel_modules()))


def specimen(**budget):
    return Specimen("label", None, {}, {}, 4, 3, **budget)


@pytest.mark.parametrize(
    ("given", "budget", "problem"),
    [
        ({"spilled": 8}, {}, "8 bytes spilled"),
        ({"registers": 129}, {"max_registers": 128}, "129 registers, 128 allowed"),
        ({"shared": 2048}, {"max_shared": 1024}, "2048 bytes of shared memory, 1024 allowed"),
        ({}, {"tensor_cores": True}, "no tensor-core instruction"),
        ({}, {"asynchronous": True}, "no asynchronous copy"),
        ({"load_bytes": 8}, {"divisible_by_16": frozenset({"x_ptr"})}, "loads of 8 bytes"),
    ],
)
def test_each_excess_is_a_problem(given, budget, problem):
    lenient = {"tensor_cores": False, "asynchronous": False}
    reading = inspect.Reading("label", "kernel", 80, **given)
    (found,) = inspect.problems(specimen(**(lenient | budget)), reading)
    assert found.startswith(problem)


@pytest.mark.parametrize("opcode", ["mma", "wgmma", "tcgen05"])
def test_tensor_cores_of_any_generation_count(opcode):
    reading = inspect.Reading("label", "kernel", 80, asynchronous=1, **{opcode: 3})
    assert not list(inspect.problems(specimen(), reading))


@pytest.mark.parametrize(
    ("instruction", "width"),
    [
        ("LDG.E", 4),
        ("LDG.E.EF.128", 16),
        ("LDG.E.64.CONSTANT", 8),
        ("LDG.E.ENL2.256", 32),
        ("LDGSTS.E.BYPASS.128", 16),
        ("LDG.E.U8", 1),
        ("STG.E.U16", 2),
    ],
)
def test_width_of_an_access(instruction, width):
    assert inspect.access_bytes(instruction) == width


def test_help_says_what_the_exit_code_means():
    result = run_inspect("--help")
    assert result.returncode == 0
    assert "Exit code 1 if any kernel is outside its budget" in " ".join(result.stdout.split())


def test_interpreted_kernels_are_refused():
    result = run_inspect("--kernel", "weight_norms", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr


def test_an_unknown_kernel_is_refused():
    result = run_inspect("--kernel", "lora_mrege")
    assert result.returncode == 2
    assert "no kernel or module of that name with specimens: lora_mrege" in result.stderr


def test_table_has_a_line_for_each_specimen():
    result = run_inspect("--kernel", "weight_norms", "--arch", "80", "--jobs", "2")
    assert result.returncode == 0, result.stderr
    header, *lines, last = result.stdout.splitlines()
    assert header.split() == ["arch", "regs", "spill", "shared", "tensor", "cores", "load", "store", "async", "kernel"]
    own = [specimen.label for _, _, specimen in inspect.specimens_of(["weight_norms"])]
    assert sorted(line.split(" ok ")[1].strip() for line in lines) == sorted(own)
    assert all(line.startswith("sm_80 ") for line in lines)
    assert last == f"{len(own)} compiled, 0 outside their budget"
