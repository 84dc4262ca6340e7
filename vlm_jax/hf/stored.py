"""The tensors of one safetensors file: of a disk by the library, of a bucket by byte ranges, so that only what is asked for travels."""

from __future__ import annotations

import functools
import json
import math

import ml_dtypes  # noqa: F401 (teaches NumPy bfloat16, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open

from vlm_jax.files import BucketPath, Path

MOST_HEADER = 100_000_000  # bytes, safetensors' own limit
BYTES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (safetensors' name of the dtype, shape). Raises SafetensorError or OSError for a damaged file."""
    if isinstance(file, BucketPath):
        return {name: (kind, shape) for name, (kind, shape, _) in _spans(file).items()}
    found = {}
    with safe_open(file, framework="np") as content:
        for name in content.keys():  # noqa: SIM118 (no mapping)
            part = content.get_slice(name)
            found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def read(file: Path, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
    """One tensor, or the rows [first, last) of it. The file is closed again, so that none of its pages stay in memory."""
    if isinstance(file, BucketPath):
        kind, shape, start = _spans(file)[name]
        dtype = np.dtype(BYTES[kind])
        size = math.prod(shape[1:]) * dtype.itemsize
        first, last = rows if rows is not None else (0, shape[0] if shape else 1)
        data = file.read_range(start + first * size, start + last * size)
        if len(data) != (last - first) * size:
            raise OSError(0, f"{name} is cut short", str(file))
        return np.frombuffer(data, dtype).reshape((last - first, *shape[1:]) if shape else ())
    with safe_open(file, framework="np") as content:
        if rows is None:
            return content.get_tensor(name)
        return content.get_slice(name)[rows[0] : rows[1]]


def _spans(file: BucketPath) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """name -> (dtype, shape, first byte in the file)."""
    return _parsed(file, *file.stamp())


@functools.lru_cache(64)
def _parsed(
    file: BucketPath, changed: str, size: int
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    del changed  # a file that was written again is read again
    length = int.from_bytes(file.read_range(0, 8), "little") if size >= 8 else 0
    if not 0 < length <= min(MOST_HEADER, size - 8):
        raise SafetensorError(f"a header of {length} bytes in {size}")
    found = {}
    try:
        told = json.loads(file.read_range(8, 8 + length))
        for name, entry in told.items():
            if name == "__metadata__":
                continue
            kind, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, end = (8 + length + int(n) for n in entry["data_offsets"])
            width = np.dtype(BYTES[kind]).itemsize if kind in BYTES else 0
            if min(shape, default=0) < 0 or start < 8 + length or end > size:
                raise ValueError(f"{name} lies outside the file")
            if width and end - start != math.prod(shape) * width:
                raise ValueError(f"{name} has another size than its shape")
            found[name] = (kind, shape, start)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SafetensorError(f"a header that is none: {error!r:.200}") from None
    return found
