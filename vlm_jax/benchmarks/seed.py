"""SEED-Bench, the questions about images (dimensions 1 to 9): four options.

Native files: SEED-Bench.json {"question_type": {name: id}, "questions": [...]} with the images in SEED-Bench-image/, or
the hub's test-*.parquet with the same fields. Questions about videos are left out.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence

from vlm_jax.benchmarks import files, metrics, prompts, records
from vlm_jax.benchmarks.records import Question, RawRecord
from vlm_jax.files import Path

FILES = ("SEED-Bench.json", *files.shards("test"))
IMAGES = "SEED-Bench-image"
OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")


def rows(path: str | Path) -> list[Question]:
    """Ids are SEED-Bench's question_id, and "<question_id>#1" where it occurs again: version 1 has one id for two questions."""
    found = files.find("seed", path, *FILES)
    names = _dimensions(found[0]) if found[0].suffix == ".json" else {}
    made = [
        _row(record, names)
        for record in files.read("seed", found, inside="questions")
        if record.text("data_type") == "image"
    ]
    times: Counter[str] = Counter()
    for row in made:
        if times[row["llava_id"]]:
            row["id"] = f"{row['llava_id']}#{times[row['llava_id']]}"
        times[row["llava_id"]] += 1
    return records.distinct(made, f"seed: {path}")


def _dimensions(file: Path) -> dict[str, str]:
    """question_type_id -> name, from the head of the JSON file."""
    named = files.head("seed", file).part("question_type")
    return {str(number): name for name, number in named.items()}


def _row(record: RawRecord, names: Mapping[str, str]) -> Question:
    answer, dimension = record.text("answer"), record.text("question_type_id")
    options = [record.text(name) for name in OPTIONS]
    letters = tuple(prompts.lettered(options))
    if answer not in letters:
        raise record.fault(f"'answer' must be one of {', '.join(letters)}, got {answer!r:.60}")
    text = prompts.with_options(record.text("question"), options) + prompts.LETTER
    hub = record.has("image")
    image = record.image("image") if hub else record.image("data_id", folder=IMAGES)
    number = record.text("question_id")
    more = {"replies": letters, "dimension": names.get(dimension, dimension), "llava_id": number}
    return records.row(number, image, text, answer, **more)


def score(text: str, row: Question) -> float:
    """1.0 if the first character is the right letter, in either case, as lmms-eval reads it.

    # Differs from haotian-liu/LLaVA: there the whole answer must be the letter ("A." is wrong).
    """
    return float(text.strip()[:1].lower() == row["answer"].lower())


def submission(rows: Sequence[Question], texts: Sequence[str]) -> dict[str, str | bytes]:
    """Lines {"question_id", "prediction"}, as LLaVA's convert_seed_for_submission.py writes; images alone."""
    lines = [
        json.dumps({"question_id": row["llava_id"], "prediction": text}) + "\n"
        for row, text in zip(rows, texts, strict=True)
    ]
    return {"seed_submission.jsonl": "".join(lines)}


reduce = functools.partial(metrics.mean_by, "dimension")
