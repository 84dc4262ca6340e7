"""Bootstrap samples of a table: which cells were measured, which training runs there were, which residuals they had."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, stdtrit

from vlm_jax.laws.cells import Cells, Points

MODES = ("cells", "seeds", "cells and seeds")
RESIDUALS = "residuals"


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


def resample_residuals(
    points: Points, fitted: Float[np.ndarray, " c"], constants: int, draws: int, seed: int
) -> Float[np.ndarray, "R c"]:
    """Errors of every sample: the fitted ones plus residuals drawn with replacement, in the weights' units.

    Residuals are centred and widened by sqrt(count / freedom), because a fit makes them smaller than the noise was.
    Takes for granted that the law holds and that cells' noise is independent; resampling cells does neither.
    """
    scale = np.sqrt(points.weights)
    residual = (points.errors - fitted) * scale
    residual = residual - residual.mean()
    residual *= np.sqrt(len(residual) / (len(residual) - constants))
    rng = np.random.default_rng([seed, len(MODES)])
    return fitted + rng.choice(residual, (draws, len(residual))) / scale


def expanded_tail(cells: Cells, mode: str, constants: int, level: float) -> float:
    """Percent of resamples to cut off at either end of an interval; less than (1 - level) / 2.

    Resamples spread less than the truth by sqrt(freedom / count), and a few residuals call for Student's t. Source:
    the expanded percentile interval of Hesterberg (2015), "What Teachers Should Know About the Bootstrap", section 4,
    there for a mean. Count what is drawn: cells, or training runs when only those are. Residuals are widened already.
    """
    if mode == "seeds":
        count = len({(row.lm, row.seed) for row in cells.rows})
        freedom = count - len({row.lm for row in cells.rows})
    else:
        count = len(cells.means)
        freedom = count - constants
    spread = 1.0 if mode == RESIDUALS else np.sqrt(count / freedom)
    return 100 * float(ndtr(-spread * stdtrit(freedom, (1 + level) / 2)))


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
        # a cell's drawn runs share its weight
        weight = (cells.cell_weights / np.maximum(per_cell, 1))[:, cell_of] * run
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
