"""The native files of a benchmark as records: JSON, JSON lines, TSV, and the hub's parquet files.

Text is UTF-8, with or without a byte-order mark. Every error in a file is a ConfigError of one line.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_jax.benchmarks.records import RawRecord, fault, shown
from vlm_jax.files import Path, local_file, to_path
from vlm_jax.settings.checks import ConfigError

Keyed = Iterator[tuple[str | int, Any]]  # a record's name or number, and the record
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")


def shards(split: str) -> tuple[str, str]:
    """The patterns of a split's parquet files, which the hub puts in data/."""
    return f"{split}-*.parquet", f"data/{split}-*.parquet"


def matches(name: str, path: str | Path, *patterns: str) -> list[Path]:
    """`path` itself where it is a file; else the files in it that match the first pattern with a match, by name.

    Raises ConfigError when a shard of a parquet file is missing: a part would be scored as if it were the whole.
    """
    path = to_path(path)
    if path.is_file():
        return [path]
    for pattern in patterns:
        found = sorted(p for p in path.glob(pattern) if p.is_file())
        if found:
            _check_shards(name, found)
            return found
    return []


def _check_shards(name: str, files: Sequence[Path]) -> None:
    """Of <split>-00000-of-00003(-<hash>).parquet, all three must be there."""
    parts = [(SHARD.match(file.name), file) for file in files]
    counts = Counter((file.parent, match[1], match[2]) for match, file in parts if match)
    for (folder, split, total), count in counts.items():
        if count != int(total):
            raise ConfigError(
                f"{name}: {folder} holds {count} of the {int(total)} files {split}-*.parquet; add the others."
            )


def find(name: str, path: str | Path, *patterns: str) -> list[Path]:
    """Like `matches`, but raises ConfigError if there is no match, or if `path` is a file with another suffix."""
    _check_kind(name, to_path(path), patterns)
    found = matches(name, path, *patterns)
    if not found:
        raise ConfigError(
            f"{name}: {path} holds none of {', '.join(patterns)}; give the directory of the benchmark's files."
        )
    return found


def find_one(name: str, path: str | Path, *patterns: str) -> Path:
    """`path` itself where it is a file; else the only file in it that matches any of the patterns.

    Raises ConfigError for several, because only the user knows which one is meant.
    """
    _check_kind(name, to_path(path), patterns)
    every = [file for pattern in patterns for file in matches(name, path, pattern)]
    return only(name, path, every or find(name, path, *patterns))


def _check_kind(name: str, path: Path, patterns: Sequence[str]) -> None:
    """Raises ConfigError for a file whose suffix no pattern has (.json* also matches .jsonl)."""
    kinds = [to_path(pattern.rstrip("*")).suffix for pattern in patterns]
    if path.is_file() and not any(path.suffix.startswith(kind) for kind in kinds):
        raise ConfigError(f"{name}: {path} is not read here; give {' or '.join(patterns)}.")


def only(name: str, path: str | Path, found: Sequence[Path]) -> Path:
    """The only file of `found`, which must not be empty. Raises ConfigError for several."""
    if len(set(found)) > 1:
        names = ", ".join(sorted({file.name for file in found}))
        raise ConfigError(f"{name}: {path} holds {names}; name the file that is meant.")
    return found[0]


def text(name: str, file: Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark."""
    data = _bytes(name, file)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise fault(f"{name}: {file}", f"is not UTF-8: {error.reason} in line {line}") from error


def _bytes(name: str, file: Path, count: int = -1) -> bytes:
    """The first `count` bytes of a file, all for -1. Raises ConfigError for UTF-16, by its byte-order mark."""
    if not file.is_file():
        raise _absent(name, file)
    try:
        with file.open("rb") as opened:
            data = opened.read(count)
    except OSError as error:
        raise ConfigError(f"{name}: {file} cannot be read: {error.strerror}.") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise fault(f"{name}: {file}", "is UTF-16", mend="save it as UTF-8")
    return data


def _absent(name: str, file: Path) -> ConfigError:
    return ConfigError(f"{name}: {file} does not exist; give the directory that holds it.")


def head(name: str, file: Path) -> RawRecord:
    """The object that a JSON file holds."""
    where = f"{name}: {file}"
    value = _parse(text(name, file), where)
    if not isinstance(value, dict):
        raise fault(where, f"must hold an object, not a {type(value).__name__}")
    return RawRecord(where, "", value)


def _parse(written: str, where: str) -> Any:
    try:
        return json.loads(written, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        lines = "; name a file of one record per line .jsonl" if "Extra data" in str(error) else ""
        raise fault(where, f"is not valid JSON: {error}{lines}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if a name occurs twice; json would silently keep the last value."""
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"an object has two values named {twice!r:.60}")
    return value


def read(name: str, files: Sequence[Path], inside: str = "") -> Iterator[RawRecord]:
    """The records of all files. Pictures inside a parquet file stay there as `Embedded`.

    inside: the field of a JSON file's object that holds its records, a list or an object of objects.
    """
    for file in files:
        if not file.is_file():
            raise _absent(name, file)
        if file.suffix not in READERS:
            raise ConfigError(f"{name}: {file} is none of {', '.join(READERS)}; name another file.")
        yield from _records(f"{name}: {file}", READERS[file.suffix](name, file, inside))


def read_lines(name: str, file: Path) -> Iterator[RawRecord]:
    """The records of a file with one JSON object per line, or a list of them, whatever its suffix."""
    listed = text(name, file).lstrip().startswith("[")
    reader = _json if listed else _json_lines
    yield from _records(f"{name}: {file}", reader(name, file, ""))


def _records(where: str, values: Keyed) -> Iterator[RawRecord]:
    for key, value in values:
        if not isinstance(value, dict):
            raise fault(f"{where} row {key}", f"must be an object, got {shown(value)}")
        yield RawRecord(f"{where} row {key}", key if isinstance(key, str) else "", value)


def _json(name: str, file: Path, inside: str) -> Keyed:
    value = (
        head(name, file).field(inside) if inside else _parse(text(name, file), f"{name}: {file}")
    )
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)
    else:
        raise fault(f"{name}: {file}", f"must hold a list, not a {type(value).__name__}")


def _json_lines(name: str, file: Path, inside: str) -> Keyed:
    """Blank lines are skipped."""
    # splitlines would also split at U+2028 inside a string.
    lines = text(name, file).split("\n")
    full = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for row, (number, line) in enumerate(full):
        yield row, _parse(line, f"{name}: {file} line {number}")


def _tsv(name: str, file: Path, inside: str) -> Keyed:
    """Every value is a string; one in quotes may hold line breaks."""
    csv.field_size_limit(sys.maxsize)  # an image in base64 is above the default of 128 kB
    where = f"{name}: {file}"
    _bytes(name, file, 2)
    with local_file(file).open(encoding="utf-8-sig", newline="") as lines:
        pending: list[str] = []  # lines of the current record
        reader = csv.DictReader((pending.append(line) or line for line in lines), delimiter="\t")
        try:
            columns = list(reader.fieldnames or ())
            for column, count in Counter(columns).items():
                if count > 1:
                    raise fault(where, f"has two columns named {column!r:.60}")
            for row, record in enumerate(reader):
                if None in record or None in record.values():
                    raise fault(f"{where} row {row}", f"does not have {len(columns)} columns")
                if _is_open(pending):
                    raise fault(f"{where} row {row}", "has a quote that is not closed")
                pending.clear()
                yield row, record
        except UnicodeDecodeError as error:
            near = f"near line {reader.line_num + 1}"
            raise fault(where, f"is not UTF-8: {error.reason} {near}") from error
        except csv.Error as error:
            raise fault(
                f"{where} line {reader.line_num}", f"is not a valid TSV: {error}"
            ) from error


def _is_open(lines: Sequence[str]) -> bool:
    """Whether a record of several lines ends inside a quote, which would silently swallow the rest of the file."""
    if len(lines) < 2:
        return False
    try:
        list(csv.reader(lines, delimiter="\t", strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _parquet(name: str, file: Path, inside: str) -> Keyed:
    import pyarrow  # takes a third of a second to import, so only for parquet files
    import pyarrow.parquet

    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(local_file(file))
        for group in range(table.num_row_groups):
            at = 0
            for batch in table.iter_batches(batch_size=64, row_groups=[group]):
                for record in batch.to_pylist():
                    cell = functools.partial(Embedded, file, group, at)
                    yield (
                        row,
                        {column: _without_bytes(cell, column, v) for column, v in record.items()},
                    )
                    row, at = row + 1, at + 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        place = f" after row {row - 1}" * (row > 0)
        raise fault(f"{name}: {file}", f"is not valid parquet{place}: {reason}") from error


def _without_bytes(cell: functools.partial[Embedded], column: str, value: Any) -> Any:
    """A value as it is, or a picture (of several the first) as an `Embedded` without its bytes."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict) or set(first) != {"bytes", "path"}:
        return value
    return cell(column) if first["bytes"] else first["path"]


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A picture inside a parquet file; calling it reads the bytes.

    With 1,000 pictures of 300 kB this takes 250 MB of memory instead of 790. The whole row group is read at once: with 100 rows
    per group a picture takes 1 ms in the order of the file and 40 ms in random order.
    """

    file: Path
    group: int  # of rows
    row: int  # in its group
    column: str

    def __call__(self) -> bytes:
        value = _column(self.file, self.group, self.column)[self.row].as_py()
        return (value[0] if isinstance(value, list) else value)["bytes"]


@functools.lru_cache(
    maxsize=2
)  # rows are read nearly in order: the current group and the one before or after it
def _column(file: Path, group: int, column: str) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(local_file(file)).read_row_group(group, columns=[column]).column(0)


READERS = {".json": _json, ".jsonl": _json_lines, ".tsv": _tsv, ".parquet": _parquet}
