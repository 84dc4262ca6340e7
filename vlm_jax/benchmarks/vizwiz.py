"""VizWiz-VQA: pictures by blind people. The validation split is scored here, the test split by its server.

Files: val.json or test.json, a list of {"image", "question", and, but for test, "answers" x 10, "answer_type"}; the images
in a folder of the split's name, val/ or test/.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vlm_jax.benchmarks import files, prompts, records, vqa
from vlm_jax.benchmarks.records import Row

HINT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def rows(annotations: str | Path) -> list[Row]:
    """Ids are the images' file names. With val.json and test.json in the directory, name the one that is meant."""
    path = files.find_one("vizwiz", annotations, "val.json", "test.json")
    found = []
    for record in files.read("vizwiz", [path]):
        image = record.image("image", folder=path.stem)
        question = record.text("question") + HINT + prompts.SHORT
        gold: Row = {"answer": None}
        if record.has("answers"):
            gold = {"answer": vqa.human_answers(record), "answer_type": record.text("answer_type")}
        found.append(records.row(record.text("image"), image, question, **gold))
    return records.distinct(found, f"vizwiz: {path}")


def submission(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, str | bytes]:
    """The challenge server's file, [{"image", "answer"}] normalised as LLaVA does."""
    answers = [
        {"image": row["id"], "answer": vqa.normalise(text)}
        for row, text in zip(rows, texts, strict=True)
    ]
    return {"vizwiz_answers.json": json.dumps(answers)}
