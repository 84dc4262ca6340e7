"""ChartQA's test questions, written by people (human) and made from summaries (augmented); relaxed accuracy.

Native files: test_human.json and test_augmented.json, lists of {"imgname", "query", "label"}, with the images in png/;
or the hub's test-*.parquet with "type", "question", "answer", "image".
"""

from __future__ import annotations

import functools

from vlm_jax.benchmarks import files, metrics, records
from vlm_jax.benchmarks.records import Question, RawRecord
from vlm_jax.files import Path, to_path
from vlm_jax.settings.checks import ConfigError

SPLITS = ("human", "augmented")
WORD = "\nAnswer the question with a single word."
TOLERANCE = 0.05  # of the gold number: arXiv 2203.10244, section 5.1


def rows(path: str | Path) -> list[Question]:
    """Ids "<human|augmented>/<row>", rows counted from 0 in each split; human questions first."""
    found = files.find("chartqa", path, "test_*.json", *files.shards("test"))
    if found[0].suffix == ".parquet":
        every = list(files.read("chartqa", found))
        asked = {s: [r for r in every if r.text("type") == f"{s}_test"] for s in SPLITS}
    else:
        asked = {s: _split(to_path(path), s) for s in SPLITS}
    made = [_row(r, split, n) for split in SPLITS for n, r in enumerate(asked[split])]
    return records.distinct(made, f"chartqa: {path}")


def _split(path: Path, split: str) -> list[RawRecord]:
    """The records of test_<split>.json; none if `path` is a file of the other split."""
    file = path / f"test_{split}.json" if path.is_dir() else path
    if file.stem != f"test_{split}":
        return []
    if not file.is_file():
        raise ConfigError(f"chartqa: {path} has no {file.name}; put both files there.")
    return list(files.read("chartqa", [file]))


def _row(record: RawRecord, split: str, number: int) -> Question:
    image = record.image("imgname", "image", folder="png" if record.has("imgname") else "")
    question, gold = record.text("query", "question") + WORD, record.text("label", "answer")
    return records.row(f"{split}/{number}", image, question, gold, split=split)


def score(text: str, row: Question) -> float:
    """Relaxed accuracy: 1.0 for a number within 5 % of the gold one, or for a text that equals the gold one except for case.

    "5%" is 0.05. A gold number of 0 is compared as text, and so is any text that is not just a number ("5 cm", "1,000").
    White space around both texts is removed first; the rest is as in lmms-eval (tasks/chartqa).
    """
    said, gold = text.strip(), row["answer"].strip()
    number, target = _number(said), _number(gold)
    if number is not None and target:
        return float(abs(number - target) / abs(target) <= TOLERANCE)
    return float(said.lower() == gold.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


reduce = functools.partial(metrics.mean_by, "split")
