"""Annotation files as random-access sequences of checked records: LLaVA JSON, JSON lines, prepared tfds directories.

A source holds a path and byte offsets, never an open file, so it travels to worker processes; each of them opens the
file when it reads its first record. Nothing is held in memory but 16 bytes per record.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlm_jax import files
from vlm_jax.data import fields, shards, tokenizer
from vlm_jax.data.records import GPT, HUMAN, IMAGE, BadRecord, Record, parse
from vlm_jax.files import Path, to_path
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import DataConfig

log = logging.getLogger(__name__)
TFDS_FILES = ("dataset_info.json", "features.json")
EXAMINED = 256  # records examined for fields that are not read
_SPACE = re.compile(r"[ \t\r\n]*")


@runtime_checkable
class Source(Protocol):
    """One annotation file: picklable, and indexable by any thread; indexing raises BadRecord for a bad record."""

    path: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def raw(self, index: int) -> Any: ...


class JsonSource:
    """Records of a .json list or of a .jsonl file; blank lines are skipped.

    Raises BadRecord on opening if a .json file is not a well-formed list, because the records after the error cannot be
    located; a bad line of a .jsonl file raises it only when it is read.
    """

    def __init__(self, path: str, root: str, ignored: tuple[str, ...] = ()):
        self.path, self.root, self.ignored = path, root, ignored
        self.lines = path.endswith(".jsonl")
        self.local = str(_local(path))
        self.spans = _spans(self.local, *files.stamp(self.local))  # int64 [N 2] bytes

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Record:
        raw = self.raw(index)
        # Only records without an id need a name, and the name in a .jsonl file costs reading all lines before it.
        named = isinstance(raw, dict) and isinstance(raw.get("id"), (str, int, float))
        name = "" if named else self._name(index)
        return parse(raw, self.path, self.root, name, ignored=self.ignored)

    def raw(self, index: int) -> Any:
        """The record as it is written."""
        start, end = self.spans[index].tolist()
        try:
            return json.loads(files.read_span(self.local, start, end))
        except OSError as error:
            raise BadRecord(self.path, f"#{index}", f"cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise BadRecord(self.path, self._name(index), f"cannot be parsed: {error}") from None

    def _name(self, index: int) -> str:
        """The name of a record without an id: its index, or its line."""
        if not self.lines:
            return f"#{index}"
        start = int(self.spans[index, 0])
        return f"line {1 + files.read_span(self.local, 0, start).count(10)}"


@functools.lru_cache(16)
def _spans(path: str, changed: int | str, size: int) -> np.ndarray:
    """Byte spans of a file's records; a file is scanned once per process (1.5 s for 100 MB) as long as it is unchanged."""
    del changed, size
    try:
        data = files.read_bytes(path)
    except OSError as error:
        raise ConfigError(f"data: {path}: cannot be read: {error.strerror}.") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise ConfigError(f"data: {path}: is UTF-16 or UTF-32; save it as UTF-8.")
    return _line_spans(data) if path.endswith(".jsonl") else _list_spans(data, path)


def _local(path: str) -> Path:
    with files.reading(to_path(path)):
        return files.local_file(path)


def _line_spans(data: bytes) -> np.ndarray:
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10)
    ends = np.append(ends, len(data))
    starts = np.append(0, ends[:-1] + 1)
    lines = enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
    keep = [i for i, (a, b) in lines if data[a:b].strip()]
    return np.stack([starts[keep], ends[keep]], axis=1).astype(np.int64)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # the pattern also matches the empty string
    return found.end()


def _list_spans(data: bytes, path: str) -> np.ndarray:
    """Byte spans of the elements of a JSON list.

    The text is decoded as latin-1, where each byte is one character, so that character offsets are byte offsets. JSON's
    syntax is ASCII and is read correctly; the contents of strings are not used here.
    """
    text = data.decode("latin-1")
    scan = json.JSONDecoder().raw_decode
    spans: list[tuple[int, int]] = []

    def fail(at: int, reason: str) -> BadRecord:
        return BadRecord(path, f"#{len(spans)} (line {1 + text.count(chr(10), 0, at)})", reason)

    at = _after_space(text, 3 if data.startswith(b"\xef\xbb\xbf") else 0)
    if text[at : at + 1] != "[":
        raise fail(
            at, "expected a JSON list of records; name files with one record per line .jsonl"
        )
    at = _after_space(text, at + 1)
    while text[at : at + 1] != "]":
        if spans:
            if text[at : at + 1] != ",":
                raise fail(at, "cannot be parsed: expected ',' or ']' (is the file cut short?)")
            at = _after_space(text, at + 1)
        try:
            _, end = scan(text, at)
        except json.JSONDecodeError as error:
            raise fail(error.pos, f"cannot be parsed: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # an absurd number, or absurd nesting
            raise fail(at, f"cannot be parsed: {error}") from None
        spans.append((at, end))
        at = _after_space(text, end)
    return np.array(spans, np.int64).reshape(-1, 2)


class TfdsSource:
    """A prepared tfds directory in array_record format, read without TensorFlow; images stay encoded bytes.

    Features: {"conversations", optional "id" and "image"} as in LLaVA, or {"question", "answer", optional "image"}.
    """

    def __init__(self, path: str, root: str, split: str = "train", ignored: tuple[str, ...] = ()):
        self.path, self.root, self.split, self.ignored = path, root, split, ignored
        self._records: Sequence[dict] | None = None
        import tensorflow_datasets as tfds  # half a second; only for those who use it

        try:
            builder = tfds.builder_from_directory(path)
            names = set(builder.info.features)
            splits, form = dict(builder.info.splits), builder.info.file_format.value
        except Exception as error:  # a damaged dataset_info.json or features.json raises any type
            raise ConfigError(
                f"data: {path} cannot be read as a tfds dataset: {_one_line(error)}; build it again."
            ) from None
        self.pictures = [name for name in ("image", "images") if name in names]
        self.is_dialogue = bool(names & {"conversations", "messages"})
        if not self.is_dialogue and not {"question", "answer"} <= names:
            raise ConfigError(
                f"data: {path}: features {sorted(names)} are neither image + conversations nor image + question + answer."
            )
        if split not in splits:
            raise ConfigError(f"data: {path}: no split {split!r}; it has {sorted(splits)}.")
        if form != "array_record":
            raise ConfigError(
                f"data: {path} is in {form} format; build it with --file_format=array_record."
            )
        self.length = int(splits[split].num_examples)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_records": None}

    def __len__(self) -> int:
        return self.length

    def _open(self) -> Any:  # a sequence of dicts
        import tensorflow_datasets as tfds

        class Encoded(tfds.decode.SkipDecoding):
            def decode_batch_example_np(self, examples: Any) -> Any:  # of a sequence of images
                return examples

        decoders = {name: Encoded() for name in self.pictures} or None
        builder: Any = tfds.builder_from_directory(self.path)  # its decorators hide its types
        return builder.as_data_source(self.split, decoders=decoders)

    def __getitem__(self, index: int) -> Record:
        return parse(self.raw(index), self.path, "", f"#{index}", ignored=self.ignored)

    def raw(self, index: int) -> dict[str, Any]:
        """The record as LLaVA writes it, its pictures as encoded bytes."""
        try:
            if self._records is None:
                self._records = self._open()
            raw = dict(self._records[index])
            raw.update({k: _text(v) for k, v in raw.items() if k not in self.pictures})
            for name in {"conversations", "messages"} & raw.keys():
                raw[name] = _rows(raw[name])
        except (
            Exception
        ) as error:  # a missing or damaged shard, or bytes that are no UTF-8: any type
            raise BadRecord(self.path, f"#{index}", f"cannot be read: {_one_line(error)}") from None
        raw.update({k: list(raw[k]) for k in self.pictures if isinstance(raw[k], np.ndarray)})
        if not self.is_dialogue:
            images = len(raw["images"]) if "images" in self.pictures else len(self.pictures)
            asked = raw["question"]  # None in a shard that was cut short
            raw["conversations"] = [
                {"from": HUMAN, "value": asked and f"{IMAGE}\n" * images + asked},
                {"from": GPT, "value": raw["answer"]},
            ]
        return raw


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _text(value: Any) -> Any:
    """tfds gives text as bytes, alone or in (nested) lists, arrays and dicts."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_text(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _rows(value: Any) -> Any:
    """A sequence of dicts that tfds stored as a dict of sequences, as rows again."""
    if not isinstance(value, dict):
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


class Concatenated:
    """Sources one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self.ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Record:
        source, own = self._find(index)
        return source[own]

    def raw(self, index: int) -> Any:
        source, own = self._find(index)
        return source.raw(own)

    def _find(self, index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self.ends, index, side="right"))
        return self.sources[which], index - (int(self.ends[which - 1]) if which else 0)


def open_source(cfg: DataConfig) -> Concatenated:
    """All annotations of a config, in order. Raises ConfigError for missing, unreadable or empty ones."""
    check_paths(cfg)
    source = Concatenated([
        _open(path, root, cfg)
        for path, root in zip(cfg.annotations, cfg.image_roots, strict=True)
    ])  # fmt: skip
    if not len(source):
        raise ConfigError(
            f"data: {', '.join(cfg.annotations)}: no record; give annotations with at least one."
        )
    return source


def _open(path: str, root: str, cfg: DataConfig) -> Source:
    if not files.is_dir(path):
        return JsonSource(path, root, cfg.ignored_fields)
    if shards.is_prepared(path):
        return shards.PreparedSource(path, bool(cfg.features_dir), cfg.ignored_fields)
    if not isinstance(to_path(path), files.BucketPath):
        return TfdsSource(path, root, ignored=cfg.ignored_fields)
    raise ConfigError(
        f"data: {path!r}: a tfds dataset cannot be read from a bucket; mount it (gcsfuse), or prepare its JSON with "
        "scripts/prepare_data.py."
    )


def of_json(annotations: Sequence[str], image_roots: Sequence[str]) -> Concatenated:
    """The records of .json and .jsonl files, in order. Raises ConfigError."""
    return Concatenated([JsonSource(*pair) for pair in zip(annotations, image_roots, strict=True)])


def log_unread_fields(source: Concatenated) -> None:
    """Logs one line per file: the fields of its first records that are not read because they change nothing."""
    for part in source.sources:
        found: dict[str, None] = {}
        with ThreadPoolExecutor(16) as pool:  # of a bucket each record is a request
            for names in pool.map(functools.partial(_field_names, part), range(min(len(part), EXAMINED))):  # fmt: skip
                found |= dict.fromkeys(name for name in names if name not in fields.RECORD)
        if found:
            log.info("%s: fields that are not read: %s", part.path, ", ".join(found))


def _field_names(part: Source, index: int) -> list[str]:
    try:
        raw, _ = part.raw(index), part[index]
    except BadRecord:
        return []  # training reports or counts it when it reads the record
    return list(raw)


def check_paths(cfg: DataConfig) -> None:
    """Raises ConfigError for the first missing annotation, image folder, tokenizer or feature cache; reads no record."""
    for path, root in zip(cfg.annotations, cfg.image_roots, strict=True):
        if files.is_dir(path):
            known = (*TFDS_FILES, shards.INDEX)
            if not any(files.is_file(os.path.join(path, name)) for name in known):
                raise ConfigError(
                    f"data: directory {path!r} is no prepared tfds dataset (no {TFDS_FILES[0]}) and no output of "
                    f"scripts/prepare_data.py that is finished (no {shards.INDEX}); give the folder that holds one."
                )
        elif not files.is_file(path):
            raise ConfigError(
                f"data: annotations {path!r} does not exist; give a .json, .jsonl or tfds directory."
            )
        elif not path.endswith((".json", ".jsonl")):
            raise ConfigError(f"data: annotations {path!r} must end in .json or .jsonl.")
        if root and not files.is_dir(root):
            raise ConfigError(
                f"data: image_roots {root!r} (of {path!r}) does not exist; give the images' folder."
            )
    if cfg.tokenizer:  # making a feature cache needs none; make_chat raises where one is needed
        tokenizer.check_directory(cfg.tokenizer)
    if cfg.features_dir:
        for name in ("index.json", "last.npy"):
            if not files.is_file(os.path.join(cfg.features_dir, name)):
                raise ConfigError(
                    f"data: features_dir {cfg.features_dir!r} holds no {name}; write the cache first (python -m "
                    "vlm_jax.features)."
                )


def check_image_roots(owner: str, roots: Sequence[str]) -> None:
    """Raises ConfigError for the first folder that does not exist; "" names none."""
    for path in filter(None, roots):
        fix = "give the folder that the records' image paths start from"
        check_exists(f"{owner}: image_roots", path, fix, folder=True)


def check_exists(owner: str, path: str, fix: str, folder: bool = False) -> None:
    """Raises ConfigError when there is no such file, or folder."""
    if not (to_path(path).is_dir() if folder else to_path(path).exists()):
        several = (
            "; several are written as \"('A','B')\"" if "," in path or path[:1] in "[(" else ""
        )
        raise ConfigError(f"{owner} {path!r} does not exist; {fix}{several}.")
