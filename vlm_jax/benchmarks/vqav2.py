"""VQAv2: the validation split is scored here, the test splits by their server.

Files: v2_OpenEnded_mscoco_<split>_questions.json and, where the gold is public, v2_mscoco_<split>_annotations.json; images
<folder>/COCO_<folder>_<image id, 12 digits>.jpg in val2014/, train2014/ or test2015/ (for test-dev2015, too). Or the hub's
parquet files {"question_id", "question", "image", and, but for test, "answers" x 10, "answer_type"}: validation-* before
testdev-* before test-*.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlm_jax.benchmarks import files, prompts, records, vqa
from vlm_jax.benchmarks.records import Question, RawRecord
from vlm_jax.files import Path
from vlm_jax.settings.checks import ConfigError

# The hub's name of a split -> the challenge's.
HUB = {"validation": "val2014", "testdev": "test-dev2015", "test": "test2015"}
_FILE = re.compile(r"v2_OpenEnded_mscoco_([a-z]+(?:-dev)?\d{4})_questions\.json")


def rows(annotations: str | Path) -> list[Question]:
    """Ids are the question_id. If the directory has several question files, `annotations` must name one."""
    shards = [pattern for split in HUB for pattern in files.shards(split)]
    found = files.find("vqav2", annotations, "v2_OpenEnded_mscoco_*_questions.json", *shards)
    if found[0].suffix == ".parquet":
        split = HUB.get(found[0].name.split("-")[0], "")
        made = [_hub_row(record, split) for record in files.read("vqav2", found)]
        return records.distinct(made, f"vqav2: {found[0]}")
    return _file_rows(files.only("vqav2", annotations, found))


def _hub_row(record: RawRecord, split: str) -> Question:
    gold: dict[str, Any] = {"answer": None}
    if record.has("answers") and record.values["answers"] != []:
        gold = {"answer": vqa.human_answers(record), "answer_type": record.text("answer_type")}
    question_id, question = record.whole("question_id"), record.text("question") + prompts.SHORT
    more = {"question_id": question_id, "split": split}
    return records.row(str(question_id), record.image("image"), question, **gold, **more)


def _file_rows(path: Path) -> list[Question]:
    named = _FILE.fullmatch(path.name)
    if not named:
        raise ConfigError(
            f"vqav2: {path.name!r} is not v2_OpenEnded_mscoco_<split>_questions.json; name one."
        )
    split = named[1]
    coco = split.replace("-dev", "")
    golds = {} if coco.startswith("test") else _golds(path, split)
    found = []
    for record in files.read("vqav2", [path], inside="questions"):
        question_id, image_id = record.whole("question_id"), record.whole("image_id")
        gold: dict[str, Any] = {"answer": None}
        if not coco.startswith("test"):
            if question_id not in golds:
                raise record.fault(f"question {question_id} has no answers")
            gold = golds[question_id]
        image = f"{coco}/COCO_{coco}_{image_id:012d}.jpg"
        more = {"question_id": question_id, "split": split}
        question = record.text("question") + prompts.SHORT
        found.append(records.row(str(question_id), image, question, **gold, **more))
    return records.distinct(found, f"vqav2: {path}")


def _golds(path: Path, split: str) -> dict[int, dict[str, Any]]:
    """question_id -> the ten answers and the answer type."""
    file = path.parent / f"v2_mscoco_{split}_annotations.json"
    return {
        record.whole("question_id"): {
            "answer": vqa.human_answers(record),
            "answer_type": record.text("answer_type"),
        }
        for record in files.read("vqav2", [file], inside="annotations")
    }


def submission(rows: Sequence[Question], texts: Sequence[str]) -> dict[str, str | bytes]:
    """The challenge server's file, [{"question_id", "answer"}] normalised as LLaVA does."""
    name = f"v2_OpenEnded_mscoco_{rows[0]['split']}_vlmjax_results.json"
    return {name: vqa.upload("question_id", rows, "question_id", texts)}
