"""How much each cell counts in a fit: the same, by how many questions it was asked, or less where it lies far off."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from vlm_jax.laws.cells import Cells
from vlm_jax.laws.law import BILLION, Law
from vlm_jax.settings.checks import ConfigError

HUBER = 1.345  # standard deviations; 95 % efficient on normal noise (Huber and Ronchetti 2009)
TO_SIGMA = 1.4826  # median absolute deviation -> standard deviation of normal noise
MAX_ROUNDS = 500
SETTLED = 1e-7  # the largest change of a constant in a round that ends the search


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
