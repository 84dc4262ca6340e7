"""How far the table lets a fitted law move: run-to-run noise, profile likelihoods, bootstrap samples.

*Profile likelihood*: a value of a constant, or of both exponents, is kept when the best law that has it is not significantly
worse than the best of all: F test on the rise of the weighted sum of squares (Bates and Watts 1988, "Nonlinear Regression
Analysis and Its Applications", section 6.1). Unlike a symmetric interval this follows a flat direction as far as it goes.

*Training runs*: one run's language model is shared by all its token counts, so a run's luck moves all of a size's cells
together. Least squares assumes independent cells: it estimates beta well, but it counts as many independent observations
of alpha as there are cells. Repeated seeds show how much this noise adds to the variance of each constant.

*Bootstrap*: samples of the table, by which cells were measured, which training runs there were, which residuals they had.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import fdtrc, fdtri, ndtr, stdtrit

from vlm_jax.laws.law import CONSTANTS, Check, Interval
from vlm_jax.laws.least_squares import (
    EXPONENT_BOX,
    Cells,
    Law,
    Points,
    Solutions,
    exponent_axis,
    solve,
    solve_along,
)

OUTWARD = 2.0 ** np.arange(-8, 18)  # steps from the optimum, in units of `scale`
BETWEEN = 9  # points tried between the last value inside and the first outside
MODES = ("cells", "seeds", "cells and seeds")
RESIDUALS = "residuals"


class Effect(NamedTuple):
    """A constant's variance over its variance if cells were independent, and the degrees of freedom of that estimate."""

    factor: float  # >= 1
    freedom: float


def run_variance(cells: Cells) -> tuple[float, int]:
    """(variance of a run's error that all its cells share, degrees of freedom); (0, 0) without repeated seeds.

    Two-way analysis of variance, cells by runs within each LM; the noise of single measurements is subtracted.
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
    """Per constant: its variance with run-to-run noise over its variance with independent cells, linearised at the optimum.

    The variance of independent cells is estimated from the fit's residuals, which contain part of the run-to-run noise. Where
    that noise is large, the interval of a constant that it hardly affects (beta) comes out up to 50 % too wide.
    The degrees of freedom follow Satterthwaite (1946). Where D is free, the factor is computed with D free and with D held,
    and the larger one is taken, because at the bound D = 0 either may apply.
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


@dataclasses.dataclass(frozen=True)
class Profiles:
    """One table's laws under constraints. fixed_d: None fits D >= 0."""

    points: Points
    law: Law  # the optimum
    sse: float
    fixed_d: float | None
    effects: Mapping[str, Effect]  # constant -> what run-to-run noise adds

    @property
    def constants(self) -> int:
        return 4 if self.fixed_d is None else 3

    @property
    def freedom(self) -> int:
        return len(self.points.errors) - self.constants

    def limit(self, name: str, level: float) -> float:
        """The largest sum of squares that is not significantly worse with this constant held."""
        factor, freedom = self.effects[name]
        return self.sse * (1 + factor * float(fdtri(1, freedom, level)) / self.freedom)

    def hold(self, name: str, values: Float[np.ndarray, " R"]) -> Solutions:
        """The best law for each value of A, alpha, beta, D or alpha/beta (its exponents then positive)."""
        points, count, axis = self.points, len(values), exponent_axis()
        if name == "D":
            errors, weights = (np.tile(a, (count, 1)) for a in (points.errors, points.weights))
            return solve(points.size, points.tokens, errors, weights, values)
        if name == "A":
            return solve_along(*points, self._starts(count), fixed_a=values, fixed_d=self.fixed_d)
        if name == "alpha/beta":
            direction = np.stack([values, np.ones(count)], -1)
            direction /= direction.max(1, keepdims=True)
            along = axis[axis > 0][:, None]
            own = (self.law.alpha + self.law.beta) / direction.sum(1)[:, None, None]
            starts = np.concatenate([along, along], -1) * direction[:, None]
            starts = np.concatenate([starts, own * direction[:, None]], 1)
            return solve_along(*points, starts, direction, fixed_d=self.fixed_d)
        moving = 0 if name == "beta" else 1
        other = np.append(axis, (self.law.alpha, self.law.beta)[moving])
        starts = np.empty((count, len(other), 2))
        starts[..., 1 - moving], starts[..., moving] = values[:, None], other
        direction = np.tile(np.eye(2)[moving], (count, 1))
        return solve_along(*points, starts, direction, fixed_d=self.fixed_d)

    def _starts(self, count: int) -> Float[np.ndarray, "R K 2"]:
        """Exponents along the flat direction, where D trades against A, and at D = 0."""
        known = [(self.law.alpha, self.law.beta)]
        if self.fixed_d is None:
            path = self.hold("D", np.linspace(0, 0.999 * float(self.points.errors.min()), 12))
            known += zip(path.alpha, path.beta, strict=True)
        stretched = np.array(known)[:, None] * np.array([0.9, 1.0, 1.1])[:, None]
        return np.broadcast_to(stretched.reshape(-1, 2), (count, stretched.size // 2, 2))

    def interval(self, name: str, level: float) -> Interval | None:
        """The values of a constant that fit about as well; None when it has none (a fixed D, a ratio without sign).

        An end at +-EXPONENT_BOX (alpha, beta), exp(+-100) (A) or the largest error (D) was not reached: the table does not
        bound the constant there.
        """
        if name == "D" and self.fixed_d is not None:
            return None
        best, scale, low, high, log = self._range(name)
        if best is None:
            return None
        limit = self.limit(name, level) + 1e-14

        def excess(values: np.ndarray) -> np.ndarray:
            return self.hold(name, np.exp(values) if log else values).sse - limit

        ends = [
            _crossing(excess, best, sign * scale, bound) for sign, bound in ((-1, low), (1, high))
        ]
        if name == "alpha/beta" and any(abs(end) >= high for end in ends):
            return None  # one exponent may be 0
        return tuple(math.exp(end) if log else end for end in ends)  # type: ignore[return-value]

    def _range(self, name: str) -> tuple[float | None, float, float, float, bool]:
        """(optimum, first step, lowest, highest, on a log scale)."""
        law = self.law
        if name == "A":
            best = math.log(law.A) if law.A > 0 else None
            return best, 0.1, -100.0, 100.0, True
        if name == "alpha/beta":
            best = None if law.ratio is None else math.log(law.ratio)
            return best, 0.1, -7.0, 7.0, True
        if name == "D":
            return law.D, 0.05, 0.0, float(self.points.errors.max()), False
        return getattr(law, name), 0.05, -EXPONENT_BOX, EXPONENT_BOX, False

    def check(self, alpha: float, beta: float, level: float) -> Check:
        """Do these exponents lie inside the joint region of (alpha, beta), A and D being free?

        Run-to-run noise widens the region by the larger of the two exponents' factors.
        """
        factor, freedom = max(self.effects["alpha"], self.effects["beta"])
        starts = np.array([[[alpha, beta]]])
        still = np.zeros((1, 2))
        held = solve_along(*self.points, starts, still, fixed_d=self.fixed_d)
        sse = float(held.sse[0])
        f = (sse - self.sse) / 2 / max(factor * self.sse / self.freedom, 1e-300)
        p = float(fdtrc(2, freedom, max(f, 0.0)))
        law = Law(float(held.A[0]), alpha, beta, float(held.D[0]))
        needed = float(fdtri(2, freedom, level))
        return Check(law, sse / max(self.sse, 1e-300), f, needed, p, p >= 1 - level)

    def nonnegative(self) -> tuple[Law, float]:
        """The best law whose exponents are both >= 0, and its sum of squares; the optimum itself where it is one."""
        law = self.law
        if law.alpha >= 0 and law.beta >= 0:
            return law, self.sse
        faces = [self.hold(name, np.zeros(1)) for name in ("alpha", "beta")]
        flat = self.check(0.0, 0.0, 0.95).law
        found = [Law(*(float(column[0]) for column in face[:4])) for face in faces] + [flat]
        allowed = [law for law in found if law.alpha >= 0 and law.beta >= 0]
        sums = [self.points.sum_of_squares(law) for law in allowed]
        best = int(np.argmin(sums))
        return allowed[best], sums[best]


def profile(cells: Cells, fixed_d: float | None) -> Profiles:
    """The cells' law, ready to be held. fixed_d: None fits D >= 0."""
    points = cells.points
    law = points.law(fixed_d)
    sse = points.sum_of_squares(law)
    return Profiles(points, law, sse, fixed_d, effects(cells, law, sse, fixed_d is not None))


def _crossing(
    excess: Callable[[np.ndarray], np.ndarray], best: float, step: float, bound: float
) -> float:
    """Where `excess` first rises above 0 on the way from `best` towards `bound`, which it returns if nowhere."""
    sign = math.copysign(1.0, step)
    tried = best + step * OUTWARD
    tried = np.append(tried[sign * tried < sign * bound], bound)
    if best == bound:
        return bound
    above = excess(tried) > 0
    if not above.any():
        return bound
    first = int(above.argmax())
    for _ in range(2):
        edge = best if first == 0 else float(tried[first - 1])
        tried = np.linspace(edge, float(tried[first]), BETWEEN)
        values = excess(tried)
        above = values > 0
        above[0], above[-1] = False, True
        first = int(above.argmax())
    left, right = values[first - 1], values[first]
    share = 0.5 if right <= left else min(max(-left / (right - left), 0.0), 1.0)
    return float(tried[first - 1] + share * (tried[first] - tried[first - 1]))


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
    Assumes that the law holds and that the noise of cells is independent; resampling cells assumes neither.
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
