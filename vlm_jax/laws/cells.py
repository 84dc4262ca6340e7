"""What one law is fitted to: rows of a table as arrays, and how much each cell counts. Every row left out is named.

A cell counts the same as each other one, by how many questions it was asked, or less where it lies far from the law.
Also which measured cells cost about the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.costs.price import Number, paper_flops
from vlm_jax.laws import table
from vlm_jax.laws.law import BILLION, Fit, Law
from vlm_jax.laws.least_squares import solve
from vlm_jax.laws.table import Row
from vlm_jax.settings.checks import ConfigError

ABOUT = 1.2  # costs within this factor of a budget are about equal to it
HUBER = 1.345  # standard deviations; 95 % efficient on normal noise (Huber and Ronchetti 2009)
TO_SIGMA = 1.4826  # median absolute deviation -> standard deviation of normal noise
MAX_ROUNDS = 500
SETTLED = 1e-7  # the largest change of a constant in a round that ends the search


class Points(NamedTuple):
    """A table as a law sees it: one entry per cell."""

    size: Float[np.ndarray, " c"]  # parameters of the LM, in billions
    tokens: Float[np.ndarray, " c"]
    errors: Float[np.ndarray, " c"]  # mean over the cell's seeds
    weights: Float[np.ndarray, " c"]  # mean 1

    @property
    def scatter(self) -> float:
        """The weighted sum of squares about the mean."""
        centre = np.average(self.errors, weights=self.weights)
        return float(np.sum(self.weights * (self.errors - centre) ** 2))

    def max_relative_error(self, predicted: Float[np.ndarray, " c"]) -> float:
        return float(np.max(np.abs(predicted - self.errors) / np.maximum(self.errors, 1e-12)))

    def law(self, fixed_d: float | None = None) -> Law:
        """The least-squares law; fixed_d: None fits D >= 0."""
        given = None if fixed_d is None else np.array([float(fixed_d)])
        solved = solve(self.size, self.tokens, self.errors[None], self.weights[None], given)
        return Law(*(float(column[0]) for column in solved[:4]))

    def sum_of_squares(self, law: Law) -> float:
        residual = self.errors - law.error(self.size * BILLION, self.tokens)
        return float(np.sum(self.weights * residual**2))


@dataclasses.dataclass(frozen=True)
class Cells:
    """The measurements behind one law. A cell is one (LM, visual tokens); its seeds share its weight."""

    rows: tuple[Row, ...]  # one per (cell, seed), smallest LM and fewest tokens first
    left_out: tuple[str, ...]  # a line per group of rows that is not fitted, and why
    cell_of: Int[np.ndarray, " n"]  # row -> its cell
    cell_weights: Float[np.ndarray, " c"]  # mean 1; all 1: every cell counts the same

    @property
    def size(self) -> Float[np.ndarray, " n"]:
        """Parameters of each row's LM, in billions."""
        return np.array([row.lm_params for row in self.rows], float) / BILLION

    @property
    def tokens(self) -> Float[np.ndarray, " n"]:
        return np.array([row.visual_tokens for row in self.rows], float)

    @property
    def errors(self) -> Float[np.ndarray, " n"]:
        return np.array([row.error for row in self.rows], float)

    @property
    def weights(self) -> Float[np.ndarray, " n"]:
        return (self.cell_weights / np.bincount(self.cell_of))[self.cell_of]

    @property
    def means(self) -> Float[np.ndarray, " c"]:
        """Each cell's error: the mean over its seeds."""
        return np.bincount(self.cell_of, self.errors) / np.bincount(self.cell_of)

    @property
    def points(self) -> Points:
        first = np.unique(self.cell_of, return_index=True)[1]
        return Points(self.size[first], self.tokens[first], self.means, self.cell_weights)

    def weighted(self, weights: Float[np.ndarray, " c"]) -> Cells:
        """The same cells with these weights, brought to mean 1."""
        return dataclasses.replace(self, cell_weights=weights / weights.mean())


def select(
    rows: Sequence[Row], family: str, benchmark: str | None, compressor: str | None, constants: int
) -> Cells:
    """The family's rows of one compressor, flagged ones left out.

    Args:
      benchmark: None takes the mean over the family's benchmarks. compressor: None takes the one with the most cells.
      constants: how many the law has; raises ConfigError when the cells cannot determine them.
    """
    rows = _of_benchmark(rows, family, benchmark)
    compressor, left_out = _choose_compressor(rows, family, compressor)
    rows = table.family_mean([row for row in rows if row.compressor == compressor], family)
    left_out += [
        f"{row.lm}, {row.visual_tokens} visual tokens, seed {row.seed} (error {row.error:.3f}): flagged {row.flag!r}"
        for row in rows
        if row.flag
    ]
    used = [row for row in rows if not row.flag]
    _check(used, family, constants, flagged=len(rows) - len(used))
    index = {cell: i for i, cell in enumerate(dict.fromkeys(row.cell for row in used))}
    cell_of = np.array([index[row.cell] for row in used])
    return Cells(tuple(used), tuple(left_out), cell_of, np.ones(len(index)))


def _of_benchmark(rows: Sequence[Row], family: str, benchmark: str | None) -> list[Row]:
    own = [row for row in rows if row.family == family]
    if not own:
        has = sorted({row.family for row in rows})
        raise ConfigError(f"fit: family {family!r} is not in the table; it has {has}.")
    found = [row for row in own if benchmark in (None, row.benchmark)]
    if not found:
        has = sorted({row.benchmark for row in own})
        raise ConfigError(
            f"fit: benchmark {benchmark!r} is not in family {family!r}; it has {has}."
        )
    return found


def _choose_compressor(
    rows: Sequence[Row], family: str, compressor: str | None
) -> tuple[str, list[str]]:
    counts = Counter(row.compressor for row in rows)
    if compressor is None:
        compressor, most = counts.most_common(1)[0]
        if list(counts.values()).count(most) > 1:
            raise ConfigError(
                f"fit: family {family!r} holds {sorted(counts)} equally often; choose one with --compressor."
            )
    elif compressor not in counts:
        raise ConfigError(
            f"fit: compressor {compressor!r} is not in family {family!r}; it has {sorted(counts)}."
        )
    return compressor, [
        f"{count} row(s) with compressor {name!r}: the law is fitted to {compressor!r} only"
        for name, count in counts.items()
        if name != compressor
    ]


def _check(rows: Sequence[Row], family: str, constants: int, flagged: int) -> None:
    beside = f" beside {flagged} flagged row(s)" if flagged else ""
    for what, values in (
        ("LM size", {row.lm_params for row in rows}),
        ("visual token count", {row.visual_tokens for row in rows}),
    ):
        if len(values) < 2:
            raise ConfigError(
                f"fit: family {family!r} has {len(values)} {what}(s){beside}; its exponent needs at least 2."
            )
    cells = len({row.cell for row in rows})
    if cells <= constants:
        fix = " or fix D with --fix-d 0" if constants == 4 and cells == 4 else ""
        raise ConfigError(
            f"fit: family {family!r} has {cells} cells{beside} for {constants} constants; "
            f"measure at least {constants + 1}{fix}."
        )


def even(cells: Cells) -> Cells:
    return cells


def binomial(cells: Cells) -> Cells:
    """Weights 1 / variance of a share p of n questions, p (1 - p) / n.

    p is (error n + 1/2) / (n + 1), so that an error of 0 or 1 has a variance too. A family's mean over benchmarks counts
    as one draw of all their questions, which is exact when their n and p agree. Raises ConfigError for a row without n.
    """
    for row in cells.rows:
        if row.n is None or row.n < 1:
            raise ConfigError(
                f"fit: binomial weights need the column n (questions scored); {row.lm}, {row.visual_tokens} visual tokens, "
                f"seed {row.seed} has {'none' if row.n is None else row.n}: fill it in or use --weights=even."
            )
    n = np.array([row.n for row in cells.rows], float)
    p = (cells.errors * n + 0.5) / (n + 1)
    seeds = np.bincount(cells.cell_of)
    return cells.weighted(seeds**2 / np.bincount(cells.cell_of, p * (1 - p) / n))


def squares(cells: Cells, fixed_d: float | None) -> Cells:
    return cells


def huber(cells: Cells, fixed_d: float | None) -> Cells:
    """The cells with the weights at which least squares gives Huber's law, by repeated weighted fits.

    Residuals beyond 1.345 standard deviations count linearly instead of squared. The standard deviation is the residuals'
    median size about the plain fit x 1.4826 x sqrt(n / (n - p)), for a fit of p constants leaves n residuals smaller than the
    noise. It is taken once: it does not move with the weights, so each round lowers the loss.
    """
    points = cells.points
    root = np.sqrt(points.weights)

    def sizes(weighted: Cells) -> tuple[Law, Float[np.ndarray, " c"]]:
        law = weighted.points.law(fixed_d)
        off = points.errors - law.error(points.size * BILLION, points.tokens)
        return law, np.abs(off) * root

    before, size = sizes(cells)
    freedom = len(size) - (4 if fixed_d is None else 3)  # 1 at least: `select` saw to it
    edge = HUBER * TO_SIGMA * float(np.median(size)) * math.sqrt(len(size) / freedom)
    if edge == 0:
        return cells
    found = cells
    for _ in range(MAX_ROUNDS):
        found = cells.weighted(points.weights * np.minimum(1, edge / np.maximum(size, edge)))
        law, size = sizes(found)
        changes = np.subtract(dataclasses.astuple(law), dataclasses.astuple(before))
        if np.abs(changes).max() < SETTLED:
            return found
        before = law
    raise ConfigError(
        f"fit: the robust loss did not settle in {MAX_ROUNDS} rounds; use --loss=squares."
    )


WEIGHTS = {"even": even, "binomial": binomial}
LOSSES = {"squares": squares, "huber": huber}


def weighed(cells: Cells, weights: str, loss: str, fixed_d: float | None) -> Cells:
    """The cells with the weights of a fit with these options."""
    return LOSSES[loss](WEIGHTS[weights](cells), fixed_d)


def rows_of(rows: Sequence[Row], fit: Fit) -> list[Row]:
    """The measurements behind a fit, flagged ones included."""
    own = [row for row in rows if row.family == fit.family and row.compressor == fit.compressor]
    single = [row for row in own if row.benchmark == fit.benchmark]
    return single or own


class Pair(NamedTuple):
    """An (LM, visual tokens) with its cost."""

    lm: str
    lm_params: Number
    visual_tokens: int
    flops: float  # 2 N (Q + V)


def benchmarks_of(rows: Sequence[Row], fit: Fit) -> list[str]:
    return list(dict.fromkeys(row.benchmark for row in rows_of(rows, fit)))


def measured_pairs(rows: Sequence[Row], fits: Mapping[str, Fit], text_tokens: int) -> list[Pair]:
    """The (LM, visual tokens) that every benchmark of every law was measured at, smallest LM first."""
    cells = [
        {row.cell for row in rows_of(rows, fit) if row.benchmark == name and not row.flag}
        for fit in fits.values()
        for name in benchmarks_of(rows, fit)
    ]
    sizes = {lm: params for fit in fits.values() for lm, params in fit.lms.items()}
    shared = sorted(set.intersection(*cells), key=lambda cell: (sizes[cell[0]], cell))
    return [
        Pair(lm, sizes[lm], v, float(paper_flops(sizes[lm], text_tokens, v))) for lm, v in shared
    ]


def equal_pairs(pairs: Sequence[Pair], flops: float | None = None) -> list[Pair]:
    """Of each LM the pair whose cost is nearest to `flops`, if it is within ABOUT of it; smallest LM first.

    flops: None takes the pair's cost that keeps the most LMs, of these the one whose costs differ the least.
    """
    if flops is not None:
        found = _near(pairs, flops)
    else:
        choices = [_near(pairs, pair.flops) for pair in pairs]
        found = max(choices, key=lambda near: (len(near), -_spread(near)), default=[])
    if len(found) < 2:
        where = "of any one cost" if flops is None else f"of {flops / 1e9:g} GFLOPs"
        raise ConfigError(
            f"plot: fewer than 2 LMs have a cell within {ABOUT - 1:.0%} {where}; "
            "measure more token counts, or give another --budget-gflops."
        )
    return found


def _near(pairs: Sequence[Pair], flops: float) -> list[Pair]:
    def distance(pair: Pair) -> float:
        return abs(math.log(pair.flops / flops))

    lms = dict.fromkeys(pair.lm for pair in pairs)
    nearest = [min((p for p in pairs if p.lm == lm), key=distance) for lm in lms]
    return [pair for pair in nearest if distance(pair) <= math.log(ABOUT)]


def _spread(pairs: Iterable[Pair]) -> float:
    costs = [pair.flops for pair in pairs]
    return max(costs) / min(costs)
