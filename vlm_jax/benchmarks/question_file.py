"""LLaVA's question files: asked without changes; the answers are written as LLaVA's answer file, for other scripts to score.

File: one {"question_id", "image"?, "text"} per line; the text is the whole prompt. Images are relative to the file's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from vlm_jax.benchmarks import files, records
from vlm_jax.benchmarks.records import Question
from vlm_jax.files import Path


def rows(annotations: str | Path) -> list[Question]:
    """Ids are question_id, and "<question_id>#1", "#2" where it occurs again (that of MME and TextVQA is the image's)."""
    path = files.find_one("llava_questions", annotations, "*.jsonl")
    found, times = [], {}
    for record in files.read_lines("llava_questions", path):
        name, text = record.text("question_id"), record.text("text")
        image = record.image("image") if record.has("image") else None
        count = times[name] = times.get(name, -1) + 1
        more = {"question_id": record.values["question_id"], "prompt": text, "llava_id": name}
        found.append(records.row(f"{name}#{count}" if count else name, image, text, None, **more))
    return records.distinct(found, f"llava_questions: {path}")


def submission(rows: Sequence[Question], texts: Sequence[str]) -> dict[str, str | bytes]:
    """answers.jsonl, one line per question in the order of the questions, with the keys that LLaVA writes."""
    lines = [
        answer_line(row["question_id"], row["prompt"], text, row["id"])
        for row, text in zip(rows, texts, strict=True)
    ]
    return {"answers.jsonl": "".join(lines)}


def answer_line(question_id: int | str, prompt: str, text: str, answer_id: str) -> str:
    """One line of an answer file, with the keys that LLaVA's model_vqa.py writes."""
    line = {
        "question_id": question_id, "prompt": prompt, "text": text, "answer_id": answer_id, "model_id": "vlm_jax",
        "metadata": {},
    }  # fmt: skip
    return json.dumps(line) + "\n"
