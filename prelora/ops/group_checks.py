"""What a grouped product refuses, in one sentence that names the group; the same for every provider."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


def check_groups(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    alpha: Sequence[float],
    beta: Sequence[float],
    trans_a: Sequence[bool],
    trans_b: Sequence[bool],
    out: Sequence[Tensor] = (),
) -> None:
    """Raise ``ValueError`` where the arguments of ``grouped_gemm`` do not fit together; ``out`` may be none."""
    lengths = [len(values) for values in (a, b, alpha, trans_a, trans_b)]
    if len(set(lengths)) > 1 or len(d) not in (0, len(a)) or len(beta) != len(d) or len(out) not in (0, len(a)):
        names = ("a", "b", "alpha", "trans_a", "trans_b", "d", "beta", "out")
        counts = [*lengths, len(d), len(beta), len(out)]
        raise ValueError(
            "a grouped product needs as many of each list, or of d and beta none: got "
            + ", ".join(f"{count} {name}" for name, count in zip(names, counts, strict=True) if count or name != "out")
        )
    for name, tensors in (("A", a), ("B", b), ("D", d), ("C", out)):
        _check_alike(name, tensors, a)
    for i, (a_i, b_i, ta, tb) in enumerate(zip(a, b, trans_a, trans_b, strict=True)):
        (m, k), (inner, n) = a_i.shape[:: -1 if ta else 1], b_i.shape[:: -1 if tb else 1]
        if k != inner:
            raise ValueError(f"group {i}: op(A) is [{m}, {k}] and op(B) [{inner}, {n}]: {k} is not {inner}")
        if k == 0:
            raise ValueError(f"group {i}: rank 0: op(A) is [{m}, 0] and op(B) [0, {n}]")
        for name, tensors in (("D", d), ("C", out)):
            if tensors and tensors[i].shape != (m, n):
                raise ValueError(f"group {i}: {name} is {list(tensors[i].shape)}, the product [{m}, {n}]")
    for name, values in (("alpha", alpha), ("beta", beta)):
        for i, value in enumerate(values):
            if math.isnan(value):
                raise ValueError(f"group {i}: {name} is {value}")


def _check_alike(name: str, tensors: Sequence[Tensor], a: Sequence[Tensor]) -> None:
    """Matrices with contiguous rows, of the dtype of the first of them and on the device of the first A."""
    for i, tensor in enumerate(tensors):
        if tensor.dim() != 2:
            raise ValueError(f"group {i}: {name} is {list(tensor.shape)}, not a matrix")
        if tensor.device != a[0].device:
            raise ValueError(f"group {i}: {name} is on {tensor.device}, A of group 0 on {a[0].device}")
        if tensor.dtype != tensors[0].dtype:
            raise ValueError(f"group {i}: {name} is {tensor.dtype}, that of group 0 {tensors[0].dtype}")
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"group {i}: {name}'s rows are not contiguous: {list(tensor.shape)}, {tensor.stride()}")


class _Region(NamedTuple):
    """The bytes of a matrix: ``rows`` of ``width``, ``pitch`` apart."""

    start: int
    stop: int
    pitch: int
    width: int
    group: int
    name: str

    def meets(self, later: _Region) -> bool:
        """Whether it shares a byte with one that does not start before it; side by side in one table, they do not."""
        if later.start >= self.stop:
            return False
        one_row = later.start + later.width == later.stop
        if self.pitch <= 0 or not (one_row or later.pitch == self.pitch):
            return True  # or may share one: nobody lays out outputs so
        column = (later.start - self.start) % self.pitch
        return column < self.width or column + later.width > self.pitch

    def is_d_of(self, other: _Region) -> bool:
        """Whether one is C and the other D of one group and they are the same matrix, which is allowed."""
        return {self.name, other.name} == {"C", "D"} and self[:5] == other[:5]


def check_overlaps(a: Sequence[Tensor], b: Sequence[Tensor], d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` where an output overlaps itself, another output, or an input that is not its own D."""
    if not out or out[0].untyped_storage().device.type == "meta":
        return  # a fake tensor lies nowhere
    for i, c in enumerate(out):
        if c.shape[0] > 1 and c.stride(0) < c.shape[1]:
            raise ValueError(f"group {i}: C overlaps itself: {list(c.shape)}, strides {c.stride()}")
    regions = sorted(
        _region(tensor, i, name)
        for name, tensors in (("A", a), ("B", b), ("D", d), ("C", out))
        for i, tensor in enumerate(tensors)
        if tensor.numel()
    )
    active: list[_Region] = []
    for region in regions:
        active = [earlier for earlier in active if earlier.stop > region.start]
        for earlier in active:
            outputs = (earlier.name, region.name).count("C")
            if outputs and earlier.meets(region) and not (outputs == 1 and earlier.is_d_of(region)):
                names = " and ".join(f"{r.name} of group {r.group}" for r in (earlier, region))
                raise ValueError(f"{names} overlap in memory")
        active.append(region)


def _region(tensor: Tensor, group: int, name: str) -> _Region:
    rows, columns = tensor.shape
    start, size = tensor.data_ptr(), tensor.element_size()
    pitch = (tensor.stride(0) if rows > 1 else columns) * size
    return _Region(start, start + (rows - 1) * pitch + columns * size, pitch, columns * size, group, name)
