"""LLaVA's question files: asked as they stand, answered in LLaVA's answer file, scored by whichever script reads that.

File: one {"question_id", "image"?, "text"} per line; the text is the whole prompt. Images are relative to the file's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vlm_jax.benchmarks import files, records
from vlm_jax.benchmarks.records import Question


def rows(annotations: str | Path) -> list[Question]:
    """Ids are question_id, and "<question_id>#1", "#2" where it comes again (MME and TextVQA repeat the image's)."""
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
        json.dumps(
            {
                "question_id": row["question_id"], "prompt": row["prompt"], "text": text, "answer_id": row["id"],
                "model_id": "vlm_jax", "metadata": {},
            }
        )
        + "\n"
        for row, text in zip(rows, texts, strict=True)
    ]  # fmt: skip
    return {"answers.jsonl": "".join(lines)}
