"""Bootstrap samples of a table, as row weights: which cells were measured, which training runs there were."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, stdtrit

from vlm_jax.laws.cells import Cells

MODES = ("cells", "seeds", "cells and seeds")


def resample(
    cells: Cells, constants: int, draws: int, seed: int
) -> dict[str, Float[np.ndarray, "R n"]]:
    """Row weights of every bootstrap sample, per mode; the seed modes only where seeds were repeated."""
    rows = cells.rows
    seeds = {
        lm: sorted({row.seed for row in rows if row.lm == lm}) for lm in {row.lm for row in rows}
    }
    modes = MODES if max(map(len, seeds.values())) > 1 else MODES[:1]
    return {
        mode: _draw(cells, seeds, mode, constants, draws, np.random.default_rng([seed, i]))
        for i, mode in enumerate(modes)
    }


def expanded_tail(cells: Cells, mode: str, constants: int, level: float) -> float:
    """Percent of resamples to cut off at either end of an interval; less than (1 - level) / 2.

    Resamples spread less than the truth by sqrt(freedom / count), and a few residuals call for Student's t. Source:
    the expanded percentile interval of Hesterberg (2015), "What Teachers Should Know About the Bootstrap", section 4,
    there for a mean. Count what is drawn: cells, or training runs when only those are.
    """
    if mode == "seeds":
        count = len({(row.lm, row.seed) for row in cells.rows})
        freedom = count - len({row.lm for row in cells.rows})
    else:
        count = len(cells.means)
        freedom = count - constants
    return 100 * float(ndtr(-np.sqrt(count / freedom) * stdtrit(freedom, (1 + level) / 2)))


def _draw(
    cells: Cells,
    seeds: Mapping[str, list[int]],
    mode: str,
    constants: int,
    draws: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "R n"]:
    rows, cell_of = cells.rows, cells.cell_of
    num_cells = cell_of.max() + 1
    lms = sorted({row.lm for row in rows})
    lm_of = np.array([lms.index(row.lm) for row in rows])
    tokens_of = np.array([row.visual_tokens for row in rows])
    kept: list[np.ndarray] = []
    while sum(map(len, kept)) < draws:
        run = np.ones((draws, len(rows)))
        if "seeds" in mode:
            for i, lm in enumerate(lms):
                counts = rng.multinomial(
                    len(seeds[lm]), np.full(len(seeds[lm]), 1 / len(seeds[lm])), draws
                )
                mine = np.flatnonzero(lm_of == i)
                run[:, mine] = counts[:, [seeds[lm].index(rows[j].seed) for j in mine]]
        per_cell = _sums(run, cell_of)
        weight = (
            run / np.maximum(per_cell, 1)[:, cell_of]
        )  # a cell's drawn runs share its weight of 1
        if "cells" in mode:
            weight = (
                weight
                * rng.multinomial(num_cells, np.full(num_cells, 1 / num_cells), draws)[:, cell_of]
            )
        present = weight > 0
        enough = (_sums(present, cell_of) > 0).sum(1) >= constants
        for of in (lm_of, np.unique(tokens_of, return_inverse=True)[1]):
            enough &= (_sums(present, of) > 0).sum(1) >= 2
        kept.append(weight[enough])  # a sample from which no law can be drawn is drawn again
    return np.concatenate(kept)[:draws]


def _sums(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Column sums per group: [R n] -> [R groups]."""
    return values.astype(float) @ np.eye(group.max() + 1)[group]
