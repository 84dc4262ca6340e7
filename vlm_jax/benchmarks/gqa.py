"""GQA, the balanced testdev questions: exact equality of a word or phrase.

Files: testdev_balanced_questions.json {id: {"imageId", "question", "answer"}}, images/<imageId>.jpg. Or the hub's
testdev_balanced_instructions/testdev-*.parquet {"id", "imageId", "question", "answer"} with their pictures in
testdev_balanced_images/testdev-*.parquet {"id", "image"}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from vlm_jax.benchmarks import files, prompts, records
from vlm_jax.benchmarks.records import ImageSource, Question
from vlm_jax.files import Path

SHARDS = "testdev-*.parquet"
HUB = (f"testdev_balanced_instructions/{SHARDS}", SHARDS)
HUB_IMAGES = "testdev_balanced_images"


def rows(annotations: str | Path) -> list[Question]:
    """Ids are the question ids. The answers of the test splits are hidden."""
    found = files.find("gqa", annotations, "testdev_balanced_questions.json", *HUB)
    hub = found[0].suffix == ".parquet"
    pictures = _hub_images(found[0].parent.parent / HUB_IMAGES) if hub else {}
    made = []
    for record in files.read("gqa", found):
        name, image_id = record.text("id") if hub else record.name(), record.text("imageId")
        if hub and image_id not in pictures:
            raise record.fault(f"there is no image {image_id!r:.60} in {HUB_IMAGES}")
        image = pictures[image_id] if hub else f"images/{image_id}.jpg"
        gold = record.text("answer") if record.has("answer") else None
        made.append(records.row(name, image, record.text("question") + prompts.SHORT, gold))
    return records.distinct(made, f"gqa: {found[0]}")


def _hub_images(folder: Path) -> dict[str, ImageSource]:
    """image id -> picture."""
    found = files.read("gqa", files.find("gqa", folder, SHARDS))
    return {record.text("id"): record.image("image") for record in found}


def clean(text: str) -> str:
    """The text as it is compared: lower case, without periods at the end. Source: LLaVA's convert_gqa_for_eval."""
    return text.strip().rstrip(".").lower()


def score(text: str, row: Question) -> float:
    return float(clean(text) == row["answer"])


def submission(rows: Sequence[Question], texts: Sequence[str]) -> dict[str, str | bytes]:
    """The file that the official eval.py and the challenge server take."""
    answers = [
        {"questionId": row["id"], "prediction": clean(text)}
        for row, text in zip(rows, texts, strict=True)
    ]
    return {"testdev_balanced_predictions.json": json.dumps(answers)}
