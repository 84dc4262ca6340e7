"""MM-Vet and LLaVA-Bench (in the wild): free answers that a language model judges elsewhere.

The questions are asked and the answers written in the format that the official judge reads; there is no score here.

Native files: mm-vet.json {"v1_0": {"imagename", "question"}} and questions.jsonl {"question_id", "image", "text",
"category"}; the images are in images/. Or the hub's parquet files {"question_id", "question", "image"}: test-* of MM-Vet,
train-* of LLaVA-Bench.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NoReturn

from vlm_jax.benchmarks import files, question_file, records
from vlm_jax.benchmarks.records import ImageSource, Question, RawRecord
from vlm_jax.files import Path
from vlm_jax.settings.checks import ConfigError

IMAGES = "images"


def rows_mmvet(path: str | Path) -> list[Question]:
    """Ids "v1_<number>"; only the question is asked, as LLaVA does."""
    found = files.find("mmvet", path, "mm-vet.json", *files.shards("test"))
    hub = found[0].suffix == ".parquet"
    made = [
        _hub_row(record) if hub else _row(record, record.name(), "imagename", "question")
        for record in files.read("mmvet", found)
    ]
    return records.distinct(made, f"mmvet: {path}")


def rows_llava_bench(path: str | Path) -> list[Question]:
    """Ids are question_id; only the question is asked."""
    found = files.find("llava_bench", path, "questions.jsonl", *files.shards("train"))
    hub = found[0].suffix == ".parquet"
    made = [
        _hub_row(record) if hub else _row(record, record.text("question_id"), "image", "text")
        for record in files.read("llava_bench", found)
    ]
    return records.distinct(made, f"llava_bench: {path}")


def _row(record: RawRecord, name: str, image: str, question: str) -> Question:
    text = record.text(question)
    return _made(name, record.image(image, folder=IMAGES), text)


def _hub_row(record: RawRecord) -> Question:
    name, text = record.text("question_id"), record.text("question")
    return _made(name, record.image("image"), text)


def _made(name: str, image: ImageSource, text: str) -> Question:
    return records.row(name, image, text, None, question=text, llava_id=name.removeprefix("v1_"))


def submission_mmvet(rows: Sequence[Question], texts: Sequence[str]) -> dict[str, str | bytes]:
    """{id: answer}, which mm-vet_evaluator.ipynb and the judge on the hub take."""
    answers = {row["id"]: text for row, text in zip(rows, texts, strict=True)}
    return {"mm-vet_answers.json": json.dumps(answers, indent=1)}


def submission_llava_bench(
    rows: Sequence[Question], texts: Sequence[str]
) -> dict[str, str | bytes]:
    """Lines {"question_id", "prompt", "text", ...}, which LLaVA's eval_gpt_review_bench.py takes."""
    lines = [
        question_file.answer_line(records.native_id(row["id"]), row["question"], text, row["id"])
        for row, text in zip(rows, texts, strict=True)
    ]
    return {"answers.jsonl": "".join(lines)}


def score(text: str, row: Question) -> NoReturn:
    raise ConfigError(
        "mmvet and llava_bench are judged by a language model elsewhere: no score here."
    )


def reduce(scores: Sequence[float], rows: Sequence[Question]) -> NoReturn:
    score("", {})
