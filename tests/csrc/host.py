"""Runs ``csrc/cuda/grouped_gemm.cu`` as C++ on a CPU (``host_cuda.h``), and what it should give in float64."""

from __future__ import annotations

import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from csrc.compiler import compile_cpp

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
DTYPES = ("float32", "bfloat16", "float16")
"""In the order of ``prelora::Dtype``."""
SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}
"""Half an ulp, relative to a number's power of two."""
PRODUCT = {"float32": 2.0**-22, "bfloat16": 0.0, "float16": 0.0}
"""What an operand's two tf32 numbers lack of it, relative."""
FLAGS = {
    "plain": ["-O1"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


def compile_host(folder: Path, kind: str) -> Path:
    """The executable, built in ``folder`` with the sanitizer that ``kind`` names."""
    target = folder / f"grouped_gemm_{kind}"
    sources = [HERE / "grouped_gemm_host.cpp", CSRC / "cuda" / "table.cpp"]
    return compile_cpp(target, "-Wno-unknown-pragmas", "-fno-strict-aliasing", *FLAGS[kind], f"-I{HERE}", *sources)


@dataclass(frozen=True)
class Product:
    """One problem: alpha · op(A) · op(B) + beta · D."""

    m: int
    n: int
    k: int
    trans_a: bool = False
    trans_b: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    gap: int = 0
    """Elements between the rows of every matrix."""
    shift: int = 0
    """Elements by which every matrix begins after a multiple of 16 bytes."""
    d_is_c: bool = False
    fill_d: float | None = None

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Of C, D, A and B as they are stored."""
        a, b = (self.m, self.k), (self.k, self.n)
        return (self.m, self.n), (self.m, self.n), a[:: -1 if self.trans_a else 1], b[:: -1 if self.trans_b else 1]


@dataclass(frozen=True)
class Outcome:
    """What one call gave."""

    error: int
    reason: str
    launches: int
    barriers: int
    waits: int
    """Places in the source where threads waited for each other, or for their copies."""
    c: list[np.ndarray]
    squares: np.ndarray


def to_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """``x``, float32, as the unsigned integers that hold it rounded to ``dtype``."""
    if dtype == "float32":
        return x.astype(np.float32).view(np.uint32)
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers, in float64."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.dtype(dtype)).astype(np.float64)


class Call:
    """Products with their matrices drawn: what goes in, and what should come out."""

    def __init__(self, products, dtypes=("float32",) * 4, *, seed=0, scale=1.0):
        """``dtypes`` of A, B, C and D."""
        self.products, (a, b, c, d) = list(products), dtypes
        self.dtypes = {"a": a, "b": b, "c": c, "d": d}
        generator = np.random.default_rng(seed)
        self.matrices = []
        for product in self.products:
            drawn = {}
            for name, shape in zip("cdab", product.shapes, strict=True):
                values = (scale * generator.standard_normal(shape)).astype(np.float32)
                if name == "d" and product.fill_d is not None:
                    values[:] = product.fill_d
                drawn[name] = to_bits(values, self.dtypes[name])
            if product.d_is_c:
                drawn["d"] = drawn["c"]
            self.matrices.append(drawn)

    def values(self, index, name):
        """A matrix in float64, as it is stored."""
        return from_bits(self.matrices[index][name], self.dtypes[name])

    def exact(self, index):
        """C in float64, and the same sum of absolute values, which rounding is relative to."""
        product = self.products[index]
        a, b = self.values(index, "a"), self.values(index, "b")
        a, b = a.T if product.trans_a else a, b.T if product.trans_b else b
        c, size = product.alpha * (a @ b), abs(product.alpha) * (abs(a) @ abs(b))
        if product.beta:
            d = self.values(index, "d")
            c, size = c + product.beta * d, size + abs(product.beta * d)
        return c, size

    def assert_close(self, index, actual):
        """Within the rounding of the result, of the operands' split and of fp32 sums, whose errors have either sign."""
        expected, size = self.exact(index)
        product = self.products[index]
        split = max(PRODUCT[self.dtypes["a"]], PRODUCT[self.dtypes["b"]])
        sums = 2.0**-24 * (2 + np.sqrt(product.k) / 2)
        allowed = 2 * ROUNDING[self.dtypes["c"]] * abs(expected) + (split + sums) * size
        allowed += 2.0**-25 if self.dtypes["c"] == "float16" else 0.0
        assert np.isfinite(actual).all(), f"{product}: not finite"
        worst = (abs(actual - expected) / np.maximum(allowed, 1e-30)).max(initial=0.0)
        assert worst <= 1, f"{product}: off by {worst:.2f} times what is allowed"

    def pack(
        self, *, squares=False, multiprocessors=2, seed=0, skipped_barrier=-1, skipped_wait=-1, launch_error=0
    ) -> bytes:
        """As ``grouped_gemm_host.cpp`` reads it."""
        codes = [DTYPES.index(self.dtypes[name]) for name in "abcd"]
        options = (squares, multiprocessors, seed, skipped_barrier, skipped_wait, launch_error)
        packed = [struct.pack("11i", len(self.products), *codes, *options)]
        for product, matrices in zip(self.products, self.matrices, strict=True):
            shapes = dict(zip("cdab", product.shapes, strict=True))
            strides = {name: shape[1] + product.gap for name, shape in shapes.items()}
            stored = {name: self._store(matrices[name], name, strides[name]) for name in "cdab"}
            offsets = [product.shift * SIZE[self.dtypes[name]] for name in "cdab"]
            flags = (product.trans_a, product.trans_b, product.d_is_c)
            sizes = (product.m, product.n, product.k, *strides.values(), *flags, *offsets)
            packed.append(struct.pack("14q", *sizes))
            packed.append(struct.pack("4q2d", *(len(stored[name]) for name in "cdab"), product.alpha, product.beta))
            packed += stored.values()
        return b"".join(packed)

    def unpack(self, answer: bytes, *, squares=False) -> tuple[Outcome, bytes]:
        """The outcome, and what of ``answer`` is left."""
        error, launches, barriers, waits, reason_bytes = struct.unpack_from("5i", answer)
        reason, answer = answer[20 : 20 + reason_bytes].decode(), answer[20 + reason_bytes :]
        c = []
        for product, matrices in zip(self.products, self.matrices, strict=True):
            stored = self._store(matrices["c"], "c", product.n + product.gap)
            raw = np.frombuffer(answer[: len(stored)], dtype=matrices["c"].dtype)
            answer = answer[len(stored) :]
            rows = np.full((product.m, product.n + product.gap), self._poison("c"), dtype=raw.dtype)
            if product.n:
                rows.reshape(-1)[: len(raw)] = raw
            assert (rows[:, product.n :] == self._poison("c")).all(), f"{product}: written between rows"
            c.append(from_bits(rows[:, : product.n].copy(), self.dtypes["c"]))
        count = len(self.products) if squares else 0
        outcome = Outcome(error, reason, launches, barriers, waits, c, np.frombuffer(answer[: 8 * count]))
        return outcome, answer[8 * count :]

    def _poison(self, name):
        return np.iinfo(np.uint32 if self.dtypes[name] == "float32" else np.uint16).max

    def _store(self, bits, name, stride):
        """Bytes of the matrix in rows ``stride`` apart, NaN between them, none after the last element."""
        rows = np.full((bits.shape[0], stride), self._poison(name), dtype=bits.dtype)
        rows[:, : bits.shape[1]] = bits
        return rows.tobytes()[: max(rows.nbytes - (stride - bits.shape[1]) * bits.itemsize, 0)] if bits.size else b""


def run_raw(executable: Path, packed: bytes) -> subprocess.CompletedProcess:
    """The process, whatever becomes of it; it ends at the first race."""
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([executable], input=packed, env=environment, capture_output=True, check=False)


def run(executable: Path, call: Call, **options) -> Outcome:
    """The outcome of one call, which no sanitizer complains of."""
    process = run_raw(executable, call.pack(**options))
    assert process.returncode == 0, process.stderr.decode()[-4000:]
    outcome, rest = call.unpack(process.stdout, squares=options.get("squares", False))
    assert not rest
    return outcome
