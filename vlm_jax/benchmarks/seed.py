"""SEED-Bench, the questions about images (dimensions 1 to 9): four options.

Native files: SEED-Bench.json {"question_type": {name: id}, "questions": [...]} with the images in SEED-Bench-image/, or
the hub's test-*.parquet with the same fields. Questions about videos are left out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.benchmarks import metrics, native, prompts, tabular
from vlm_jax.config import ConfigError

FILES = ("SEED-Bench.json", "test-*.parquet", "data/test-*.parquet")
IMAGES = "SEED-Bench-image"
OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")

Row = dict[str, Any]


def rows(path: str | Path) -> list[Row]:
    """Ids are SEED-Bench's question_id."""
    (file, *more) = tabular.find("seed", path, FILES)
    located = [
        pair for one in (file, *more) for pair in tabular.read("seed", one, (), inside="questions")
    ]
    images = [pair for pair in located if tabular.text(pair, "data_type") == "image"]
    names = _dimensions(file) if file.suffix == ".json" else {}
    return native.distinct([_row(pair, names) for pair in images], Path(path))


def _dimensions(file: Path) -> dict[str, str]:
    """question_type_id -> name, from the head of the JSON file."""
    head = json.loads(file.read_text(encoding="utf-8"))
    named = isinstance(head, dict) and isinstance(head.get("question_type"), dict)
    return {str(i): name for name, i in head["question_type"].items()} if named else {}


def _row(located: tabular.Located, names: Mapping[str, str]) -> Row:
    where, record = located
    answer = tabular.text(located, "answer")
    if answer not in ("A", "B", "C", "D"):
        raise ConfigError(f"{where}: 'answer' must be one of A, B, C, D, got {answer!r:.60}.")
    options = [tabular.text(located, name) for name in OPTIONS]
    text = prompts.with_options(tabular.text(located, "question"), options) + prompts.LETTER
    dimension = tabular.text(located, "question_type_id")
    if isinstance(record.get("image"), list):  # the hub's files: a list of one
        image = tabular.image((where, {"image": (record["image"] or [None])[0]}), "image")
    else:
        image = tabular.image(located, "data_id", folder=IMAGES)
    return {
        "id": tabular.text(located, "question_id"),
        "image": image,
        "conversations": prompts.ask(text),
        "answer": answer,
        "replies": tuple(prompts.lettered(options)),
        "dimension": names.get(dimension, dimension),
    }


def score(text: str, row: Row) -> float:
    """1.0 if the first character is the right letter, as lmms-eval reads it.

    # Differs from haotian-liu/LLaVA: there the whole answer must be the letter ("A." is wrong).
    """
    return float(text.strip()[:1] == row["answer"])


reduce = functools.partial(metrics.mean_by, "dimension")
