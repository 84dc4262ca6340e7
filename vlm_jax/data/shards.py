"""Prepared data: records and their pictures in array_record shards, which scripts/prepare_data.py writes and training reads.

    DIR/index.json                      {"format", "records", "bad", "shards": [{"file", "records", "bytes", "sha256"}, ..]}
    DIR/part-00000-of-00008.array_record   one record each: length of the text (4 bytes), JSON text, the pictures one after another
    DIR/part-00000-of-00008.spans.npy      int64 [N 5]: where a record begins, its bytes, CRC-32, words and pictures
    DIR/part-00000-of-00008.json           what index.json has of it, its bad records, and what it was made from; written last
    DIR/bad.jsonl                       the records that were left out: file, record, reason

Other readers of array_record read the shards as well. Here a record is read by its span, one request, so that a shard may lie
on a disk, a mounted bucket or a bucket, and any record can be the next one: shuffling and resuming are the pipeline's.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int64

from vlm_jax import files
from vlm_jax.data.records import BadRecord, Record, parse
from vlm_jax.settings.checks import ConfigError

FORMAT = 1
INDEX, BAD = "index.json", "bad.jsonl"
# array_record puts a header of HEADER bytes at the beginning of each block of BLOCK bytes, also inside a record. With one
# record per chunk and no compression a record's bytes otherwise follow each other, which the writer checks.
BLOCK, HEADER = 65536, 24


def is_prepared(path: str) -> bool:
    """Whether a directory is prepared data."""
    return files.is_file(os.path.join(path, INDEX))


class PreparedSource:
    """The records of a prepared directory, as sources.Source. Raises ConfigError when it is damaged or not finished."""

    def __init__(self, path: str, with_names: bool = False, ignored: tuple[str, ...] = ()):
        """with_names: pictures are named as in the original data, not read (their features are in a cache)."""
        self.path, self.with_names, self.ignored = path, with_names, ignored
        index = files.read_json(os.path.join(path, INDEX))
        try:
            if index["format"] != FORMAT:
                raise ConfigError(f"data: {path} has format {index['format']}, not {FORMAT}; prepare it again.")  # fmt: skip
            self.names = [str(shard["file"]) for shard in index["shards"]]
            counts = [int(shard["records"]) for shard in index["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"data: {path}/{INDEX} is no index of prepared data; prepare it again.") from None  # fmt: skip
        with ThreadPoolExecutor(16) as pool:
            spans = list(pool.map(self._spans, self.names))
        if [len(part) for part in spans] != counts:
            raise ConfigError(f"data: {path}: {INDEX} and the spans disagree; prepare it again.")
        self.spans = np.concatenate(spans) if spans else np.zeros((0, 5), np.int64)
        self.ends = np.cumsum(counts)

    def _spans(self, name: str) -> Int64[np.ndarray, "N 5"]:
        path = os.path.join(self.path, beside(name, ".spans.npy"))
        try:
            found = np.load(io.BytesIO(files.read_bytes(path)))
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"data: {path} cannot be read ({error}); prepare it again.") from None
        if found.dtype != np.int64 or found.shape[1:] != (5,):
            raise ConfigError(f"data: {path} holds no spans; prepare it again.")
        return found

    def __len__(self) -> int:
        return len(self.spans)

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Words and pictures of every record, [N] each."""
        return self.spans[:, 3], self.spans[:, 4]

    def raw(self, index: int) -> Any:
        """The record as it was written, without its pictures."""
        return self._read(index)[0]

    def __getitem__(self, index: int) -> Record:
        raw, pictures = self._read(index)
        record = parse(raw, self.path, self.path, f"#{index}", ignored=self.ignored)
        if self.with_names or not record.images:
            return record
        return dataclasses.replace(record, images=pictures)

    def _read(self, index: int) -> tuple[Any, tuple[bytes, ...]]:
        start, size, crc = self.spans[index, :3].tolist()
        shard = self.names[int(np.searchsorted(self.ends, index, side="right"))]
        try:
            data = read_record(os.path.join(self.path, shard), start, size)
        except OSError as error:
            raise BadRecord(self.path, f"#{index}", f"{shard} cannot be read: {error.strerror}") from None  # fmt: skip
        if len(data) != size or zlib.crc32(data) != crc:
            raise BadRecord(self.path, f"#{index}", f"{shard} is damaged: its checksum is another")
        return unpack(data)


def read_record(path: str, start: int, size: int) -> bytes:
    """The bytes of a record. start: counted without the blocks' headers. Raises OSError."""
    first, last = _offset(start), _offset(start + size - 1) + 1
    data = files.read_span(path, first, last)
    inside = (first // BLOCK + 1) * BLOCK - first  # the next header
    if inside >= len(data):
        return data
    rest = (data[at + HEADER : at + BLOCK] for at in range(inside, len(data), BLOCK))
    return b"".join((data[:inside], *rest))


def _offset(position: int) -> int:
    """Where a byte lies in the file, by its position without the blocks' headers."""
    return position + HEADER * (position // (BLOCK - HEADER) + 1)


def beside(name: str, suffix: str) -> str:
    return name.removesuffix(".array_record") + suffix


def pack(raw: Any, pictures: Sequence[bytes]) -> bytes:
    """One record's bytes."""
    text = json.dumps([raw, [len(p) for p in pictures]], ensure_ascii=False)
    head = text.encode("utf-8", "surrogatepass")
    return b"".join((len(head).to_bytes(4, "little"), head, *pictures))


def unpack(data: bytes) -> tuple[Any, tuple[bytes, ...]]:
    """(record, pictures): the inverse."""
    at = 4 + int.from_bytes(data[:4], "little")
    raw, sizes = json.loads(data[4:at].decode("utf-8", "surrogatepass"))
    pictures = []
    for size in sizes:
        pictures.append(data[at : at + size])
        at += size
    return raw, tuple(pictures)
