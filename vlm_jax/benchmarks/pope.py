"""POPE: is this object in the picture? Yes or no, in three splits; the score is the mean F1 of the splits.

Files: coco_pope_{random,popular,adversarial}.json, or those that begin with aokvqa_pope_ or gqa_pope_ (also _pope_seem_), with
{"question_id", "image", "text", "label"} one per line or in a list; the images of COCO (also for A-OKVQA) in val2014/, those
of GQA in images/, in the same folder or in the one above. Or the hub's test-*.parquet, or its Full/{adversarial,popular,
random}-*.parquet, {"question_id", "question", "answer", "category", "image"}.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlm_jax.benchmarks import files, prompts, records
from vlm_jax.benchmarks.records import ImageSource, Question, RawRecord
from vlm_jax.files import Path, to_path
from vlm_jax.settings.checks import ConfigError

SPLITS = ("random", "popular", "adversarial")
IMAGES = {"coco": "val2014", "aokvqa": "val2014", "gqa": "images"}  # of the files that begin so
_FILE = re.compile(r"(coco|aokvqa|gqa)_pope(?:_seem)?_(random|popular|adversarial)\.jsonl?")
_JSON = "*_pope_*.json*"
_FULL = [
    pattern for split in SPLITS for pattern in (f"Full/{split}-*.parquet", f"{split}-*.parquet")
]


def rows(annotations: str | Path) -> list[Question]:
    """Ids "<split>/<question_id>". A directory must hold all three splits; a file alone is one split."""
    path = to_path(annotations)
    named = [file for file in path.glob(_JSON) if _FILE.fullmatch(file.name)]
    if named:
        return [row for file in _splits(path, named) for row in _file_rows(file)]
    found = files.find("pope", path, _JSON, *files.shards("test"), *_FULL)
    if found[0].suffix != ".parquet":
        return _file_rows(files.only("pope", path, found))
    if path.is_dir() and found[0].name.split("-")[0] in SPLITS:
        full = (files.find("pope", path, *_FULL[i : i + 2]) for i in range(0, len(_FULL), 2))
        found = [file for files_of_a_split in full for file in files_of_a_split]
    made = [_hub_row(record) for record in files.read("pope", found)]
    return records.distinct(made, f"pope: {path}")


def _splits(path: Path, named: Sequence[Path]) -> list[Path]:
    """The three files of the directory, of one source of images."""
    of = {file: _parts(file) for file in named}
    (source, *others) = sorted({source for source, _ in of.values()})
    if others:
        several = ", ".join([source, *others])
        raise ConfigError(f"pope: {path} holds files of {several}; keep those of one in a folder.")
    found = []
    for split in SPLITS:
        fitting = [file for file, parts in of.items() if parts == (source, split)]
        if not fitting:
            name = f"{source}_pope_{split}.json"
            raise ConfigError(f"pope: {path} holds no {name}; add it or name a file.")
        found.append(files.only("pope", path, fitting))
    return found


def _parts(path: Path) -> tuple[str, str]:
    """Source of the images, and split."""
    named = _FILE.fullmatch(path.name)
    if not named:
        names = ", ".join(f"coco_pope_{split}.json" for split in SPLITS)
        raise ConfigError(f"pope: {path} is not one of {names}; name one of them.")
    return named[1], named[2]


def _file_rows(path: Path) -> list[Question]:
    source, split = _parts(path)
    folder = IMAGES[source]
    if not (path.parent / folder).is_dir() and (path.parent / ".." / folder).is_dir():
        folder = f"../{folder}"
    made = [
        _row(record, split, record.image("image", folder=folder), "text", "label")
        for record in files.read_lines("pope", path)
    ]
    return records.distinct(made, f"pope: {path}")


def _hub_row(record: RawRecord) -> Question:
    split = record.text("category")
    if split not in SPLITS:
        raise record.fault(f"'category' must be one of {', '.join(SPLITS)}, got {split!r:.60}")
    return _row(record, split, record.image("image"), "question", "answer")


def _row(record: RawRecord, split: str, image: ImageSource, question: str, label: str) -> Question:
    gold, text = record.text(label), record.text(question) + prompts.SHORT
    if gold not in ("yes", "no"):
        raise record.fault(f"{label!r} must be yes or no, got {gold!r:.60}")
    number = record.text("question_id")
    more = {"replies": prompts.YES_NO, "split": split, "llava_id": number}
    return records.row(f"{split}/{number}", image, text, gold, **more)


def parse(text: str) -> str:
    """ "no" if the first sentence holds the word No, no or not, else "yes". Source: LLaVA's eval_pope.py.

    White space around the text is removed first, as LLaVA does before it writes an answer.
    """
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score(text: str, row: Question) -> float:
    return float(parse(text) == row["answer"])


def reduce(scores: Sequence[float], rows: Sequence[Question]) -> dict[str, Any]:
    """The mean F1 of the splits that were asked; "yes" is positive and yes_ratio is that of the predictions.

    Precision is 0 if no prediction is yes, and recall is 0 if no label is yes.
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
