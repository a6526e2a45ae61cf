"""TFRecords of ImageNet's layout: the framing and its checksums, and the two features wanted of a tf.train.Example.

A record is its length (8 bytes, little endian), the length's masked CRC-32C, the data, the data's masked CRC-32C.
An Example is protocol-buffer text ``features { feature { key value { bytes_list | int64_list } } }``.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from prelora.data.shards import Entry
from prelora.data.storage import UnusableError
from prelora.errors import DataError

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
IMAGE, LABEL = b"image/encoded", b"image/class/label"

Buffer = bytes | mmap.mmap


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and offset as TFRecords do, so that a checksum of checksummed data stays sound."""
    from google_crc32c import value

    crc = value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def walk(path: Path) -> Iterator[Entry]:
    """The records of a file by their lengths; of the images no byte is touched.

    Raises:
        DataError: a length fails its checksum, the file is cut, or a sound record is of another layout.
    """
    if not path.stat().st_size:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = number = 0
        while start < len(data):
            if start + HEADER.size > len(data):
                raise DataError(f"{path} is cut in record {number}, at byte {len(data)}")
            length = _checked_length(data[start : start + HEADER.size], f"{path}, record {number}")
            end = start + HEADER.size + length + FOOTER.size
            if end > len(data):
                raise DataError(f"{path} is cut in record {number}: it would end at byte {end}")
            yield Entry(start, end - start, _label(data, start, end, f"{path}, record {number}"), str(number))
            start, number = end, number + 1


def payload(record: bytes) -> bytes:
    """The encoded image of a whole record.

    Raises:
        UnusableError: the record is cut, fails its checksum or holds no image.
    """
    if len(record) < HEADER.size + FOOTER.size:
        raise UnusableError("the record is cut")
    data = record[HEADER.size : -FOOTER.size]
    if HEADER.unpack(record[: HEADER.size])[0] != len(data):
        raise UnusableError("the record's length is not the one that was indexed")
    if FOOTER.unpack(record[-FOOTER.size :])[0] != masked_crc(data):
        raise UnusableError("the record fails its CRC-32C")
    for key, start, end in _features(data, 0, len(data)):
        if key == IMAGE:
            start, end = _one(data, start, end)
            return data[start:end]
    raise UnusableError(f"the record has no feature {IMAGE.decode()}")


def _checked_length(header: bytes, where: str) -> int:
    length, crc = HEADER.unpack(header)
    if masked_crc(header[:8]) != crc:
        raise DataError(f"{where}: the length fails its CRC-32C, what follows in this file cannot be found")
    return length


def _label(data: Buffer, start: int, end: int, where: str) -> int:
    inside = start + HEADER.size, end - FOOTER.size
    try:
        for key, first, last in _features(data, *inside):
            if key == LABEL:
                return _varint(data, _one(data, first, last)[0])[0]
        problem = f"no feature {LABEL.decode()}"
    except (IndexError, UnusableError) as error:
        problem = str(error)
    if masked_crc(data[slice(*inside)]) == FOOTER.unpack(data[inside[1] : end])[0]:
        raise DataError(f"{where} is not of ImageNet's layout: {problem}")
    return 0  # never used: reading this record, whose place in the order stays, fails by its checksum


def _features(data: Buffer, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Key and the bounds of the value of each feature."""
    for _, first, last in _fields(data, start, end):  # Example.features
        for _, entry, close in _fields(data, first, last):  # Features.feature, a map's entries
            parts = {field: (a, b) for field, a, b in _fields(data, entry, close)}
            if 1 in parts and 2 in parts:
                yield data[slice(*parts[1])], *parts[2]


def _one(data: Buffer, start: int, end: int) -> tuple[int, int]:
    """Bounds of the first value in a Feature's list, which of bytes, floats or integers it be."""
    for _, first, last in _fields(data, start, end):  # Feature.bytes_list or .int64_list
        for _, a, b in _fields(data, first, last):
            return a, b
    raise UnusableError("a feature without a value")


def _fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number and bounds of each field of a message; of a plain integer, the bounds of its varint."""
    while start < end:
        tag, start = _varint(data, start)
        kind = tag & 7
        if kind == 0:
            stop = _varint(data, start)[1]
        elif kind == 2:
            length, start = _varint(data, start)
            stop = start + length
        elif kind in (1, 5):
            stop = start + (8 if kind == 1 else 4)
        else:
            raise UnusableError(f"not protocol-buffer text: wire type {kind}")
        if stop > end:
            raise UnusableError("not protocol-buffer text: a field beyond the end of its message")
        yield tag >> 3, start, stop
        start = stop


def _varint(data: Buffer, start: int) -> tuple[int, int]:
    """The integer at ``start`` and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
    raise UnusableError("not protocol-buffer text: an integer of more than 10 bytes")
