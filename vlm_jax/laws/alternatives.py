"""Other laws for the same table, so that a user sees which one the data support: criteria, and errors on sizes left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.special import stdtr

from vlm_jax.laws.law import Alternative
from vlm_jax.laws.least_squares import BILLION, Points

Predict = Callable[[Float[np.ndarray, " c"], Float[np.ndarray, " c"]], Float[np.ndarray, " c"]]
Fitter = Callable[[Points], tuple[Predict, dict[str, float]] | None]

POWER = "A N^-alpha V^-beta + D"
LOG_LINEAR = "a - b ln N - c ln V"


def compare(
    points: Points, lms: dict[str, float], text_tokens: int | None
) -> tuple[Alternative, ...]:
    """Every law of the table below, fitted to the cells with their weights.

    Args:
      lms: name -> parameters in billions, to leave one size out at a time.
      text_tokens: Q; adds the law in Q + V (None: not asked for).
    """
    laws: dict[str, tuple[int, Fitter]] = {
        POWER: (4, _power(None)),
        "A N^-alpha V^-beta": (3, _power(0.0)),
        LOG_LINEAR: (3, _log_linear(interaction=False)),
        LOG_LINEAR + " + d ln N ln V": (4, _log_linear(interaction=True)),
    }
    if text_tokens is not None:
        laws[f"A N^-alpha ({text_tokens}+V)^-beta + D"] = (4, _power(None, text_tokens))
    found = (_judge(name, k, fitter, points, lms) for name, (k, fitter) in laws.items())
    return tuple(law for law in found if law is not None)


def _power(fixed_d: float | None, text_tokens: int = 0) -> Fitter:
    def fitter(points: Points):
        moved = points._replace(tokens=points.tokens + text_tokens)
        if len(points.errors) < 4 - (fixed_d is not None):
            return None
        law = moved.law(fixed_d)

        def predict(size, tokens):
            return law.error(size * BILLION, tokens + text_tokens)

        return predict, dataclasses.asdict(law)

    return fitter


def _log_linear(interaction: bool) -> Fitter:
    """error = a - b ln N - c ln V (+ d ln N ln V), a power law's limit as alpha, beta -> 0 and D -> -infinity."""

    def columns(size, tokens):
        n, v = np.log(size), np.log(tokens)
        return np.stack([np.ones_like(n), -n, -v, n * v][: 4 if interaction else 3], axis=-1)

    def fitter(points: Points):
        root = np.sqrt(points.weights)
        design = columns(points.size, points.tokens) * root[:, None]
        solved, _, rank, _ = np.linalg.lstsq(design, points.errors * root, rcond=None)
        if rank < design.shape[1]:
            return None
        constants: dict[str, float] = {n: float(c) for n, c in zip("abcd", solved, strict=False)}
        if interaction:
            freedom = len(root) - 4
            residual = points.errors * root - design @ solved
            variance = np.linalg.inv(design.T @ design)[3, 3] * (residual @ residual)
            if freedom > 0 and variance > 0:
                t = float(solved[3] / math.sqrt(variance / freedom))
                constants |= {"t of d": t, "p of d": 2 * float(stdtr(freedom, -abs(t)))}
        return (lambda size, tokens: columns(size, tokens) @ solved), constants

    return fitter


def _judge(
    name: str, k: int, fitter: Fitter, points: Points, lms: dict[str, float]
) -> Alternative | None:
    fitted = fitter(points)
    if fitted is None:
        return None
    predict, constants = fitted
    residual = points.errors - predict(points.size, points.tokens)
    sse = float(np.sum(points.weights * residual**2))
    n, free = len(residual), k + 1  # the noise's variance is a parameter too
    fit = n * math.log(max(sse / n, 1e-30))
    return Alternative(
        formula=name,
        constants=constants,
        num_constants=k,
        sse=sse,
        rmse=math.sqrt(sse / n),
        aicc=fit + 2 * free + 2 * free * (free + 1) / (n - free - 1) if n > free + 1 else None,
        bic=fit + free * math.log(n),
        held_out=_held_out(k, fitter, points, lms),
    )


def _held_out(
    k: int, fitter: Fitter, points: Points, lms: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """LM -> (mean, largest) |predicted / measured - 1| over its cells, by the law of the other sizes."""
    errors = {}
    for lm, size in sorted(lms.items(), key=lambda item: item[1]):
        out = points.size == size
        rest = Points(*(a[~out] for a in points))
        if len(np.unique(rest.size)) < 2 or len(rest.errors) <= k:
            continue
        fitted = fitter(rest)
        if fitted is None:
            continue
        measured = np.maximum(points.errors[out], 1e-12)
        off = np.abs(fitted[0](points.size[out], points.tokens[out]) / measured - 1)
        errors[lm] = (float(off.mean()), float(off.max()))
    return errors
