"""What repeated seeds say about the noise of a training run, and how much it adds to each constant's variance.

One run's language model is shared by all its token counts, so a run's luck moves all of a size's cells together. Least
squares takes cells for independent: it finds beta well, but thinks that alpha rests on as many draws as there are cells.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from vlm_jax.laws.cells import Cells
from vlm_jax.laws.law import CONSTANTS, Law


class Effect(NamedTuple):
    """A constant's true variance over that of independent cells, and the degrees of freedom it is known to."""

    factor: float  # >= 1
    freedom: float


def run_variance(cells: Cells) -> tuple[float, int]:
    """(variance of a run's error that all its cells share, degrees of freedom); (0, 0) without repeated seeds.

    Two-way analysis of variance, cells by runs within each LM; what single measurements scatter is taken off.
    """
    off = cells.errors - cells.means[cells.cell_of]
    runs: dict[tuple[str, int], list[int]] = {}
    for i, row in enumerate(cells.rows):
        runs.setdefault((row.lm, row.seed), []).append(i)
    freedom = len(runs) - len({lm for lm, _ in runs})
    if freedom == 0:
        return 0.0, 0
    shared = np.array([off[rows].mean() for rows in runs.values()])
    counts = np.array([len(rows) for rows in runs.values()])
    alone = float(np.sum(off**2) - np.sum(counts * shared**2))
    alone_freedom = len(off) - len(cells.means) - freedom
    noise = alone / alone_freedom if alone_freedom > 0 else 0.0
    between = float(np.sum(shared**2)) / freedom
    return max(between - noise * float(np.mean(1 / counts)), 0.0), freedom


def effects(cells: Cells, law: Law, sse: float, d_fixed: bool) -> dict[str, Effect]:
    """Per constant: (independent part + runs' part) / independent part of its variance, by linearising at the optimum.

    The independent part is the fit's residual scatter, which holds some of the runs' luck already: where that is large, a
    constant that runs hardly touch (beta) gets an interval up to half as wide again as it need be. Degrees of freedom after
    Satterthwaite (1946). Where D is free both D's flat direction and D held are looked at, and the larger factor is taken:
    at the bound D = 0 the table decides which of the two it is.
    """
    points, freedom = cells.points, len(cells.means) - (3 if d_fixed else 4)
    plain = dict.fromkeys(CONSTANTS, Effect(1.0, freedom))
    variance, run_freedom = run_variance(cells)
    if variance == 0 or sse <= 0:
        return plain
    lms = [row.lm for row in cells.rows]
    lm_of_cell = dict(zip(cells.cell_of, lms, strict=True))
    names = sorted(set(lms))
    member = np.array([[lm_of_cell[i] == lm for i in range(len(points.errors))] for lm in names])
    seeds = np.array([len({r.seed for r in cells.rows if r.lm == lm}) for lm in names])
    found = plain
    for with_d in (False,) if d_fixed else (False, True):
        for name, row in _influence(points, law, with_d).items():
            alone = sse / freedom * float(np.sum(row**2 / points.weights))
            runs = float(np.sum(variance / seeds * (member @ row) ** 2))
            if alone > 0 and 1 + runs / alone > found[name].factor:
                known = (alone + runs) ** 2 / (alone**2 / freedom + runs**2 / run_freedom)
                found[name] = Effect(1 + runs / alone, min(known, freedom))
    return found


def _influence(points, law: Law, with_d: bool) -> dict[str, Float[np.ndarray, " c"]]:
    """How much each constant moves per unit of each cell's error."""
    power = points.size**-law.alpha * points.tokens**-law.beta
    columns = [power, -law.A * power * np.log(points.size), -law.A * power * np.log(points.tokens)]
    jacobian = np.stack([*columns, np.ones_like(power)][: 4 if with_d else 3], axis=-1)
    root = np.sqrt(points.weights)
    rows = dict(zip(CONSTANTS, np.linalg.pinv(jacobian * root[:, None]) * root, strict=False))
    if law.ratio is not None:
        rows["alpha/beta"] = (rows["alpha"] - law.ratio * rows["beta"]) / law.beta
    return rows
