"""Other laws for the same table, so that a user sees which one the data support: criteria, and errors on sizes left out.

A plan can be made with each of them: `forecast`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares, nnls
from scipy.special import stdtr

from vlm_jax.laws.law import Alternative, Fit, Forecast
from vlm_jax.laws.least_squares import BILLION, EXPONENT_BOX, Points, power_law
from vlm_jax.laws.uncertainty import RESIDUALS, resample_residuals
from vlm_jax.settings.checks import ConfigError, check_choice

DRAWS = 200  # resamples of a law that a plan is made with
POWER, SUPPORTED = "power", "supported"
START_EXPONENTS = (
    -0.1,
    0.02,
    0.1,
    0.4,
    1.5,
)  # of each variable, of which all combinations are tried
STARTS = 3  # of these, refined
CLOSE = {"xtol": 1e-10, "ftol": 1e-12, "gtol": 1e-12}

# The variables of a law: parameters in billions, visual tokens, training samples (0 where they are not known).
Variables = Float[np.ndarray, "3 c"]
Constants = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Form:
    """A law's formula, its least-squares fit and its predictions."""

    formula: str  # N in billions
    names: tuple[str, ...]  # of its constants
    # cells and their variables, and constants to start from (None: from anywhere) -> constants; None: the cells cannot
    # determine them
    fit: Callable[[Points, Variables, Constants | None], Constants | None]
    predict: Callable[
        [Any, Any], np.ndarray
    ]  # constants [k ...] and variables [3 ...] -> errors [...]


def _power(fixed_d: float | None, text_tokens: int = 0) -> Form:
    """The law that `fitting.py` fits, and the same in Q + V."""
    names = ("A", "alpha", "beta", "D")[: 4 if fixed_d is None else 3]

    def fit(points: Points, _: Variables, near: Constants | None) -> Constants | None:
        if len(points.errors) < len(names):
            return None
        moved = points._replace(tokens=points.tokens + text_tokens)
        return dataclasses.asdict(moved.law(fixed_d))

    def predict(constants: Any, x: Any) -> np.ndarray:
        given = [*constants] if fixed_d is None else [*constants, fixed_d]
        return power_law(given, x[0] * BILLION, x[1] + text_tokens)

    shown = f"({text_tokens}+V)" if text_tokens else "V"
    floor = " + D" if fixed_d is None else ""
    return Form(f"A N^-alpha {shown}^-beta{floor}", names, fit, predict)


def _log_linear(interaction: bool) -> Form:
    """A power law's limit as alpha, beta -> 0 and D -> -infinity; with interaction, tokens help LMs of other sizes more."""
    names = tuple("abcd" if interaction else "abc")

    def columns(x: Any) -> list[Any]:
        n, v = np.log(x[0]), np.log(x[1])
        return [np.ones_like(n), -n, -v, n * v][: len(names)]

    def fit(points: Points, x: Variables, near: Constants | None) -> Constants | None:
        root = np.sqrt(points.weights)
        design = np.stack(columns(x), axis=-1) * root[:, None]
        solved, _, rank, _ = np.linalg.lstsq(design, points.errors * root, rcond=None)
        if rank < design.shape[1]:
            return None
        constants: Constants = {n: float(c) for n, c in zip(names, solved, strict=True)}
        if interaction:
            freedom = len(root) - 4
            residual = points.errors * root - design @ solved
            variance = np.linalg.inv(design.T @ design)[3, 3] * (residual @ residual)
            if freedom > 0 and variance > 0:
                t = float(solved[3] / math.sqrt(variance / freedom))
                constants |= {"t of d": t, "p of d": 2 * float(stdtr(freedom, -abs(t)))}
        return constants

    def predict(constants: Any, x: Any) -> np.ndarray:
        terms = zip(constants, columns(x), strict=True)
        return np.asarray(sum(constant * column for constant, column in terms))

    more = " + d ln N ln V" if interaction else ""
    return Form("a - b ln N - c ln V" + more, names, fit, predict)


def _sum(formula: str, *terms: Mapping[str, int]) -> Form:
    """A sum of power laws and a constant D >= 0. A term is {its coefficient >= 0: -1, an exponent: its variable, ...}.

    Variable projection: for given exponents the coefficients are a non-negative least squares, so that the search is over
    the exponents alone.
    """
    names = (*itertools.chain(*terms), "D")
    exponents = [(name, of) for term in terms for name, of in term.items() if of >= 0]

    def columns(constants: Mapping[str, Any], x: Any) -> list[Any]:
        """Of each term without its coefficient; exactly 1 for D."""
        made = [
            math.prod(
                (x[of] ** -constants[name] for name, of in term.items() if of >= 0), start=1.0
            )
            for term in terms
        ]
        return [*made, np.ones_like(x[0])]

    def fit(points: Points, x: Variables, near: Constants | None) -> Constants | None:
        distinct = [len(np.unique(x[of])) for _, of in exponents]
        least = 2 if len(terms) == 1 else 3  # a term of its own beside D needs three values
        if len(points.errors) <= len(names) or min(distinct) < least:
            return None
        root = np.sqrt(points.weights)
        target = points.errors * root

        def solve(values: Any) -> tuple[np.ndarray, np.ndarray]:
            given = {name: e for (name, _), e in zip(exponents, values, strict=True)}
            design = np.stack(columns(given, x), axis=-1) * root[:, None]
            scale = np.linalg.norm(design, axis=0)
            found = nnls(design / scale, target)[0] / scale
            return found, design @ found - target

        def residual(values: Any) -> np.ndarray:
            return solve(values)[1]

        if near is None:
            grid = itertools.product(START_EXPONENTS, repeat=len(exponents))
            starts = sorted(grid, key=lambda e: float(np.sum(residual(e) ** 2)))[:STARTS]
            close = CLOSE
        else:
            starts, close = [tuple(near[name] for name, _ in exponents)], {}
        box = (-EXPONENT_BOX, EXPONENT_BOX)
        best = min(
            (least_squares(residual, e, bounds=box, **close) for e in starts), key=lambda s: s.cost
        )
        coefficients = iter(solve(best.x)[0])
        values = iter(best.x)
        made = {n: float(next(values if of >= 0 else coefficients)) for t in terms for n, of in t.items()}  # fmt: skip
        return made | {"D": float(next(coefficients))}

    def predict(constants: Any, x: Any) -> np.ndarray:
        given = dict(zip(names, constants, strict=True))
        coefficients = [*(given[next(iter(term))] for term in terms), given["D"]]
        return np.asarray(
            sum(c * column for c, column in zip(coefficients, columns(given, x), strict=True))
        )

    return Form(formula, names, fit, predict)


_SAMPLES = {"C": -1, "gamma": 2}
FORMS = {
    POWER: _power(None),
    "power-without-d": _power(0.0),
    "log-linear": _log_linear(interaction=False),
    "log-linear-crossed": _log_linear(interaction=True),
    # arXiv 2505.18855 finds that errors of LMs and visual tokens add up rather than multiply.
    "additive": _sum("A N^-alpha + B V^-beta + D", {"A": -1, "alpha": 0}, {"B": -1, "beta": 1}),
}
WITH_SAMPLES = {  # n: training samples, in units of one sample
    "power-samples": _sum(
        "A N^-alpha V^-beta + C n^-gamma + D", {"A": -1, "alpha": 0, "beta": 1}, _SAMPLES
    ),
    "additive-samples": _sum(
        "A N^-alpha + B V^-beta + C n^-gamma + D", {"A": -1, "alpha": 0}, {"B": -1, "beta": 1}, _SAMPLES
    ),
}  # fmt: skip
LAW_FORMS = (*FORMS, *WITH_SAMPLES, SUPPORTED)


def compare(
    points: Points,
    lms: dict[str, float],
    text_tokens: int | None,
    samples: np.ndarray | None = None,
) -> tuple[Alternative, ...]:
    """Every law above, fitted to the cells with their weights.

    Args:
      lms: name -> parameters in billions, to leave one size out at a time.
      text_tokens: Q; adds the law in Q + V (None: not asked for).
      samples: what each cell was trained on; adds the laws in n where it is known and differs between cells.
    """
    known = samples is not None and bool(np.all(samples > 0)) and len(np.unique(samples)) > 1
    forms = [*FORMS.values(), *(WITH_SAMPLES.values() if known else ())]
    if text_tokens is not None:
        forms.append(_power(None, text_tokens))
    x = variables(points, samples)
    found = (_judge(form, points, x, lms) for form in forms)
    return tuple(law for law in found if law is not None)


def variables(points: Points, samples: np.ndarray | None) -> Variables:
    return np.stack(
        [points.size, points.tokens, np.zeros_like(points.size) if samples is None else samples]
    )


def _judge(form: Form, points: Points, x: Variables, lms: dict[str, float]) -> Alternative | None:
    constants = form.fit(points, x, None)
    if constants is None:
        return None
    residual = points.errors - _predicted(form, constants, x)
    sse = float(np.sum(points.weights * residual**2))
    n, free = len(residual), len(form.names) + 1  # the noise's variance is a parameter too
    fit = n * math.log(max(sse / n, 1e-30))
    return Alternative(
        formula=form.formula,
        constants=constants,
        num_constants=len(form.names),
        sse=sse,
        rmse=math.sqrt(sse / n),
        aicc=fit + 2 * free + 2 * free * (free + 1) / (n - free - 1) if n > free + 1 else None,
        bic=fit + free * math.log(n),
        held_out=_held_out(form, points, x, lms),
    )


def _predicted(form: Form, constants: Constants, x: Variables) -> np.ndarray:
    return form.predict([constants[name] for name in form.names], x)


def _held_out(
    form: Form, points: Points, x: Variables, lms: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """LM -> (mean, largest) |predicted / measured - 1| over its cells, by the law of the other sizes."""
    errors = {}
    for lm, size in sorted(lms.items(), key=lambda item: item[1]):
        out = points.size == size
        rest = Points(*(a[~out] for a in points))
        if len(np.unique(rest.size)) < 2 or len(rest.errors) <= len(form.names):
            continue
        constants = form.fit(rest, x[:, ~out], None)
        if constants is None:
            continue
        measured = np.maximum(points.errors[out], 1e-12)
        off = np.abs(_predicted(form, constants, x[:, out]) / measured - 1)
        errors[lm] = (float(off.mean()), float(off.max()))
    return errors


def forecast(fit: Fit, name: str = POWER) -> Forecast:
    """The fit's law, or another one of the same cells with resamples of its residuals.

    name: one of LAW_FORMS; "supported" is the one of the least AICc. A law in n is read off at the most training samples.
    Raises ConfigError where the cells have no such law.
    """
    check_choice("plan", "law_form", name, LAW_FORMS)
    forms = FORMS | WITH_SAMPLES
    fitted = {law.formula: law for law in fit.alternatives}
    known = {n: fitted[form.formula] for n, form in forms.items() if form.formula in fitted}
    if name == SUPPORTED:
        name = min((law.aicc, n) for n, law in known.items() if law.aicc is not None)[1]
    form = forms[name]
    if name == POWER:
        return Forecast(form.formula, fit.law.error, fit.drawn_errors, fit.tails[fit.mode])
    if name not in known:
        raise ConfigError(
            f"plan: law_form {name}: the cells of family {fit.family!r} do not determine {form.formula}; use one of "
            f"{', '.join(known)}."
        )
    if not fit.cells:
        raise ConfigError(
            "plan: this law.json holds no cells to fit another law to; make it again with python -m vlm_jax.laws.fit."
        )
    size, tokens, errors, weights, samples = np.array(fit.cells).T
    points, x = Points(size, tokens, errors, weights), np.stack([size, tokens, samples])
    constants = known[name].constants
    drawn = resample_residuals(points, _predicted(form, constants, x), len(form.names), DRAWS, 0)
    solved = [form.fit(points._replace(errors=row), x, constants) for row in drawn]
    best, resampled = (
        np.array([[law[n] for n in form.names] for law in laws if law is not None]).T[..., None]
        for laws in ([constants], solved)
    )

    def by(values: np.ndarray, lm_params: Any, visual_tokens: Any) -> np.ndarray:
        n, v = (np.asarray(a, float) for a in (lm_params, visual_tokens))
        return form.predict(values, (n / BILLION, v, np.full_like(n, samples.max())))

    return Forecast(
        form.formula,
        functools.partial(by, best[:, 0, 0]),
        functools.partial(by, resampled),
        fit.tails[RESIDUALS],
    )
