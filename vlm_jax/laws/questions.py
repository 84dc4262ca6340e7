"""How far the questions that were asked let a law move: a jackknife over groups of images, from saved predictions.

Every cell is asked the same questions, several of them about one picture. `benchmarks.errors_without_groups` divides the
pictures into groups, the same ones for every model, and says what each error would be without the questions about a group.
Fitting the law to all errors without the same group keeps cells paired and pictures whole, whatever a benchmark's metric is;
the law's variance is that of a delete-a-group jackknife, summed over benchmarks, which share no pictures (Kott 2001, "The
Delete-a-Group Jackknife", section 2). It says nothing of training runs: their luck is the same in every group.

    questions.jsonl   {"benchmark", "family", "lm", "visual_tokens", "compressor", "seed", "train_samples", "elastic", "without"} per
                      row of errors.csv; without: an error per group, null for a group without questions
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from vlm_jax import files
from vlm_jax.files import to_path
from vlm_jax.laws.law import CONSTANTS, Interval
from vlm_jax.laws.least_squares import Cells, solve
from vlm_jax.laws.table import Row
from vlm_jax.settings.checks import ConfigError

KEY = (
    "benchmark",
    "family",
    "lm",
    "visual_tokens",
    "compressor",
    "seed",
    "train_samples",
    "elastic",
)
Without = Mapping[tuple, Sequence[float | None]]  # a row's key -> its error without each group


def append(path: str | os.PathLike[str], found: Without) -> None:
    """Adds the lines of rows to a file that may not exist yet; a row that is there already is replaced."""
    merged = {**(read([path]) if to_path(path).is_file() else {}), **found}
    lines = [
        json.dumps(dict(zip(KEY, key, strict=True)) | {"without": list(errors)})
        for key, errors in merged.items()
    ]
    files.write_whole(path, "\n".join(lines) + "\n")


def read(paths: Iterable[str | os.PathLike[str]]) -> dict[tuple, list[float | None]]:
    """Raises ConfigError for a file that is not there, or a line that is none of `append`."""
    found = {}
    for path in map(to_path, paths):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; an evaluation writes questions.jsonl beside its errors.csv.")  # fmt: skip
        for number, line in enumerate(files.read_text(path).splitlines(), 1):
            try:
                fields = json.loads(line)
                errors = [None if e is None else float(e) for e in fields["without"]]
                known = {"elastic": False, **fields}  # lines of older evaluations do not have it
                found[tuple(known[name] for name in KEY)] = errors
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}:{number}: is no line of questions.jsonl ({error}).") from None  # fmt: skip
    return found


class OverQuestions(NamedTuple):
    """What the choice of questions adds."""

    intervals: dict[str, Interval | None]  # constant -> interval
    largest: float  # standard error of a cell's error
    shares: dict[
        str, float
    ]  # benchmark -> its part of the variance of alpha and beta, by their mean


def jackknife(
    cells: Cells, rows: Sequence[Row], without: Without, fixed_d: float | None, level: float
) -> OverQuestions:
    """The law's intervals over questions. rows: of single benchmarks, whose means `cells` are.

    D has no interval, and where D is fitted its bound makes those of A, alpha and beta too narrow; their ratio is steady.
    Raises ConfigError for a row whose questions are not in `without`.
    """
    points, members = cells.points, {row.key[2:]: i for i, row in enumerate(cells.rows)}
    by_benchmark: dict[str, list[Row]] = {}
    for row in rows:
        if row.key[2:] in members and not row.flag:
            by_benchmark.setdefault(row.benchmark, []).append(row)
    counts = np.bincount(cells.cell_of)
    values: dict[str, dict[str, float]] = {}
    cell_variance, fewest = np.zeros(len(points.errors)), math.inf
    for benchmark, own in by_benchmark.items():
        moved = _moved(own, without) / len(by_benchmark)  # [rows groups]
        fewest = min(fewest, moved.shape[1])  # groups of pictures that this benchmark has
        where = np.array([cells.cell_of[members[row.key[2:]]] for row in own])
        replicas = points.errors + (np.eye(len(counts))[:, where] @ moved).T / counts
        cell_variance += _variance(replicas)
        fixed = None if fixed_d is None else np.full(len(replicas), float(fixed_d))
        weights = np.tile(points.weights, (len(replicas), 1))
        solved = solve(points.size, points.tokens, replicas, weights, fixed)
        drawn: dict[str, np.ndarray] = {name: getattr(solved, name) for name in CONSTANTS[:3]}
        if (np.minimum(solved.alpha, solved.beta) > 0).all():
            drawn["alpha/beta"] = solved.alpha / solved.beta
        values[benchmark] = {name: float(_variance(x)) for name, x in drawn.items()}
    law = points.law(fixed_d)
    width = float(stdtrit(fewest - 1, (1 + level) / 2))
    intervals: dict[str, Interval | None] = dict.fromkeys(CONSTANTS)
    for name in ("A", "alpha", "beta", "alpha/beta"):
        at = law.ratio if name == "alpha/beta" else getattr(law, name)
        if at is not None and all(name in found for found in values.values()):
            half = width * math.sqrt(sum(found[name] for found in values.values()))
            intervals[name] = (at - half, at + half)
    shares = {
        benchmark: float(np.mean([found[name] / max(sum(v[name] for v in values.values()), 1e-300) for name in ("alpha", "beta")]))
        for benchmark, found in values.items()
    }  # fmt: skip
    return OverQuestions(intervals, math.sqrt(cell_variance.max()), shares)


def _moved(rows: Sequence[Row], without: Without) -> np.ndarray:
    """How far each row's error moves without each group that has questions: [rows groups]."""
    found: list[Any] = []
    for row in rows:
        if row.key not in without:
            raise ConfigError(
                f"fit: --questions has no line for {row.benchmark} of {row.lm}, {row.visual_tokens} visual tokens, seed "
                f"{row.seed}; evaluate it again (saved predictions are only scored), or leave --questions out."
            )
        found.append([math.nan if e is None else e - row.error for e in without[row.key]])
    if len({len(errors) for errors in found}) > 1:
        raise ConfigError(f"fit: --questions: rows of {rows[0].benchmark} have other numbers of groups; evaluate them again.")  # fmt: skip
    moved = np.array(found, float)
    moved = moved[:, ~np.isnan(moved).any(axis=0)]
    if moved.shape[1] < 2:
        raise ConfigError(
            f"fit: --questions: {rows[0].benchmark} asks about fewer than two pictures."
        )
    return moved


def _variance(replicas: np.ndarray) -> Any:
    """Of a delete-a-group jackknife; replicas: [groups ...]."""
    groups = len(replicas)
    return (groups - 1) / groups * np.sum((replicas - replicas.mean(axis=0)) ** 2, axis=0)
