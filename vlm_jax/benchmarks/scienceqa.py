"""ScienceQA: school questions with two to five options; the score is that of the questions with a picture.

Files: problems.json {id: {"question", "choices", "answer" (index), "hint", "image"}}, pid_splits.json {"test": [ids]};
images/test/<id>/image.png. Or the hub's test-*.parquet {"question", "choices", "answer", "hint", "image"}, of all questions
(ScienceQA-FULL, read first) or of those with a picture (ScienceQA-IMG).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlm_jax.benchmarks import files, metrics, prompts, records
from vlm_jax.benchmarks.records import ImageSource, Question, RawRecord
from vlm_jax.files import Path
from vlm_jax.settings.checks import ConfigError

LETTERS = "ABCDE"
HUB = (
    "ScienceQA-FULL/test-*.parquet", *files.shards("test"), "ScienceQA-IMG/test-*.parquet",
)  # fmt: skip
_SAID = re.compile(r"The answer is ([A-Z]).")  # the last dot is any character, as in LLaVA's code


def rows(annotations: str | Path) -> list[Question]:
    """The test split in the order of pid_splits.json; ids are the problems' ids. Prompts as lmms-eval writes them.

    The hub's files have no ids; the ids are then row numbers from 0.
    """
    (path, *shards) = files.find("scienceqa", annotations, "problems.json", *HUB)
    if path.suffix == ".parquet":
        made = [
            _row(record, str(number), record.image("image") if record.has("image") else None)
            for number, record in enumerate(files.read("scienceqa", [path, *shards]))
        ]
        return records.distinct(made, f"scienceqa: {path}")
    splits = path.parent / "pid_splits.json"
    problems = {record.name(): record for record in files.read("scienceqa", [path])}
    split = files.head("scienceqa", splits)
    found = []
    for pid in split.texts("test"):
        if pid not in problems:
            raise split.fault(f"problem {pid} is not in {path.name}")
        record, folder = problems[pid], f"images/test/{pid}"
        image = record.image("image", folder=folder) if record.optional("image") else None
        found.append(_row(record, pid, image))
    return records.distinct(found, split.where)


def _row(record: RawRecord, pid: str, image: ImageSource | None) -> Question:
    hint = record.text("hint") if record.has("hint") else ""
    choices = record.texts("choices")
    answer = record.whole("answer")
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise record.fault(f"answer {answer} of {len(choices)} choices; at most {len(LETTERS)}")
    letters = tuple(LETTERS[: len(choices)])
    context = f"Context: {hint}\n" if hint else ""
    asked = context + prompts.with_options(record.text("question"), choices) + prompts.LETTER
    return records.row(pid, image, asked, letters[answer], replies=letters)


def parse(text: str) -> str:
    """The chosen letter, "" if there is none. Source: LLaVA's eval_science_qa.py.

    It is the whole text, or the text starts with it ("B. "), or the text contains "The answer is B." exactly once (any
    character may replace the last period).
    """
    text = text.strip()
    if len(text) == 1 and text in LETTERS:
        return text
    if text[1:3] == ". " and text[0] in LETTERS:
        return text[0]
    said = _SAID.findall(text)
    return said[0] if len(said) == 1 else ""


def score(text: str, row: Question) -> float:
    return float(parse(text) == row["answer"])


def reduce(scores: Sequence[float], rows: Sequence[Question]) -> dict[str, Any]:
    """score: the accuracy of questions with a picture (details "img"); details "all": of all questions."""
    pictured = [(value, row) for value, row in zip(scores, rows, strict=True) if "image" in row]
    if not pictured:
        raise ConfigError(
            f"scienceqa: none of the {len(rows)} questions has a picture; ask more of them (eval.limit)."
        )
    img = metrics.mean(*zip(*pictured, strict=True))
    every = sum(scores) / len(scores)
    details = {"img": img["score"], "all": every, "img.n": len(pictured)}
    return {**img, "n": len(rows), "details": details}
