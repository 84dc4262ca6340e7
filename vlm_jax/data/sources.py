"""Annotation files as random-access sequences of checked records: LLaVA JSON, JSON lines, prepared tfds directories.

A source holds a path and byte offsets, never an open file, so it travels to worker processes; each of them opens the
file when it reads its first record. Nothing is held in memory but 16 bytes per record.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlm_jax.config import ConfigError
from vlm_jax.data import tokenizer
from vlm_jax.run_config import DataConfig

IMAGE = "<image>"
# A path, an encoded image, or what reads one when it is called.
Image = str | bytes | Callable[[], bytes]
HUMAN, GPT, SYSTEM = "human", "gpt", "system"
TFDS_FILES = ("dataset_info.json", "features.json")
_SPACE = re.compile(r"[ \t\r\n]*")


class BadRecord(ConfigError):
    """A record that cannot be used: which file, which record (its id, index or line), and why."""

    def __init__(self, file: str, record_id: str, reason: str):
        super().__init__(f"data: {file}: record {record_id}: {reason}")
        self.file, self.record_id, self.reason = file, record_id, reason

    def __reduce__(self):
        return type(self), (self.file, self.record_id, self.reason)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question with `images` pictures before it, and its answer (None: to be generated)."""

    images: int
    question: str
    answer: str | None


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation. images: paths are relative to root. system: its own system prompt, if any."""

    file: str
    id: str
    root: str
    images: tuple[Image, ...]
    system: str | None
    turns: tuple[Turn, ...]

    def bad(self, reason: str) -> BadRecord:
        return BadRecord(self.file, self.id, reason)


@runtime_checkable
class Source(Protocol):
    """What `open_source` gives: picklable, indexable by any thread; a bad record raises BadRecord."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def parse(raw: Any, file: str, root: str, fallback_id: str, generate: bool = False) -> Record:
    """A LLaVA record as a Record, or BadRecord.

    A leading gpt turn is dropped, as LLaVA does; an optional system message comes first; then human and gpt alternate,
    ending with gpt, or with human if `generate`.
    """
    if not isinstance(raw, dict):
        raise BadRecord(file, fallback_id, f"expected an object, got {type(raw).__name__}")
    record_id = str(raw["id"]) if "id" in raw else fallback_id
    if "conversations" not in raw or not isinstance(raw["conversations"], list):
        raise BadRecord(file, record_id, "has no list 'conversations'")
    try:
        images = _images(raw)
        system, messages = _messages(raw["conversations"])
        turns = _turns(messages, generate)
    except ValueError as error:
        raise BadRecord(file, record_id, str(error)) from None
    placeholders = sum(turn.images for turn in turns)
    if placeholders != len(images):
        raise BadRecord(
            file,
            record_id,
            f"{placeholders} {IMAGE} placeholders in human turns but {len(images)} images",
        )
    if images and not root and any(isinstance(image, str) for image in images):
        raise BadRecord(file, record_id, "names an image, but its image_roots entry is empty")
    return Record(file, record_id, root, images, system, turns)


def _images(raw: dict) -> tuple[Image, ...]:
    if "image" not in raw or raw["image"] is None:
        return ()
    value = raw["image"]
    images = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if any(not (isinstance(image, (str, bytes)) or callable(image)) for image in images):
        raise ValueError("'image' must be a path or a list of paths")
    return images


def _messages(conversations: list) -> tuple[str | None, list[tuple[str, str]]]:
    """The system prompt and the (role, text) pairs from the first human turn on."""
    messages = []
    for number, message in enumerate(conversations):
        if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
            raise ValueError(f"message {number} needs 'from' and 'value'")
        role, text = message["from"], message["value"]
        if not isinstance(text, str):
            raise ValueError(f"message {number}: 'value' must be a string")
        if role not in (HUMAN, GPT) and not (role == SYSTEM and number == 0):
            raise ValueError(
                f"message {number} is from {role!r}; expected {HUMAN!r} or {GPT!r} (or a first {SYSTEM!r})"
            )
        messages.append((role, text))
    system = messages.pop(0)[1] if messages and messages[0][0] == SYSTEM else None
    if messages and messages[0][0] == GPT:
        messages = messages[1:]
    return system, messages


def _turns(messages: list[tuple[str, str]], generate: bool) -> tuple[Turn, ...]:
    if not messages:
        raise ValueError("has no human turn")
    for number, (role, _) in enumerate(messages):
        if role != (HUMAN, GPT)[number % 2]:
            raise ValueError(
                f"two turns in a row are from {role!r}; {HUMAN!r} and {GPT!r} must alternate"
            )
    if generate != (messages[-1][0] == HUMAN):
        raise ValueError(
            f"the last turn is from {messages[-1][0]!r}; expected {HUMAN if generate else GPT!r}"
        )
    turns = []
    for i in range(0, len(messages), 2):
        answer = messages[i + 1][1] if i + 1 < len(messages) else None
        turns.append(_turn(messages[i][1], answer, i // 2))
    return tuple(turns)


def _turn(question: str, answer: str | None, number: int) -> Turn:
    """Placeholders are counted and taken out of the question: they stand before it.

    # Differs from haotian-liu/LLaVA@c121f04 preprocess_multimodal: there two placeholders of a turn collapse into one,
    # which shifts the images of all later rows of the batch.
    """
    images = question.count(IMAGE)
    if images:
        question = question.replace(IMAGE, "").strip()
    elif not question.strip():
        raise ValueError(f"question {number} is empty and has no image")
    if answer is not None:
        if not answer.strip():
            raise ValueError(f"answer {number} is empty")
        if IMAGE in answer:
            raise ValueError(f"answer {number} contains {IMAGE}, which only a question may")
        answer = answer.lstrip()  # the template writes the space or newline before an answer
    return Turn(images, question, answer)


class JsonSource:
    """Records of a .json list or of a .jsonl file; blank lines are skipped.

    Raises BadRecord at once if the .json file is not a well-formed list (nothing after the error can be found);
    a bad line of a .jsonl file is bad only when it is read.
    """

    def __init__(self, path: str, root: str):
        self.path, self.root = path, root
        stat = os.stat(path)
        self.lines = path.endswith(".jsonl")
        self.spans = _spans(path, stat.st_mtime_ns, stat.st_size)  # int64 [N 2] bytes

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Record:
        start, end = self.spans[index].tolist()
        try:  # read and not mapped: a file cut short under a mapping kills the process (SIGBUS)
            with open(self.path, "rb", buffering=0) as file:  # 10 us; nothing for threads to share
                raw = json.loads(os.pread(file.fileno(), end - start, start))
        except (ValueError, RecursionError) as error:
            raise BadRecord(self.path, self._name(index), f"cannot be parsed: {error}") from None
        return parse(raw, self.path, self.root, self._name(index))

    def _name(self, index: int) -> str:
        """Where a record without id stands."""
        if not self.lines:
            return f"#{index}"
        start = int(self.spans[index, 0])
        with open(self.path, "rb") as file:
            return f"line {1 + file.read(start).count(10)}"


@functools.lru_cache(16)
def _spans(path: str, mtime_ns: int, size: int) -> np.ndarray:
    """Byte spans of a file's records; a file is scanned once per process (1.5 s for 100 MB) as long as it is unchanged."""
    del mtime_ns, size
    with open(path, "rb") as file:
        data = file.read()
    return _line_spans(data) if path.endswith(".jsonl") else _list_spans(data, path)


def _line_spans(data: bytes) -> np.ndarray:
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10)
    ends = np.append(ends, len(data))
    starts = np.append(0, ends[:-1] + 1)
    lines = enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
    keep = [i for i, (a, b) in lines if data[a:b].strip()]
    return np.stack([starts[keep], ends[keep]], axis=1).astype(np.int64)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # no space at all matches, too
    return found.end()


def _list_spans(data: bytes, path: str) -> np.ndarray:
    """Byte spans of the elements of a JSON list.

    Decoded as latin-1 a character is a byte, and JSON's own characters are ASCII: offsets are exact, strings are not.
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

    def __init__(self, path: str, root: str, split: str = "train"):
        self.path, self.root, self.split = path, root, split
        self._records: Sequence[dict] | None = None
        import tensorflow_datasets as tfds  # half a second; only for those who use it

        builder = tfds.builder_from_directory(path)
        names = set(builder.info.features)
        self.has_image = "image" in names
        self.is_dialogue = "conversations" in names
        if not self.is_dialogue and not {"question", "answer"} <= names:
            raise ConfigError(
                f"data: {path}: features {sorted(names)} are neither image + conversations nor image + question + answer."
            )
        if split not in builder.info.splits:
            raise ConfigError(
                f"data: {path}: no split {split!r}; it has {sorted(builder.info.splits)}."
            )
        if builder.info.file_format.value != "array_record":
            raise ConfigError(
                f"data: {path} is in {builder.info.file_format.value} format; build it with --file_format=array_record."
            )
        self.length = int(builder.info.splits[split].num_examples)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_records": None}

    def __len__(self) -> int:
        return self.length

    def _open(self) -> Sequence[dict]:
        import tensorflow_datasets as tfds

        decoders = {"image": tfds.decode.SkipDecoding()} if self.has_image else None
        builder: Any = tfds.builder_from_directory(self.path)  # its decorators hide its types
        return builder.as_data_source(self.split, decoders=decoders)

    def __getitem__(self, index: int) -> Record:
        if self._records is None:
            self._records = self._open()
        raw = dict(self._records[index])
        raw.update({key: _text(value) for key, value in raw.items() if key != "image"})
        if self.is_dialogue:
            raw["conversations"] = _rows(raw["conversations"])
        else:
            question = f"{IMAGE}\n{raw['question']}" if self.has_image else raw["question"]
            raw["conversations"] = [
                {"from": HUMAN, "value": question},
                {"from": GPT, "value": raw["answer"]},
            ]
        return parse(raw, self.path, "", f"#{index}")


def _text(value: Any) -> Any:
    """tfds gives text as bytes, alone or in (nested) lists, arrays and dicts."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_text(item) for item in value]
    return value


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
        which = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[which - 1]) if which else 0
        return self.sources[which][index - start]


def open_source(cfg: DataConfig) -> Concatenated:
    """All annotations of a config, in order. Raises ConfigError for missing, unreadable or empty ones."""
    check_paths(cfg)
    sources = [
        TfdsSource(path, root) if os.path.isdir(path) else JsonSource(path, root)
        for path, root in zip(cfg.annotations, cfg.image_roots, strict=True)
    ]
    source = Concatenated(sources)
    if not len(source):
        raise ConfigError(
            f"data: {', '.join(cfg.annotations)}: no record; give annotations with at least one."
        )
    return source


def check_paths(cfg: DataConfig) -> None:
    """Raises ConfigError for the first missing annotation, image folder, tokenizer or feature cache. Only looks at names."""
    for path, root in zip(cfg.annotations, cfg.image_roots, strict=True):
        if os.path.isdir(path):
            if not any(os.path.isfile(os.path.join(path, name)) for name in TFDS_FILES):
                raise ConfigError(
                    f"data: directory {path!r} is no prepared tfds dataset (no {TFDS_FILES[0]}); give its version folder."
                )
        elif not os.path.isfile(path):
            raise ConfigError(
                f"data: annotations {path!r} does not exist; give a .json, .jsonl or tfds directory."
            )
        elif not path.endswith((".json", ".jsonl")):
            raise ConfigError(f"data: annotations {path!r} must end in .json or .jsonl.")
        if root and not os.path.isdir(root):
            raise ConfigError(
                f"data: image_roots {root!r} (of {path!r}) does not exist; give the images' folder."
            )
    if cfg.tokenizer:  # a cache of features is made without one; make_chat says when it is missed
        tokenizer.check_directory(cfg.tokenizer)
    if cfg.features_dir:
        for name in ("index.json", "last.npy"):
            if not os.path.isfile(os.path.join(cfg.features_dir, name)):
                raise ConfigError(
                    f"data: features_dir {cfg.features_dir!r} holds no {name}; write the cache first (python -m "
                    "vlm_jax.features)."
                )
