"""Any LLaVA-format annotation as a benchmark: each answered turn is asked with the gold dialogue before it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from vlm_jax.benchmarks import files, records
from vlm_jax.benchmarks.records import Question, RawRecord, shown
from vlm_jax.files import Path, to_path


def rows(annotations: str | Path) -> list[Question]:
    """Rows with ids "<record id>/<turn>", turns counted from 0.

    annotations: a .json or .jsonl file, or a directory that holds exactly one; image paths are relative to the
    directory. Of a record whose last question has no answer, the turns before it are asked. An answer that is null is hidden.
    """
    path = files.find_one("llava", annotations, "*.json", "*.jsonl")
    return [
        _row(record, turn, messages[: end + 1], messages[end + 1]["value"])
        for record in read_records("llava", path)
        for messages in [record["conversations"]]
        for turn, end in enumerate(_answered(messages))
    ]


def rows_asked_alone(directory: str | Path, file: str) -> list[Question]:
    """Each answered turn of `file` on its own: the images, then the question, no dialogue before it."""
    rows = []
    for record in read_records("miniature", to_path(directory) / file):
        messages = record["conversations"]
        system = [m for m in messages[:1] if m["from"] == "system"]
        images = sum(m["value"].count("<image>") for m in messages)
        for turn, end in enumerate(_answered(messages)):
            question = "<image>\n" * images + messages[end]["value"].replace("<image>", "").strip()
            asked = [*system, {"from": "human", "value": question}]
            rows.append(_row(record, turn, asked, messages[end + 1]["value"]))
    return rows


def read_records(name: str, path: Path) -> list[Question]:
    """LLaVA records {"id", "image"?, "conversations"}; ids are unique strings (a missing one is its index). "messages" with
    "role" and "content" are renamed to LLaVA's words.

    Raises ConfigError for a missing or unparsable file and for a record without a dialogue.
    """
    found = []
    for number, record in enumerate(files.read(name, [path])):
        record.values["conversations"] = _renamed(record.field("conversations", "messages"))
        _check(record)
        row_id = record.text("id") if record.has("id") else str(number)
        found.append({**record.values, "id": row_id})
    return records.distinct(found, f"{name}: {path}")


def _check(record: RawRecord) -> None:
    messages = record.field("conversations")
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and {"from", "value"} <= set(message) for message in messages
    ):
        raise record.fault("'conversations' must be a list of messages with 'from' and 'value'")
    for number, message in enumerate(messages):
        value, hidden = message["value"], number == len(messages) - 1 and message["from"] == "gpt"
        if isinstance(value, list) and all(isinstance(part, dict) for part in value):
            continue  # a list of parts, which data.records checks when the question is laid out
        if not isinstance(value, str) and not (value is None and hidden):
            reason = f"'value' must be a string, got {shown(value)}"
            raise record.fault(f"message {number} of 'conversations': {reason}")
        record.unicode("value", value or "")
    if not list(_answered(messages)):
        raise record.fault("has no human message followed by a gpt message")


def _answered(messages: list[dict[str, Any]]) -> Iterator[int]:
    """Indices of the human messages that a gpt message follows."""
    for i, (message, reply) in enumerate(itertools.pairwise(messages)):
        if message["from"] == "human" and reply["from"] == "gpt":
            yield i


def _renamed(messages: Any) -> Any:
    """Messages in LLaVA's words."""
    if not isinstance(messages, list):
        return messages
    names = {"user": "human", "assistant": "gpt"}
    return [
        {"from": names.get(str(message["role"]), message["role"]), "value": message["content"]}
        | {name: value for name, value in message.items() if name not in ("role", "content")}
        if isinstance(message, dict) and {"role", "content"} <= set(message)
        else message
        for message in messages
    ]


def _row(record: Question, turn: int, messages: list[dict[str, Any]], answer: Any) -> Question:
    """One question. The record's other fields are kept, so that data.records can read or refuse them."""
    own = {name: record[name] for name in record if name not in ("messages", "answer", "replies")}
    seen, every = _pictures(messages), _pictures(record["conversations"])
    for name in {"image", "images"} & own.keys():  # of several pictures only those shown so far
        value = own[name]
        if isinstance(value, list) and len(value) == every:
            own[name] = value[:seen]
        elif isinstance(value, str) and (seen, every) == (0, 1):
            own[name] = None
    if isinstance(answer, list):
        answer = "".join(part.get("text") or "" for part in answer if isinstance(part, dict))
    about = {"conversations": messages, "answer": answer, "llava_id": record["id"]}
    return {**own, "id": f"{record['id']}/{turn}", **about}


def _pictures(messages: list[dict[str, Any]]) -> int:
    """How many pictures the messages show, as placeholders or as parts."""
    values = [message["value"] for message in messages]
    parts = [part for value in values if isinstance(value, list) for part in value]
    shown = [part for part in parts if isinstance(part, dict) and part.get("type") == "image"]
    return len(shown) + sum(v.count("<image>") for v in values if isinstance(v, str))
