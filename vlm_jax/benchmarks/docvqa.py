"""DocVQA and InfographicVQA: average normalised Levenshtein similarity (ANLS), as their server's script computes it.

Native files: {"data": [{"questionId", "question", "image" or "image_local_name", "answers"}]}, validation before test;
or the hub's parquet with the same fields. The test files have no answers: the server at rrc.cvc.uab.es scores them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from vlm_jax.benchmarks import files, prompts, records
from vlm_jax.benchmarks.records import Question, RawRecord
from vlm_jax.files import Path

DOCVQA = (
    "val_v1.0*.json", "test_v1.0*.json", "validation-*.parquet", "DocVQA/validation-*.parquet", "test-*.parquet",
    "DocVQA/test-*.parquet",
)  # fmt: skip
INFOVQA = (
    "info*VQA_val_v1.0*.json", "info*VQA_test_v1.0*.json", "validation-*.parquet", "InfographicVQA/validation-*.parquet",
    "test-*.parquet", "InfographicVQA/test-*.parquet",
)  # fmt: skip
INFOVQA_IMAGES = "infographicsvqa_images"  # the folder of the official archive
THRESHOLD = 0.5  # a similarity below it is 0: arXiv 1907.00490, section 4


def rows(path: str | Path) -> list[Question]:
    """DocVQA: val_v1.0*.json, or test_v1.0*.json where there is no validation file. Ids are questionId."""
    return _rows("docvqa", path, DOCVQA)


def rows_info(path: str | Path) -> list[Question]:
    """InfographicVQA: info*VQA_val_v1.0*.json, or the test file where there is no validation file."""
    return _rows("infovqa", path, INFOVQA)


def _rows(name: str, path: str | Path, patterns: Sequence[str]) -> list[Question]:
    found = files.find(name, path, *patterns)
    if found[0].suffix == ".json":
        found = [files.only(name, path, found)]
    made = [_row(record) for record in files.read(name, found, inside="data")]
    return records.distinct(made, f"{name}: {path}")


def _row(record: RawRecord) -> Question:
    answers = record.texts("answers") if record.has("answers") else None
    if answers == []:
        raise record.fault("'answers' is empty")
    folder = "" if record.has("image") else INFOVQA_IMAGES
    image = record.image("image", "image_local_name", folder=folder)
    question = record.text("question") + prompts.SHORT
    return records.row(record.text("questionId"), image, question, answers)


def anls(text: str, golds: Sequence[str]) -> float:
    """The largest similarity with a gold answer, 0 if it is below 0.5. Source: the evaluation script of rrc.cvc.uab.es.

    The edit distance of the lower-case texts, with runs of white space as one blank, is divided by the length of the longer
    original text in upper case, where "ß" has two characters. A similarity of exactly 0.5 is kept; the paper drops it.
    """
    best = 1.0 - min(_distance(text, gold) for gold in golds)
    return best if best >= THRESHOLD else 0.0


def _distance(text: str, gold: str) -> float:
    """Edits per character; 0 for two empty texts."""
    length = max(len(text.upper()), len(gold.upper()))
    return Levenshtein.distance(_plain(text), _plain(gold)) / length if length else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def score(text: str, row: Question) -> float:
    return anls(text, row["answer"])


def submission_docvqa(rows: Sequence[Question], texts: Sequence[str]) -> dict[str, str | bytes]:
    """The JSON list that the server takes: [{"questionId", "answer"}]."""
    return {"docvqa_submission.json": _upload(rows, texts)}


def submission_infovqa(rows: Sequence[Question], texts: Sequence[str]) -> dict[str, str | bytes]:
    """The JSON list that the server takes: [{"questionId", "answer"}]."""
    return {"infovqa_submission.json": _upload(rows, texts)}


def _upload(rows: Sequence[Question], texts: Sequence[str]) -> str:
    answers = [
        {"questionId": records.native_id(row["id"]), "answer": text}
        for row, text in zip(rows, texts, strict=True)
    ]
    return json.dumps(answers)
