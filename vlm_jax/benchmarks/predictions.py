"""predictions.jsonl: one {"id", "text"} per line, appended while a model answers, paired with rows when scored.

An evaluation adds "asked", the fingerprint of the question, and on request "question" and "gold"; scoring reads none of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlm_jax import files
from vlm_jax.files import Path, to_path
from vlm_jax.settings.checks import ConfigError

Answer = tuple[str, str]  # id, text


def read(path: str | Path) -> list[Answer]:
    """Every line, in order. Raises ConfigError with file and line number for one that is not an answer."""
    return [answer(where, line) for where, line in read_lines(path)]


def read_lines(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(file and line number, object) of every line that is not blank. Raises ConfigError for one that is no JSON object."""
    path = to_path(path)
    if not path.is_file():
        raise ConfigError(f"predictions: {path} does not exist; give a predictions.jsonl.")
    try:
        lines = files.read_grown(path).split(b"\n")
    except OSError as error:
        raise ConfigError(f"predictions: {path} cannot be read: {error.strerror}.") from error
    places = [(f"{path}:{i}", line) for i, line in enumerate(lines, start=1) if line.strip()]
    return [(where, _parse(line, where)) for where, line in places]


def resume(path: Path) -> list[Answer]:
    """The answers of an interrupted run. An incomplete last line (without a newline) is removed from the file."""
    if not path.exists():
        return []
    if isinstance(path, files.BucketPath):  # an object is never incomplete
        return read(path)
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return read(path)


def append(
    into: Path | files.Lines,
    answers: Iterable[Answer],
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Appends the answers to a predictions.jsonl, open or not, in one write that ends with a newline.

    A kill leaves at most one incomplete line. beside: further fields of a line, by id.
    """
    more = beside or {}
    records = [{"id": i, "text": text, **more.get(i, {})} for i, text in answers]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if isinstance(into, files.Lines):
        into.write(text)
        into.flush()
        return
    with files.Lines(into) as lines:
        lines.write(text)


def pair(
    rows: Sequence[dict[str, Any]], answers: Sequence[Answer], allow_missing: bool = False
) -> list[tuple[dict[str, Any], str]]:
    """(row, text) in the order of rows. Unknown and repeated ids, and missing ones unless allowed, raise ConfigError
    with their counts."""
    texts = dict(answers)
    known = {row["id"] for row in rows}
    unknown = [i for i in texts if i not in known]
    repeated = [i for i, count in Counter(i for i, _ in answers).items() if count > 1]
    missing = [row["id"] for row in rows if row["id"] not in texts]
    faults = {
        "missing": [] if allow_missing else missing,
        "duplicate": repeated,
        "unknown": unknown,
    }
    if any(faults.values()):
        counts = ", ".join(
            f"{len(ids)} {kind} (first {ids[0]!r})" for kind, ids in faults.items() if ids
        )
        raise ConfigError(
            f"predictions: {counts} for {len(rows)} questions; one line per question is needed"
            " (--allow-missing scores those that are there)."
        )
    paired = [(row, texts[row["id"]]) for row in rows if row["id"] in texts]
    if not paired:
        raise ConfigError(
            f"predictions: none of the {len(rows)} questions is answered; nothing to score."
        )
    return paired


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"predictions: {where} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"predictions: {where} must be an object, got {value!r:.80}.")
    return value


def answer(where: str, line: dict[str, Any]) -> Answer:
    """The answer of one line. Raises ConfigError for a line that is not {"id": str, "text": str}."""
    if not all(isinstance(line.get(k), str) for k in ("id", "text")):
        raise ConfigError(
            f'predictions: {where} must be {{"id": str, "text": str}}, got {line!r:.80}.'
        )
    return line["id"], line["text"]
