"""Scoring functions and reductions that several benchmarks share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def normalise(text: str) -> str:
    """Lower case, runs of white space as one blank, none at the ends, and at most one period at the end removed.

    Nothing else is changed: articles, numbers in words and inner punctuation matter ("a cat" is not "cat").
    """
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def exact_match(prediction: str, row: dict[str, Any]) -> float:
    """1.0 if prediction and row["answer"] agree after `normalise`, else 0.0."""
    return float(normalise(prediction) == normalise(row["answer"]))


def mean(scores: Sequence[float], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The plain average: {"score" 0..1, "error" = 1 - score, "n", "details": {}}. At least one score."""
    if len(scores) != len(rows) or not scores:
        raise ValueError(f"{len(scores)} scores for {len(rows)} rows")
    score = sum(scores) / len(scores)
    return {"score": score, "error": 1.0 - score, "n": len(scores), "details": {}}


def means(scores: Sequence[float], parts: Iterable[Iterable[str]]) -> dict[str, float]:
    """Part -> mean of the scores that belong to it, sorted by name. parts: the names of the parts of each score."""
    gathered: dict[str, list[float]] = defaultdict(list)
    for value, names in zip(scores, parts, strict=True):
        for name in names:
            gathered[name].append(value)
    return {name: sum(values) / len(values) for name, values in sorted(gathered.items())}


def mean_by(field: str, scores: Sequence[float], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`mean`, and in details the mean for each value of row[field]."""
    return {**mean(scores, rows), "details": means(scores, ([row[field]] for row in rows))}


def mean_by_parts(
    names: Callable[[dict[str, Any]], Iterable[str]],
    scores: Sequence[float],
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """`mean`, and in details the mean of each part that a row belongs to. A part named "" is left out."""
    return {**mean(scores, rows), "details": means(scores, (filter(None, names(r)) for r in rows))}
