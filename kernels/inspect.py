"""What the compiler makes of every kernel, read from its machine code: ``python -m prelora.kernels.inspect``.

Every ``specimens()`` is compiled ahead of time, which takes no GPU, and held to its budget. Registers, stack and static
shared memory are what ``cuobjdump -res-usage`` says of the cubin; instructions are counted in ``nvdisasm``'s listing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import triton
from prelora.kernels.specimen import Specimen
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
TENSOR_CORE_OPCODES = {"HMMA": "mma", "IMMA": "mma", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}
LOADS = ("LDG", "LDGSTS")
STORES = ("STG",)
ASYNCHRONOUS_OPCODES = ("LDGSTS", "UBLKCP", "UTMALDG")
"""cp.async, cp.async.bulk and TMA."""

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Reading:
    """What one specimen became on one architecture."""

    label: str
    kernel: str
    arch: int
    registers: int = 0
    spilled: int = 0
    """Bytes of a thread's stack."""
    shared: int = 0
    """Bytes of a program's shared memory, static and dynamic."""
    mma: int = 0
    wgmma: int = 0
    tcgen05: int = 0
    load_bytes: int = 0
    """Of the widest global load of a thread, asynchronous copies among them."""
    store_bytes: int = 0
    asynchronous: int = 0
    problems: tuple[str, ...] = ()
    """In what it exceeds the specimen's budget; or why it did not compile."""

    @property
    def tensor_core_instructions(self) -> int:
        """Of any generation."""
        return self.mma + self.wgmma + self.tcgen05


def kernel_modules() -> list[str]:
    """Names of the modules beside this one that have specimens."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
    return [name for name in names if hasattr(_module(name), "specimens")]


def specimens_of(modules: Iterable[str], kernels: Sequence[str] = ()) -> Iterator[tuple[str, int, Specimen]]:
    """(module, index, specimen) of all specimens; of ``kernels`` only, each a module's name or a kernel's."""
    for module in modules:
        for index, specimen in enumerate(_module(module).specimens()):
            if not kernels or module in kernels or specimen.kernel.__name__ in kernels:
                yield module, index, specimen


def compile_specimen(specimen: Specimen, arch: int) -> Any:
    """Triton's compiled kernel, from its cache if it was compiled before."""
    constants = dict(specimen.constants)
    names = specimen.kernel.arg_names
    source = ASTSource(
        specimen.kernel,
        {name: "constexpr" if name in constants else specimen.signature[name] for name in names},
        constants,
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name in sorted(specimen.divisible_by_16)
            if name not in constants
        },
    )
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def machine_code(cubin: bytes) -> bytes:
    """The instructions of a cubin's only kernel: its ELF section ``.text.<kernel>``."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = sections[names_index][4]
    texts = [s for s in sections if cubin[names + s[0] :].startswith(b".text.")]
    if len(texts) != 1:
        raise ValueError(f"a cubin of one kernel, not of {len(texts)}")
    return cubin[texts[0][4] : texts[0][4] + texts[0][5]]


def disassemble(codes: Sequence[bytes], arch: int) -> list[Counter[str]]:
    """How often each instruction, with its suffixes, stands in each of ``codes``.

    All go through one call: ``nvdisasm`` takes 0.3 s to start, as long as compiling a kernel.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        target = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
        listing = _run(triton.knobs.nvidia.nvdisasm.path, "--binary", target, "-ndf", file.name)
    ends = list(accumulate(map(len, codes)))
    counts: list[Counter[str]] = [Counter() for _ in codes]
    for offset, instruction in INSTRUCTION.findall(listing):
        counts[bisect_right(ends, int(offset, 16))][instruction] += 1
    return counts


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = USAGE.search(_run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name))
    assert usage, "cuobjdump prints REG, STACK, SHARED and LOCAL of every kernel"
    registers, stack, _, local = map(int, usage.groups())
    return registers, stack + local


def access_bytes(instruction: str) -> int:
    """Of one thread: ``LDG.E.128`` accesses 16 bytes, ``LDG.E`` 4, ``STG.E.U16`` 2."""
    return max(map(int, re.findall(r"\.[US]?(8|16|32|64|128|256)\b", instruction)), default=32) // 8


def read(specimen: Specimen, arch: int, usage: tuple[int, int], shared: int, counts: Counter[str]) -> Reading:
    """Sum the instructions up and hold them to the budget."""
    opcodes: Counter[str] = Counter()
    widest: Counter[str] = Counter()
    for instruction, count in counts.items():
        opcode = instruction.split(".")[0]
        opcodes[opcode] += count
        widest[opcode] = max(widest[opcode], access_bytes(instruction))
    tensor_cores = Counter(dict.fromkeys(TENSOR_CORE_OPCODES.values(), 0))
    for opcode, kind in TENSOR_CORE_OPCODES.items():
        tensor_cores[kind] += opcodes[opcode]
    reading = Reading(
        label=specimen.label,
        kernel=specimen.kernel.__name__,
        arch=arch,
        registers=usage[0],
        spilled=usage[1],
        shared=shared,
        load_bytes=max(widest[opcode] for opcode in LOADS),
        store_bytes=max(widest[opcode] for opcode in STORES),
        asynchronous=sum(opcodes[opcode] for opcode in ASYNCHRONOUS_OPCODES),
        **tensor_cores,
    )
    return replace(reading, problems=tuple(problems(specimen, reading)))


def problems(specimen: Specimen, reading: Reading) -> Iterator[str]:
    """In what ``reading`` exceeds the budget."""
    if reading.spilled:
        yield f"{reading.spilled} bytes spilled"
    if reading.registers > specimen.max_registers:
        yield f"{reading.registers} registers, {specimen.max_registers} allowed"
    if reading.shared > specimen.max_shared:
        yield f"{reading.shared} bytes of shared memory, {specimen.max_shared} allowed"
    if specimen.tensor_cores and not reading.tensor_core_instructions:
        yield "no tensor-core instruction"
    if specimen.asynchronous and not reading.asynchronous:
        yield "no asynchronous copy"
    if specimen.wide_loads and specimen.divisible_by_16 and reading.load_bytes < 16:
        yield f"loads of {reading.load_bytes} bytes, though what is loaded is aligned"


def inspect(specimens: Sequence[Specimen], arch: int) -> list[Reading]:
    """Compile and read all of ``specimens`` for one architecture."""
    readings, compiled = [], []
    for specimen in specimens:
        try:
            compiled.append((specimen, compile_specimen(specimen, arch)))
        except (triton.TritonError, RuntimeError) as error:
            first = str(error).strip().splitlines() or [type(error).__name__]
            failure = f"does not compile: {first[0]}"
            readings.append(Reading(specimen.label, specimen.kernel.__name__, arch, problems=(failure,)))
    cubins = [kernel.asm["cubin"] for _, kernel in compiled]
    counts = disassemble([machine_code(cubin) for cubin in cubins], arch) if cubins else []
    for (specimen, kernel), cubin, counted in zip(compiled, cubins, counts, strict=True):
        readings.append(read(specimen, arch, resource_usage(cubin), kernel.metadata.shared, counted))
    return readings


def table(readings: Sequence[Reading]) -> str:
    """One line for each reading, and a last one with the total."""
    header = ("arch", "regs", "spill", "shared", "tensor cores", "load", "store", "async", "", "kernel")
    rows = [header]
    for r in readings:
        kinds = " ".join(f"{n} {kind}" for kind, n in (("mma", r.mma), ("wgmma", r.wgmma), ("tcgen05", r.tcgen05)) if n)
        numbers = (r.registers, r.spilled, r.shared, kinds or "-", f"{r.load_bytes} B", f"{r.store_bytes} B")
        verdict = "OVER: " + ", ".join(r.problems) if r.problems else "ok"
        rows.append((f"sm_{r.arch}", *map(str, numbers), str(r.asynchronous), verdict, r.label))
    widths = [max(len(row[i]) for row in rows if not row[i].startswith("OVER")) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    over = sum(bool(r.problems) for r in readings)
    return "\n".join([*lines, f"{len(readings)} compiled, {over} outside their budget"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    if triton.knobs.runtime.interpret:
        _parser().error("TRITON_INTERPRET is set: what is interpreted has no machine code")
    found = [(module, index, s.kernel.__name__) for module, index, s in specimens_of(kernel_modules(), options.kernel)]
    known = {name for module, _, kernel in found for name in (module, kernel)}
    if unknown := set(options.kernel) - known:
        _parser().error(f"no kernel or module of that name with specimens: {', '.join(sorted(unknown))}")
    shares = [(found[i :: options.jobs], arch) for arch in options.arch for i in range(options.jobs)]
    if options.jobs == 1:
        parts = [_inspect_share(*share) for share in shares]
    else:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(_inspect_share, *zip(*shares, strict=True)))
    readings = [reading for part in parts for reading in part]
    print(json.dumps([asdict(reading) for reading in readings]) if options.json else table(readings))
    return 1 if any(reading.problems for reading in readings) else 0


def _inspect_share(found: Sequence[tuple[str, int, str]], arch: int) -> list[Reading]:
    wanted = {(module, index) for module, index, _ in found}
    modules = sorted({module for module, _ in wanted})
    return inspect([s for module, index, s in specimens_of(modules) if (module, index) in wanted], arch)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prelora.kernels.inspect",
        description="Compile every Triton kernel ahead of time, without a GPU, and print what its machine code uses.",
        epilog="Exit code 1 if any kernel is outside its budget, see prelora/kernels/specimen.py. Compiled kernels are "
        "kept in Triton's cache ($TRITON_CACHE_DIR): a second run takes seconds.",
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=ARCHITECTURES,
        default=ARCHITECTURES,
        metavar="SM",
        help="of 80 (A100), 90 (H100) and 100 (B200); all unless given",
    )
    parser.add_argument(
        "--kernel", nargs="+", default=[], metavar="NAME", help="only these, by the kernel's name or its module's"
    )
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="processes that compile; 1 unless given")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    return parser


def _module(name: str) -> Any:
    return importlib.import_module(f"prelora.kernels.{name}")


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
