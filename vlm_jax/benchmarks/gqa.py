"""GQA, the balanced testdev questions: exact equality of a word or phrase.

Files: testdev_balanced_questions.json {id: {"imageId", "question", "answer"}}, images/<imageId>.jpg.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vlm_jax.benchmarks import files, prompts, records
from vlm_jax.benchmarks.records import Row


def rows(annotations: str | Path) -> list[Row]:
    """Ids are the question ids. The answers of the test splits are hidden."""
    path = files.find_one("gqa", annotations, "testdev_balanced_questions.json")
    found = []
    for record in files.read("gqa", [path]):
        image = f"images/{record.text('imageId')}.jpg"
        question = record.text("question") + prompts.SHORT
        gold = record.text("answer") if record.has("answer") else None
        found.append(records.row(record.name(), image, question, gold))
    return records.distinct(found, f"gqa: {path}")


def clean(text: str) -> str:
    """What is compared: closing periods off, lower case. Source: LLaVA's convert_gqa_for_eval."""
    return text.strip().rstrip(".").lower()


def score(text: str, row: Row) -> float:
    return float(clean(text) == row["answer"])


def submission(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, str | bytes]:
    """The file that the official eval.py and the challenge server take."""
    answers = [
        {"questionId": row["id"], "prediction": clean(text)}
        for row, text in zip(rows, texts, strict=True)
    ]
    return {"testdev_balanced_predictions.json": json.dumps(answers)}
