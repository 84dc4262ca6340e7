"""VizWiz-VQA: pictures by blind people. The validation split is scored here, the test split by its server.

Files: val.json or test.json, a list of {"image", "question", and, but for test, "answers" x 10, "answer_type"}; the images
in a folder of the split's name, val/ or test/. Or the hub's val-*.parquet, before test-*.parquet, {"question_id" (the image's
name without .jpg), "question", "image", and, but for test, "answers" x 10, "category" (the answer type)}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_jax.benchmarks import files, prompts, records, vqa
from vlm_jax.benchmarks.records import Question, RawRecord
from vlm_jax.files import Path

HINT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def rows(annotations: str | Path) -> list[Question]:
    """Ids are the images' file names. With val.json and test.json in the directory, name the one that is meant."""
    shards = (*files.shards("val"), *files.shards("test"))
    found = files.matches("vizwiz", annotations, *shards)
    if not found or found[0].suffix != ".parquet":
        found = [files.find_one("vizwiz", annotations, "val.json", "test.json", *shards)]
    made = [_row(record, found[0].stem) for record in files.read("vizwiz", found)]
    return records.distinct(made, f"vizwiz: {found[0]}")


def _row(record: RawRecord, split: str) -> Question:
    """split: the folder of the images."""
    hub = record.has("question_id")
    name = record.text("question_id").removesuffix(".jpg") + ".jpg" if hub else record.text("image")
    image = record.image("image") if hub else record.image("image", folder=split)
    gold: dict[str, Any] = {"answer": None}
    if record.has("answers") and record.values["answers"] != []:
        kind = record.text("answer_type", "category")
        gold = {"answer": vqa.human_answers(record), "answer_type": kind}
    return records.row(name, image, record.text("question") + HINT + prompts.SHORT, **gold)


def submission(rows: Sequence[Question], texts: Sequence[str]) -> dict[str, str | bytes]:
    """The challenge server's file, [{"image", "answer"}] normalised as LLaVA does."""
    return {"vizwiz_answers.json": vqa.upload("image", rows, "id", texts)}
