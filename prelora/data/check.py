"""``prelora data check``: decode every image once, before a run that lasts for weeks meets the damaged ones."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prelora.data import manifest
from prelora.data.encoded import decode, image_size
from prelora.data.storage import Storage, UnusableError, open_splits, read_sample


def check_data(path: Path, out: Path | None, jobs: int) -> int:
    """Check both splits, print what was found, and write the manifest.

    Args:
        path: as ``data.path``.
        out: the manifest; None: where a source looks for it.
        jobs: threads.

    Returns:
        How many files cannot be used.

    Raises:
        ValueError, DataError: as ``open_splits``; ``jobs`` is below 1.
        OSError: the manifest cannot be written.
    """
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: must be above 0")
    lines: dict[str, list[dict[str, Any]]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for split, storage in open_splits(path).items():
            lines[split] = list(pool.map(lambda index, of=storage: _line(of, index), range(len(storage))))
            print(_summary(split, storage, lines[split]), flush=True)
    out = path / manifest.NAME if out is None else out
    manifest.write(out, lines)
    bad = [line for files in lines.values() for line in files if line["problem"] is not None]
    for line in bad:
        print(f"{line['name']}: {line['problem']}")
    print(f"{out}: {len(bad)} of {sum(map(len, lines.values()))} files cannot be used")
    return len(bad)


def _line(storage: Storage, index: int) -> dict[str, Any]:
    line: dict[str, Any] = {"name": storage.name(index), "sha256": "", "bytes": 0, "width": 0, "height": 0}
    try:
        data = read_sample(storage, index)
        line |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        line["height"], line["width"] = image_size(data)
        decode(data)
    except UnusableError as error:
        return line | {"problem": str(error)}
    return line | {"problem": None}


def _summary(split: str, storage: Storage, lines: list[dict[str, Any]]) -> str:
    size = sum(line["bytes"] for line in lines)
    good = sum(line["problem"] is None for line in lines)
    return f"{split}: {good} of {len(lines)} images are good, {len(storage.classes)} classes, {size / 1e6:.1f} MB"
