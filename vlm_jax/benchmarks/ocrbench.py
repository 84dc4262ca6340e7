"""OCRBench: 1,000 questions about text in images; right when a gold answer is part of the answer.

Scored as Yuliang-Liu/MultimodalOCR does, OCRBench/example.py (lmms-eval's copy puts answers in lower case for formulas, too).

Native files: OCRBench.json, a list of {"dataset_name", "type", "question", "answers", "image_path"}, with the images in
OCRBench_Images/; or the hub's test-*.parquet with "dataset", "question_type", "question", "answer", "image".
"""

from __future__ import annotations

import functools

from vlm_jax.benchmarks import files, metrics, records
from vlm_jax.benchmarks.records import Question, RawRecord
from vlm_jax.files import Path

FILES = ("OCRBench.json", *files.shards("test"))
IMAGES = "OCRBench_Images"
FORMULAS = "HME100k"  # handwritten mathematical expressions, compared without blanks but with case


def rows(path: str | Path) -> list[Question]:
    """Ids are row numbers from 0. Only the question is asked, without an instruction."""
    found = files.read("ocrbench", files.find("ocrbench", path, *FILES))
    return records.distinct(
        [_row(r, number) for number, r in enumerate(found)], f"ocrbench: {path}"
    )


def _row(record: RawRecord, number: int) -> Question:
    folder = IMAGES if record.has("image_path") else ""
    return records.row(
        str(number),
        record.image("image_path", "image", folder=folder),
        record.text("question").strip(),
        record.texts("answers", "answer"),
        dataset=record.text("dataset_name", "dataset"),
        type=record.text("type", "question_type"),
    )


def score(text: str, row: Question) -> float:
    """1.0 if the text contains a gold answer, compared in lower case with line breaks as blanks; formulas without blanks."""
    plain = _formula if row["dataset"] == FORMULAS else _plain
    return float(any(plain(gold) in plain(text) for gold in row["answer"]))


def _plain(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


reduce = functools.partial(metrics.mean_by, "type")
