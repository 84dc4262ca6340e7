"""Which rows of a table one law is fitted to, and those rows as arrays; every row left out is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.laws import table
from vlm_jax.laws.law import BILLION, Law
from vlm_jax.laws.least_squares import solve
from vlm_jax.laws.table import Row
from vlm_jax.settings.checks import ConfigError


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
    families = sorted({row.family for row in rows})
    if family not in families:
        raise ConfigError(f"fit: family {family!r} is not in the table; it has {families}.")
    rows = [row for row in rows if row.family == family]
    if benchmark is None:
        return rows
    names = sorted({row.benchmark for row in rows})
    if benchmark not in names:
        raise ConfigError(
            f"fit: benchmark {benchmark!r} is not in family {family!r}; it has {names}."
        )
    return [row for row in rows if row.benchmark == benchmark]


def _choose_compressor(
    rows: Sequence[Row], family: str, compressor: str | None
) -> tuple[str, list[str]]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.compressor] = counts.get(row.compressor, 0) + 1
    if compressor is None:
        compressor, most = max(counts.items(), key=lambda item: item[1])
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
