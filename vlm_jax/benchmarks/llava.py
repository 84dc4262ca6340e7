"""Any LLaVA-format annotation as a benchmark: each answered turn is asked with the gold dialogue before it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_jax.config import ConfigError


def rows(annotations: str | Path) -> list[dict[str, Any]]:
    """Rows with ids "<record id>/<turn>", turns counted from 0.

    annotations: a .json or .jsonl file, or a directory that holds exactly one; image paths are relative to the
    directory. A record whose last question has no answer contributes the turns before it.
    """
    path = Path(annotations)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl"))
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise ConfigError(
                f"llava: {path} must hold exactly one .json or .jsonl file, found {names}; name the file itself."
            )
        path = found[0]
    return [
        _row(record, turn, messages[: end + 1], messages[end + 1]["value"])
        for record in read_records(path)
        for messages in [record["conversations"]]
        for turn, end in enumerate(_answered(messages))
    ]


def rows_asked_alone(directory: str | Path, file: str) -> list[dict[str, Any]]:
    """Each answered turn of `file` on its own: the images, then the question, no dialogue before it."""
    rows = []
    for record in read_records(Path(directory) / file):
        messages = record["conversations"]
        system = [m for m in messages[:1] if m["from"] == "system"]
        images = sum(m["value"].count("<image>") for m in messages)
        for turn, end in enumerate(_answered(messages)):
            question = "<image>\n" * images + messages[end]["value"].replace("<image>", "").strip()
            asked = [*system, {"from": "human", "value": question}]
            rows.append(_row(record, turn, asked, messages[end + 1]["value"]))
    return rows


def read_records(path: Path) -> list[dict[str, Any]]:
    """LLaVA records {"id", "image"?, "conversations"}; ids are unique strings (a missing one is its index).

    Raises ConfigError for a missing or unparsable file and for a record without a dialogue.
    """
    if not path.is_file():
        raise ConfigError(
            f"annotations: {path} does not exist; give the directory that holds {path.name}."
        )
    try:
        text = path.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        records = (
            [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text)
        )
    except ValueError as error:
        raise ConfigError(
            f"annotations: {path} is not valid {path.suffix[1:]}: {error}."
        ) from error
    if not isinstance(records, list):
        raise ConfigError(
            f"annotations: {path} holds a {type(records).__name__}, not a list of records."
        )
    seen: set[str] = set()
    for index, record in enumerate(records):
        _check(record, f"{path} record {index}")
        record["id"] = str(record["id"]) if "id" in record else str(index)
        if record["id"] in seen:
            raise ConfigError(
                f"annotations: {path} has two records with id {record['id']!r}; make ids unique."
            )
        seen.add(record["id"])
    return records


def _check(record: Any, where: str) -> None:
    messages = (
        record["conversations"] if isinstance(record, dict) and "conversations" in record else None
    )
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'annotations: {where} has no "conversations" list.')
    for message in messages:
        if not isinstance(message, dict) or not {"from", "value"} <= set(message):
            raise ConfigError(f'annotations: {where} has a message without "from" and "value".')
    if not list(_answered(messages)):
        raise ConfigError(f"annotations: {where} has no human message followed by a gpt message.")


def _answered(messages: list[dict[str, str]]) -> Iterator[int]:
    """Indices of the human messages that a gpt message follows."""
    for i, (message, reply) in enumerate(itertools.pairwise(messages)):
        if message["from"] == "human" and reply["from"] == "gpt":
            yield i


def _row(record: dict, turn: int, messages: list[dict[str, str]], answer: str) -> dict[str, Any]:
    image = {"image": record["image"]} if "image" in record else {}
    return {"id": f"{record['id']}/{turn}", **image, "conversations": messages, "answer": answer}
