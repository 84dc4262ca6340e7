"""POPE: is this object in the picture? Yes or no, in three splits; the score is the mean F1 of the splits.

Files: coco_pope_{random,popular,adversarial}.json, one {"question_id", "image", "text", "label"} per line; the images of
COCO in val2014/, in the same folder or in the one above. Or the hub's
parquet files test-*.parquet {"question_id", "question", "answer", "category", "image"}.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_jax.benchmarks import native, prompts
from vlm_jax.benchmarks.native import Row
from vlm_jax.config import ConfigError

SPLITS = ("random", "popular", "adversarial")
_FILE = re.compile(r"coco_pope_(random|popular|adversarial)\.json")


def rows(annotations: str | Path) -> list[Row]:
    """Ids "<split>/<question_id>". A directory must hold all three splits; a file alone is one split."""
    path = Path(annotations)
    files = [path] if path.is_file() else [path / f"coco_pope_{split}.json" for split in SPLITS]
    shards = native.shards(path, "test")
    if shards and not any(file.is_file() for file in files if file not in shards):
        return _hub_rows(shards)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"pope: {path} holds no {', '.join(missing)}; add it or name a file.")
    return [row for file in files for row in _file_rows(file)]


def _file_rows(path: Path) -> list[Row]:
    named = _FILE.fullmatch(path.name)
    if not named:
        names = ", ".join(f"coco_pope_{split}.json" for split in SPLITS)
        raise ConfigError(f"pope: {path} is not one of {names}.")
    images = native.folder(path.parent, "val2014", "../val2014")
    found = []
    for number, record in enumerate(native.read_lines(path)):
        where = f"{path} record {number}"
        image = f"{images}/{native.field(record, 'image', str, where)}"
        question = native.field(record, "text", str, where)
        label = native.field(record, "label", str, where)
        question_id = native.field(record, "question_id", (int, str), where)
        found.append(_row(where, named[1], question_id, image, question, label))
    return native.distinct(found, path)


def _hub_rows(shards: Sequence[Path]) -> list[Row]:
    found = []
    for where, record in native.read_shards(shards):
        split, question, label = (
            native.field(record, key, str, where) for key in ("category", "question", "answer")
        )
        if split not in SPLITS:
            raise ConfigError(f"annotations: {where}: 'category' {split!r} is not in {SPLITS}.")
        question_id = native.field(record, "question_id", (int, str), where)
        found.append(_row(where, split, question_id, record["image"], question, label))
    return native.distinct(found, shards[0].parent)


def _row(
    where: str, split: str, question_id: int | str, image: str | bytes, question: str, label: str
) -> Row:
    if label not in ("yes", "no"):
        raise ConfigError(f"annotations: {where}: the label must be yes or no, got {label!r}.")
    row_id = f"{split}/{question_id}"
    question += prompts.SHORT
    return native.row(row_id, image, question, label, replies=prompts.YES_NO, split=split)


def parse(text: str) -> str:
    """ "no" if the first sentence holds the word No, no or not, else "yes". Source: LLaVA's eval_pope.py."""
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score(text: str, row: Row) -> float:
    return float(parse(text) == row["answer"])


def reduce(scores: Sequence[float], rows: Sequence[Row]) -> dict[str, Any]:
    """The mean F1 of the splits that were asked; "yes" is positive and yes_ratio is that of the predictions.

    A ratio without cases (no prediction is yes, no label is yes) is 0.
    """
    details: dict[str, float] = {}
    f1 = []
    for split in SPLITS:
        labels = [
            (right, row["answer"])
            for right, row in zip(scores, rows, strict=True)
            if row["split"] == split
        ]
        if not labels:
            continue
        hits = labels.count((1.0, "yes"))
        false_alarms = labels.count((0.0, "no"))
        misses = labels.count((0.0, "yes"))
        precision = hits / max(1, hits + false_alarms)
        recall = hits / max(1, hits + misses)
        # 2PR / (P + R) with the fractions cleared; 0 without hits.
        f1.append(2 * hits / max(1, 2 * hits + false_alarms + misses))
        details |= {
            f"{split}.accuracy": sum(right for right, _ in labels) / len(labels),
            f"{split}.f1": f1[-1],
            f"{split}.precision": precision,
            f"{split}.recall": recall,
            f"{split}.yes_ratio": (hits + false_alarms) / len(labels),
        }
    score = sum(f1) / len(f1)
    return {"score": score, "error": 1.0 - score, "n": len(rows), "details": details}
