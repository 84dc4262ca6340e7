"""MathVista testmini without a language model as a judge.

Native files: testmini.json {pid: problem} with "image" as its path, or the hub's testmini-*.parquet. The official
scoring first lets GPT-4 extract the answer from the text. Here the whole text is the answer: deterministic, and a lower bound
for a model that answers in sentences.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence

from rapidfuzz.distance import Levenshtein

from vlm_jax.benchmarks import files, metrics, prompts, records
from vlm_jax.benchmarks.records import Question, RawRecord
from vlm_jax.files import Path

FILES = ("testmini.json", *files.shards("testmini"), "data/testmini.json")
CHOICE, FREE = "multi_choice", "free_form"
# lupantech/MathVista, evaluation/build_query.py: what "query" holds in the hub's files.
HINT = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
HINTS = {
    "integer": "an integer answer and provide the final value, e.g., 1, 2, 3",
    "float1": "a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4",
    "float2": "a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45",
    "list": "a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]",
}


def rows(path: str | Path) -> list[Question]:
    """Ids are MathVista's pid. The question is the file's own "query", or built as MathVista builds it."""
    found = files.read("mathvista", files.find("mathvista", path, *FILES))
    return records.distinct([_row(record) for record in found], f"mathvista: {path}")


def _row(record: RawRecord) -> Question:
    kind, answer_type = record.text("question_type"), record.text("answer_type")
    if kind not in (CHOICE, FREE):
        raise record.fault(f"'question_type' must be {CHOICE} or {FREE}, got {kind!r:.60}")
    choices = record.texts("choices") if kind == CHOICE else []
    if kind == CHOICE and not choices:
        raise record.fault("'choices' is empty")
    precision = record.field("precision") if answer_type == "float" else 0
    if not isinstance(precision, (int, float)) or math.isinf(precision):
        raise record.fault(f"'precision' must be a number, got {precision!r:.60}")
    query = record.optional("query") or _query(record, choices, answer_type, int(precision))
    query = query.strip()  # as in MathVista's data/query.json: five of testmini's end in a blank
    answer = record.text("answer").strip() if record.has("answer") else ""  # none in the test split
    metadata, options = record.part("metadata"), prompts.lettered(choices)
    return records.row(
        record.text("pid") if record.has("pid") else record.name(),
        record.image("decoded_image", "image"),
        query,
        answer or None,
        options=options,
        **({"replies": tuple(options)} if options else {}),
        answer_type=answer_type,
        precision=int(precision),
        parts=[str(metadata[field]) for field in ("task", "context") if field in metadata],
    )


def _query(record: RawRecord, choices: Sequence[str], answer_type: str, precision: int) -> str:
    hint = HINT
    if not choices:
        key = f"float{precision}" if answer_type == "float" else answer_type
        if key not in HINTS:
            raise record.fault(f"has no 'query', and there is no hint for answer_type {key!r:.60}")
        hint = f"Hint: Please answer the question requiring {HINTS[key]}, at the end."
    unit = record.optional("unit")
    lines = [hint, f"Question: {record.text('question')}" + (f" (Unit: {unit})" if unit else "")]
    options = [f"({letter}) {choice}" for letter, choice in prompts.lettered(choices).items()]
    return "\n".join([*lines, *(["Choices:", *options] if options else [])])


def normalise(text: str, row: Question) -> str | None:
    """The answer as MathVista compares it; None when the question asks for a number and the text is none.

    With options: the option of the first "(B)" in the text, or of a text that is just "B"; else the option with the smallest
    edit distance, of equals the first. A letter always means the option with that letter, even if the text of another option
    is that letter. An integer is truncated, not rounded; a float is rounded to the question's precision. Source:
    lupantech/MathVista, evaluation/calculate_score.py.
    # Differs from it: precision is 1.0 in its files, which its round() refuses, so that each float would be wrong.
    """
    text = text.strip()
    if row["options"]:
        return _option(text, row["options"])
    try:
        if row["answer_type"] == "integer":
            return str(int(float(text)))
        if row["answer_type"] == "float":
            return str(round(float(text), row["precision"]))
    except (ValueError, OverflowError):  # no number, or an infinite one
        return None
    return text


def _option(text: str, options: Mapping[str, str]) -> str:
    letters = re.findall(r"\(([a-zA-Z])\)", text)
    letter = letters[0].upper() if letters else text
    if letter in options:
        return options[letter]
    return min(options.values(), key=lambda choice: Levenshtein.distance(letter, choice))


def score(text: str, row: Question) -> float:
    """1.0 if the normalised answer equals the gold one as text."""
    said = normalise(text, row)
    return float(said is not None and said.strip() == row["answer"])


reduce = functools.partial(metrics.mean_by_parts, lambda row: row["parts"])
