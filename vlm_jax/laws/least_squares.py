"""error = A N^-alpha V^-beta + D, the cells that it is fitted to, and their least squares.

Least squares by variable projection: many weighted problems at once, deterministic. For given exponents the best A >= 0 and
D >= 0 are a closed form, so the search is over (alpha, beta) alone: a grid over the whole box finds every basin, damped
Gauss-Newton (Kaufman's form of variable projection) finishes from the deepest ones.
The exponents are free in sign within the box: a slightly negative one says that the resource did not help.
`solve_along` holds one constant and fits the others; profile likelihoods are made of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vlm_jax.laws.table import Row

BILLION = 1e9
EXPONENT_BOX = 5.0  # |alpha|, |beta| <= 5 in the fit; a solution on the edge is a jump between two sizes or counts
GRID_SIDE = 41
STARTS = 4  # basins refined per problem
CHUNK = 256  # problems per batch: bounds the grid's memory to about 50 MB

Problems = Float[np.ndarray, "R n"]


def power_law(constants: Any, lm_params: Any, visual_tokens: Any) -> np.ndarray:
    """A N^-alpha V^-beta + D. constants: A, alpha, beta, D; all arguments broadcast; lm_params in parameters."""
    a, alpha, beta, d = constants
    n, v = (np.asarray(x, float) for x in (lm_params, visual_tokens))
    return np.asarray(a * ((n / BILLION) ** -alpha * v**-beta) + d)


@dataclasses.dataclass(frozen=True)
class Law:
    """error = A N^-alpha V^-beta + D, N in billions of parameters."""

    A: float
    alpha: float
    beta: float
    D: float

    def error(self, lm_params: Any, visual_tokens: Any) -> np.ndarray:
        """Predicted error; lm_params in parameters; arguments broadcast."""
        return power_law(dataclasses.astuple(self), lm_params, visual_tokens)

    @property
    def ratio(self) -> float | None:
        """alpha / beta: how many times faster error falls with N than with V; None when either is <= 0."""
        return self.alpha / self.beta if self.alpha > 0 and self.beta > 0 else None


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
    """The measurements behind one law. A cell is one (LM, visual tokens, training samples); its seeds share its weight."""

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
    def samples(self) -> Float[np.ndarray, " c"]:
        """Training samples of each cell; 0 where they are not known."""
        first = np.unique(self.cell_of, return_index=True)[1]
        return np.array([self.rows[i].train_samples or 0 for i in first], float)

    @property
    def points(self) -> Points:
        first = np.unique(self.cell_of, return_index=True)[1]
        return Points(self.size[first], self.tokens[first], self.means, self.cell_weights)

    def weighted(self, weights: Float[np.ndarray, " c"]) -> Cells:
        """The same cells with these weights, brought to mean 1."""
        return dataclasses.replace(self, cell_weights=weights / weights.mean())


class Solutions(NamedTuple):
    """One law per problem: error = A N^-alpha V^-beta + D, N in the unit of `size`."""

    A: Float[np.ndarray, " R"]
    alpha: Float[np.ndarray, " R"]
    beta: Float[np.ndarray, " R"]
    D: Float[np.ndarray, " R"]
    sse: Float[np.ndarray, " R"]  # weighted sum of squared residuals


class _Profile(NamedTuple):
    """The best A and D at given exponents, and what Gauss-Newton needs there."""

    A: Float[np.ndarray, " R"]
    D: Float[np.ndarray, " R"]
    sse: Float[np.ndarray, " R"]
    power: Problems  # N^-alpha V^-beta
    residual: Problems
    d_active: Bool[np.ndarray, " R"]  # D is strictly positive and fitted
    a_fitted: Bool[np.ndarray, " R"]


def solve(
    size: Float[np.ndarray, " n"],
    tokens: Float[np.ndarray, " n"],
    errors: Problems,
    weights: Problems,
    fixed_d: Float[np.ndarray, " R"] | None = None,
) -> Solutions:
    """The least-squares law of each of R problems over the same n points.

    Args:
      size, tokens: N and V of each point, positive, in any unit (A depends on the unit of N).
      errors, weights: one row per problem; a weight of 0 leaves the point out.
      fixed_d: D per problem; None fits D >= 0.
    """
    x = np.log(size), np.log(tokens)
    rows = [slice(i, i + CHUNK) for i in range(0, len(errors), CHUNK)]
    parts = [
        _solve(*x, errors[r], weights[r], None if fixed_d is None else fixed_d[r]) for r in rows
    ]
    return Solutions(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def solve_along(
    size: Float[np.ndarray, " n"],
    tokens: Float[np.ndarray, " n"],
    errors: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    starts: Float[np.ndarray, "R K 2"],
    direction: Float[np.ndarray, "R 2"] | None = None,
    fixed_a: Float[np.ndarray, " R"] | None = None,
    fixed_d: float | None = None,
) -> Solutions:
    """The least-squares law of one table under each of R constraints, from the best of K starts per constraint.

    Args:
      starts: (alpha, beta); direction: they may move along this line only; None: freely.
      fixed_a: A, for N in the unit of `size`; None fits A >= 0. fixed_d: None fits D >= 0.
    """
    x = np.stack([np.log(size), np.log(tokens)])
    fit_d, offset = fixed_d is None, 0.0 if fixed_d is None else fixed_d
    num, k, _ = starts.shape
    y, w = (np.broadcast_to(a, (num * k, len(a))) for a in (errors - offset, weights))
    spread_a = None if fixed_a is None else np.repeat(fixed_a, k)
    sse = _profile(x, y, w, starts.reshape(num * k, 2), fit_d, spread_a).sse.reshape(num, k)
    best = starts[np.arange(num), sse.argmin(1)]
    best = _refine(x, y[:num], w[:num], best, fit_d, direction, fixed_a)
    final = _profile(x, y[:num], w[:num], best, fit_d, fixed_a)
    return Solutions(final.A, best[:, 0], best[:, 1], final.D + offset, final.sse)


def exponent_axis() -> Float[np.ndarray, " g"]:
    """Values of one exponent over the whole box: about linear below 0.05, logarithmic above."""
    knee = 0.05
    return knee * np.sinh(np.linspace(-1, 1, GRID_SIDE) * np.arcsinh(EXPONENT_BOX / knee))


def _solve(log_n, log_v, errors, weights, fixed_d) -> Solutions:
    offset = np.zeros(len(errors)) if fixed_d is None else fixed_d
    y, fit_d = errors - offset[:, None], fixed_d is None
    mean_n, mean_v = log_n.mean(), log_v.mean()
    x = np.stack([log_n - mean_n, log_v - mean_v])  # centred: A and the exponents decouple
    starts = _grid_starts(x, y, weights, fit_d)  # [R K 2]
    num, k, _ = starts.shape
    y_k, w_k = np.repeat(y, k, axis=0), np.repeat(weights, k, axis=0)
    exponents = _refine(x, y_k, w_k, starts.reshape(num * k, 2), fit_d)
    sse = _profile(x, y_k, w_k, exponents, fit_d).sse.reshape(num, k)
    best = exponents.reshape(num, k, 2)[np.arange(num), sse.argmin(1)]
    final = _profile(x, y, weights, best, fit_d)
    alpha, beta = best.T
    scale = np.exp(alpha * mean_n + beta * mean_v)
    return Solutions(final.A * scale, alpha, beta, final.D + offset, final.sse)


def _grid_starts(x, y, w, fit_d) -> Float[np.ndarray, "R K 2"]:
    """The deepest local minima of the profiled error over an asinh-spaced grid of exponents."""
    axis = exponent_axis()
    alpha, beta = (a.ravel() for a in np.meshgrid(axis, axis, indexing="ij"))
    shift = -np.outer(alpha, x[0]) - np.outer(beta, x[1])
    power = np.exp(shift - shift.max(1, keepdims=True))  # scaled to at most 1; A absorbs the scale
    s, sy, syy = w.sum(1)[:, None], (w * y).sum(1)[:, None], (w * y * y).sum(1)[:, None]
    sx, sxx, sxy = w @ power.T, w @ (power**2).T, (w * y) @ power.T
    sse = syy - np.maximum(sxy, 0) ** 2 / np.maximum(sxx, 1e-300)  # D = 0
    if fit_d:
        var, cov = sxx - sx**2 / s, sxy - sx * sy / s
        a = cov / np.maximum(var, 1e-300)
        inside = (var > 1e-12 * sxx) & (a >= 0) & (sy >= a * sx)
        sse = np.where(inside, syy - sy**2 / s - a * cov, sse)
    sse = sse.reshape(-1, GRID_SIDE, GRID_SIDE)
    padded = np.pad(sse, ((0, 0), (1, 1), (1, 1)), constant_values=np.inf)
    lowest = np.ones(sse.shape, bool)
    for i in range(3):
        for j in range(3):
            lowest &= sse <= padded[:, i : i + GRID_SIDE, j : j + GRID_SIDE]
    ranked = np.where(lowest, sse, np.inf).reshape(len(sse), -1)
    order = np.argpartition(ranked, STARTS, axis=1)[:, :STARTS]
    return np.stack([alpha[order], beta[order]], axis=-1)


def _profile(x, y, w, exponents, fit_d, fixed_a=None) -> _Profile:
    """Non-negative least squares for (A, D) at fixed exponents, in closed form."""
    power = np.exp(-exponents @ x)
    s = w.sum(1)
    x_bar, y_bar = (w * power).sum(1) / s, (w * y).sum(1) / s
    d, active = np.zeros(len(y)), np.zeros(len(y), bool)
    if fixed_a is not None:
        a = fixed_a
        if fit_d:
            d = np.maximum(y_bar - a * x_bar, 0.0)
            active = d > 0
    else:
        a = np.maximum((w * power * y).sum(1) / (w * power**2).sum(1), 0.0)
        if fit_d:
            spread = power - x_bar[:, None]
            var = (w * spread**2).sum(1)
            slope = (w * spread * (y - y_bar[:, None])).sum(1) / np.maximum(var, 1e-300)
            level = y_bar - slope * x_bar
            active = (var > 1e-14 * s * x_bar**2) & (slope > 0) & (level > 0)
            a, d = np.where(active, slope, a), np.where(active, level, d)
    residual = y - a[:, None] * power - d[:, None]
    a_fitted = np.full(len(y), fixed_a is None)
    return _Profile(a, d, (w * residual**2).sum(1), power, residual, active, a_fitted)


def _refine(
    x, y, w, exponents, fit_d, direction=None, fixed_a=None, max_steps: int = 200
) -> Float[np.ndarray, "R 2"]:
    """Damped Gauss-Newton on (alpha, beta); a row leaves the batch when it has converged."""
    result = exponents.copy()
    live = np.arange(len(exponents))
    damping = np.full(len(exponents), 1e-3)
    here = _profile(x, y, w, exponents, fit_d, fixed_a)
    for _ in range(max_steps):
        step = _gauss_newton_step(x, w, here, damping, direction)
        if direction is None:
            proposal = np.clip(exponents + step, -EXPONENT_BOX, EXPONENT_BOX)
        else:  # clipping one exponent would leave the line
            room = (EXPONENT_BOX - np.sign(step) * exponents) / np.maximum(np.abs(step), 1e-300)
            proposal = exponents + step * np.minimum(room.min(1, keepdims=True), 1)
        there = _profile(x, y, w, proposal, fit_d, fixed_a)
        better = there.sse <= here.sse
        moved = np.abs(proposal - exponents).max(1)
        gained = here.sse - there.sse
        exponents = np.where(better[:, None], proposal, exponents)
        pairs = zip(there, here, strict=True)
        here = _Profile(*(np.where(better[:, None] if a.ndim == 2 else better, a, b) for a, b in pairs))  # fmt: skip
        damping = np.clip(np.where(better, damping * 0.2, damping * 5), 1e-12, 1e12)
        small = moved < 1e-9 * (1 + np.abs(exponents).max(1))
        done = small | (better & (gained < 1e-14 * (here.sse + 1e-30)) & (damping < 1e-2))
        result[live] = exponents
        if done.all():
            break
        keep = ~done
        live, exponents, damping, y, w = (a[keep] for a in (live, exponents, damping, y, w))
        direction, fixed_a = (None if a is None else a[keep] for a in (direction, fixed_a))
        here = _Profile(*(field[keep] for field in here))
    return result


def _gauss_newton_step(x, w, at: _Profile, damping, direction) -> Float[np.ndarray, "R 2"]:
    """Kaufman's step: the model's derivatives with the fitted linear constants projected out."""
    basis = at.power
    ones = at.d_active[:, None].astype(float)
    mean = (w * basis).sum(1, keepdims=True) / w.sum(1, keepdims=True) * ones
    basis = (basis - mean) * at.a_fitted[:, None]  # orthogonal to the constant where D is fitted
    norm = np.maximum((w * basis**2).sum(1, keepdims=True), 1e-300)
    columns = []
    for coordinate in x:
        column = -at.A[:, None] * at.power * coordinate
        column = column - ones * (w * column).sum(1, keepdims=True) / w.sum(1, keepdims=True)
        columns.append(column - basis * (w * basis * column).sum(1, keepdims=True) / norm)
    p, q = columns
    tiny = 1e-30
    if direction is not None:
        along = p * direction[:, :1] + q * direction[:, 1:]
        square = (w * along**2).sum(1) * (1 + damping) + tiny
        return ((w * along * at.residual).sum(1) / square)[:, None] * direction
    pp = (w * p * p).sum(1) * (1 + damping) + tiny
    qq = (w * q * q).sum(1) * (1 + damping) + tiny
    pq = (w * p * q).sum(1)
    gp, gq = (w * p * at.residual).sum(1), (w * q * at.residual).sum(1)
    det = np.maximum(pp * qq - pq * pq, 1e-60)
    return np.stack([(qq * gp - pq * gq) / det, (pp * gq - pq * gp) / det], axis=-1)
