"""Writes the shards that `shards` reads: LLaVA JSON and its pictures, from a disk or a bucket, to a directory on either."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax import files
from vlm_jax.data import sources
from vlm_jax.data.records import BadRecord
from vlm_jax.data.shards import BAD, BLOCK, FORMAT, HEADER, INDEX, PreparedSource, beside, pack
from vlm_jax.settings.checks import ConfigError

OPTIONS = "group_size:1,uncompressed"
HEAD = 32  # bytes by which a record is looked for in what was written
AHEAD = 64  # pictures that are read at once while a shard is written


def write_shard(out: str, name: str, source: Any, first: int, last: int, made_from: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """Writes the records [first, last) of a sources.JsonSource as one shard, unless it is there; returns its entry.

    Pictures are read by threads and decoded once, so that a damaged one is a bad record now and not in training.
    """
    place = files.to_path(out)
    done = place / beside(name, ".json")
    if done.is_file() and (known := files.read_json(done)).get("made_from") == made_from:
        return known
    from array_record.python import array_record_module

    bad: list[dict[str, str]] = []
    sizes: list[tuple[int, int]] = []
    packed: list[tuple[int, int]] = []  # bytes and checksum
    heads: list[bytes] = []
    with files.whole_file(place / name) as local:
        writer = array_record_module.ArrayRecordWriter(str(local), OPTIONS)
        for item in _read_ahead(source, first, last):
            if isinstance(item, BadRecord):
                bad.append({"file": item.file, "record": item.record_id, "reason": item.reason})
                continue
            data, words, images = item
            writer.write(data)
            packed.append((len(data), zlib.crc32(data)))
            heads.append(data[:HEAD])
            sizes.append((words, images))
        writer.close()
        content = local.read_bytes()
        starts = _starts(content, packed, heads, name)
    rows = [(at, *entry, *size) for at, entry, size in zip(starts, packed, sizes, strict=True)]
    table = io.BytesIO()
    np.save(table, np.array(rows, np.int64).reshape(-1, 5))
    files.write_whole(place / beside(name, ".spans.npy"), table.getvalue())
    entry = {
        "file": name, "records": len(rows), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        "bad": bad, "made_from": made_from,
    }  # fmt: skip
    files.write_whole(done, json.dumps(entry) + "\n")
    return entry


def _starts(
    content: bytes, packed: Sequence[tuple[int, int]], heads: Sequence[bytes], name: str
) -> list[int]:
    """Where each record begins, without the blocks' headers. Raises ConfigError when its bytes do not follow each other."""
    stream = b"".join(content[i + HEADER : i + BLOCK] for i in range(0, len(content), BLOCK))
    found, at = [], 0
    for (size, crc), head in zip(packed, heads, strict=True):
        at = stream.find(head, at)  # a chunk's header and its sizes come before a record
        while at >= 0 and zlib.crc32(memoryview(stream)[at : at + size]) != crc:
            at = stream.find(head, at + 1)
        if at < 0:
            raise ConfigError(
                f"data: {name}: array_record stores records in another way than expected; report it."
            )
        found.append(at)
        at += size
    return found


def _read_ahead(source: Any, first: int, last: int) -> Iterator[tuple[bytes, int, int] | BadRecord]:
    with ThreadPoolExecutor(16) as pool:
        for start in range(first, last, AHEAD):
            yield from pool.map(lambda i: _packed(source, i), range(start, min(start + AHEAD, last)))  # fmt: skip


def _packed(source: Any, index: int) -> tuple[bytes, int, int] | BadRecord:
    try:
        record, raw = source[index], source.raw(index)
        pictures = []
        for image in record.images:
            try:
                if isinstance(image, str):
                    image = files.read_bytes(os.path.join(record.root, image))
                picture = image() if callable(image) else image
                with Image.open(io.BytesIO(picture)) as opened:
                    opened.load()
            except (
                Exception
            ) as error:  # Pillow's plugins raise whatever a damaged file makes them raise
                reason = (
                    getattr(error, "strerror", None) or f"{type(error).__name__}: {error!s:.200}"
                )
                return record.bad(f"its picture cannot be used: {reason}")
            pictures.append(picture)
        words = sum(len(t.question.split()) + len((t.answer or "").split()) for t in record.turns)
        return pack(raw, pictures), words, len(pictures)
    except BadRecord as error:
        return error


def prepare_part(
    out: str, annotations: Sequence[str], image_roots: Sequence[str], number: int, count: int, digests: Sequence[str]
) -> dict[str, Any]:  # fmt: skip
    """Shard `number` of `count`, in any process; returns its entry. digests: of the annotation files, in which it is checked
    whether a shard that is there was made from the same records."""
    source = sources.of_json(annotations, image_roots)
    files.to_path(out).mkdir(parents=True, exist_ok=True)
    first, last = (len(source) * i // count for i in (number, number + 1))
    made_from = {"format": FORMAT, "sha256": list(digests), "first": first, "last": last}
    name = f"part-{number:05d}-of-{count:05d}.array_record"
    return write_shard(out, name, source, first, last, made_from)


def finish(out: str, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes bad.jsonl and index.json, which makes the directory usable; returns the latter."""
    place = files.to_path(out)
    bad = [one for entry in entries for one in entry["bad"]]
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in bad)
    files.write_whole(place / BAD, lines)
    shards = [{k: e[k] for k in ("file", "records", "bytes", "sha256")} for e in entries]
    index = {"format": FORMAT, "records": sum(s["records"] for s in shards), "bad": len(bad), "shards": shards}  # fmt: skip
    files.write_whole(place / INDEX, json.dumps(index, indent=1) + "\n")
    return index


def verify(path: str) -> int:
    """Reads all shards and compares their checksums; the number of records. Raises ConfigError for the first that differs."""
    source = PreparedSource(path)
    for shard in files.read_json(os.path.join(path, INDEX))["shards"]:
        place = files.to_path(path) / shard["file"]
        with files.reading(place):
            content = place.read_bytes()
        if hashlib.sha256(content).hexdigest() != shard["sha256"]:
            raise ConfigError(f"data: {place} is damaged: its checksum is another; delete {beside(place.name, '.json')} beside it and prepare again.")  # fmt: skip
    return len(source)
