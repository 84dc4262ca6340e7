"""POPE: is this object in the picture? Yes or no, in three splits; the score is the mean F1 of the splits.

Files: coco_pope_{random,popular,adversarial}.json, one {"question_id", "image", "text", "label"} per line; the images of
COCO in val2014/, in the same folder or in the one above. Or the hub's parquet files test-*.parquet {"question_id",
"question", "answer", "category", "image"}.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_jax.benchmarks import files, prompts, records
from vlm_jax.benchmarks.records import Image, Record, Row
from vlm_jax.config import ConfigError

SPLITS = ("random", "popular", "adversarial")
_FILE = re.compile(r"coco_pope_(random|popular|adversarial)\.json")


def rows(annotations: str | Path) -> list[Row]:
    """Ids "<split>/<question_id>". A directory must hold all three splits; a file alone is one split."""
    path = Path(annotations)
    found = files.find("pope", path, "coco_pope_*.json", *files.shards("test"))
    if found[0].suffix == ".parquet":
        made = [_hub_row(record) for record in files.read("pope", found)]
        return records.distinct(made, f"pope: {path}")
    if path.is_dir():
        found = [path / f"coco_pope_{split}.json" for split in SPLITS]
    missing = [file.name for file in found if not file.is_file()]
    if missing:
        raise ConfigError(f"pope: {path} holds no {', '.join(missing)}; add it or name a file.")
    return [row for file in found for row in _file_rows(file)]


def _file_rows(path: Path) -> list[Row]:
    named = _FILE.fullmatch(path.name)
    if not named:
        names = ", ".join(f"coco_pope_{split}.json" for split in SPLITS)
        raise ConfigError(f"pope: {path} is not one of {names}; name one of them.")
    above = not (path.parent / "val2014").is_dir() and (path.parent / "../val2014").is_dir()
    folder = "../val2014" if above else "val2014"
    made = [
        _row(record, named[1], record.image("image", folder=folder), "text", "label")
        for record in files.read_lines("pope", path)
    ]
    return records.distinct(made, f"pope: {path}")


def _hub_row(record: Record) -> Row:
    split = record.text("category")
    if split not in SPLITS:
        raise record.fault(f"'category' must be one of {', '.join(SPLITS)}, got {split!r:.60}")
    return _row(record, split, record.image("image"), "question", "answer")


def _row(record: Record, split: str, image: Image, question: str, label: str) -> Row:
    gold, text = record.text(label), record.text(question) + prompts.SHORT
    if gold not in ("yes", "no"):
        raise record.fault(f"{label!r} must be yes or no, got {gold!r:.60}")
    row_id = f"{split}/{record.text('question_id')}"
    return records.row(row_id, image, text, gold, replies=prompts.YES_NO, split=split)


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
