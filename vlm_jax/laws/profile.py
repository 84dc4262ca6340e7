"""Profile likelihood: which values of a constant, or of both exponents, fit a table about as well as the best ones.

A value is kept when the best law that has it is not significantly worse: F test on the rise of the weighted sum of squares
(Bates and Watts 1988, "Nonlinear Regression Analysis and Its Applications", section 6.1). Unlike a symmetric interval this
follows a flat direction as far as it goes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float
from scipy.special import fdtrc, fdtri

from vlm_jax.laws.cells import Cells, Points
from vlm_jax.laws.law import EXPONENT_BOX, Check, Law
from vlm_jax.laws.least_squares import Solutions, exponent_axis, solve, solve_along
from vlm_jax.laws.runs import Effect, effects

Interval = tuple[float, float]
OUTWARD = 2.0 ** np.arange(-8, 18)  # steps from the optimum, in units of `scale`
BETWEEN = 9  # points tried between the last value inside and the first outside


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
