"""Asking and scoring in the benchmarks' tests; native_files.py writes the files."""

import json
import random

from vlm_jax import benchmarks
from vlm_jax.data import sources

ALPHABET = "aAbBcCdDZ019 .,:;()%$€-+eE\n\t\"'\\/{}[]é漢٣²½\u200b\x00"
STARTS = ("", "", "", "yes", "No", "A", "The answer is B.", "10 1/2")


def asked(row):
    """The text of the question, without its images; the row must be one that the pipeline takes."""
    record = sources.parse(row, "test", "root", row["id"], generate=True)
    return record.turns[-1].question


def score(name, rows, texts):
    """Of texts in the order of rows; the order of the answers must not matter."""
    answers = [(row["id"], text) for row, text in zip(rows, texts, strict=True)]
    result = benchmarks.score_answers(name, rows, answers)
    assert benchmarks.score_answers(name, rows, answers[::-1]) == result
    assert result["n"] == len(rows) and result["error"] == 1.0 - result["score"]
    json.dumps(result, allow_nan=False)
    return result


def fuzz(name, rows, rounds=100):
    """Random texts, empty ones and long ones give scores in [0, 1]."""
    rng = random.Random(0)
    for turn in range(rounds):
        length = (0, 1, 2, 5, 20, 300)[turn % 6]
        texts = [rng.choice(STARTS) + "".join(rng.choices(ALPHABET, k=length)) for _ in rows]
        for row, text in zip(rows, texts, strict=True):
            assert 0.0 <= benchmarks.get(name).score(text, row) <= 1.0
        assert 0.0 <= score(name, rows, texts)["error"] <= 1.0


def same_but_for_the_image(rows, hub_rows, directory):
    """Rows of parquet files equal those of the files, with pictures of the same bytes."""
    read = [{**row, "image": (directory / row["image"]).read_bytes()} for row in rows]
    hub = [{**row, "image": row["image"]()} for row in hub_rows]
    return sorted(read, key=lambda row: row["id"]) == sorted(hub, key=lambda row: row["id"])
