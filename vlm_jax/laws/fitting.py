"""From the rows of errors.csv to the law error = A / (N^alpha V^beta) + D of each family, with honest intervals.

N is lm_params in billions, V the visual tokens (arXiv 2411.03312, equation 2; its fit uses V alone, the text tokens enter
only the cost). Least squares, see `least_squares.py`, with every (LM, visual tokens) cell weighted equally, by how many
questions it was asked, or less where it lies far from the law. Every row left out is named. A and D are >= 0.
The exponents are free in sign: a table in which more tokens hurt says so with beta < 0, and the law under alpha, beta >= 0
stands beside it (`law_nonnegative`), as do laws of other forms (`alternatives.py`).

The headline intervals are profile likelihoods; repeated seeds widen them by what a training run's luck adds. Beside them
stand bootstraps. *Cells*: which (LM, V) pairs were measured. *Seeds*: which training runs; drawn per LM size, whole, because
one seed's language model is shared by all its token counts. *Residuals*: takes the law and independent noise
for granted. Intervals are widened for small numbers, see `uncertainty.py`.
docs/law_coverage.csv says how often each kind of interval covers the truth.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vlm_jax.costs.price import Number
from vlm_jax.laws import questions, table, uncertainty, words
from vlm_jax.laws.alternatives import compare
from vlm_jax.laws.law import CONSTANTS, QUESTIONS, Fit, Interval
from vlm_jax.laws.least_squares import BILLION, Cells, Law, Solutions, solve
from vlm_jax.laws.questions import Without
from vlm_jax.laws.table import Row
from vlm_jax.laws.uncertainty import MODES, RESIDUALS, Profiles, profile
from vlm_jax.settings.checks import ConfigError

WEIGHTS, LOSSES = ("even", "binomial"), ("squares", "huber")
PROFILE_POINTS = 21  # values of D looked at along the flat direction
HUBER = 1.345  # standard deviations; 95 % efficient on normal noise (Huber and Ronchetti 2009)
TO_SIGMA = 1.4826  # median absolute deviation -> standard deviation of normal noise
MAX_ROUNDS = 500
SETTLED = 1e-7  # the largest change of a constant in a round that ends the search


def fit_family(
    rows: Sequence[Row],
    family: str,
    *,
    benchmark: str | None = None,
    compressor: str | None = None,
    elastic: bool | None = None,
    fixed_d: Number | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    weights: str = "even",
    loss: str = "squares",
    text_tokens: int | None = None,
    check: tuple[float, float] | None = None,
    without: Without | None = None,
) -> Fit:
    """Fits one family's law; flagged rows and those of other trainings are left out and named in `left_out`.

    Args:
      benchmark: fits this benchmark alone, or the mean over several with commas between; None over all of the family's.
      compressor; elastic (of trainings that each served several numbers of visual tokens): None takes those with the most rows.
      fixed_d: None fits D >= 0.
      draws, seed: of the bootstrap; the same numbers give the same intervals.
      weights: of the cells, even or binomial (from n). loss: squares or huber; see `binomial` and `huber`.
      text_tokens: Q; compares the law in Q + V too. check: (alpha, beta) to test against the joint region.
      without: of `questions.read`; adds intervals over questions.
    """
    _check_options(level, draws, fixed_d, text_tokens, weights, loss)
    constants = 4 if fixed_d is None else 3
    cells = weighed(
        select(rows, family, benchmark, compressor, constants, elastic), weights, loss, fixed_d
    )
    points, profiles = cells.points, profile(cells, fixed_d)
    law, sse = profiles.law, profiles.sse
    predicted = law.error(points.size * BILLION, points.tokens)
    nonnegative, sse_nonnegative = profiles.nonnegative()
    billions = {row.lm: row.lm_params / BILLION for row in cells.rows}
    asked = _of_benchmark(rows, family, benchmark)
    found = Fit(
        family=family,
        **_measured(cells, asked),
        law=law,
        law_d_zero=points.law(0.0),
        law_nonnegative=nonnegative,
        sse_nonnegative=sse_nonnegative,
        d_fixed=fixed_d is not None,
        sse=sse,
        r2=1 - sse / max(points.scatter, 1e-30),
        max_relative_error=points.max_relative_error(predicted),
        num_cells=len(points.errors),
        num_seeds=len({row.seed for row in cells.rows}),
        level=level,
        **_bootstraps(cells, predicted, constants, draws, seed, fixed_d, level),
        d_profile=_profile_d(profiles, level),
        profile={name: profiles.interval(name, level) for name in CONSTANTS},
        alternatives=compare(points, billions, text_tokens, cells.samples),
        weights=weights,
        loss=loss,
        down_weighted=() if loss == "squares" else _down_weighted(cells),
        check=None if check is None else profiles.check(*check, level),
        cells=tuple(zip(*(a.tolist() for a in (*points, cells.samples)), strict=True)),
    )
    if without is not None:
        found = _with_questions(found, questions.jackknife(cells, asked, without, fixed_d, level))
    return dataclasses.replace(found, statements=tuple(words.of_fit(found)))


def _measured(cells: Cells, asked: Sequence[Row]) -> dict[str, Any]:
    """What a fit says of its cells, by the names of its fields. asked: the rows of single benchmarks."""
    first = cells.rows[0]
    return {
        "benchmark": first.benchmark,
        "benchmarks": tuple(sorted({row.benchmark for row in asked})),
        "compressor": first.compressor,
        "elastic": first.elastic,
        "lms": {row.lm: row.lm_params for row in cells.rows},
        "visual_tokens": tuple(sorted({row.visual_tokens for row in cells.rows})),
        "left_out": cells.left_out,
    }


def _with_questions(fit: Fit, over: questions.OverQuestions) -> Fit:
    intervals = fit.intervals | {QUESTIONS: over.intervals}
    return dataclasses.replace(
        fit, intervals=intervals, question_error=over.largest, question_shares=over.shares
    )


def fit_table(rows: Sequence[Row], **options: Any) -> dict[str, Fit]:
    """`fit_family` for every family of the table, by name."""
    return {
        family: fit_family(rows, family, **options)
        for family in dict.fromkeys(r.family for r in rows)
    }


def select(
    rows: Sequence[Row],
    family: str,
    benchmark: str | None,
    compressor: str | None,
    constants: int,
    elastic: bool | None = None,
) -> Cells:
    """The family's rows of one compressor and one kind of training, flagged ones left out.

    Args:
      benchmark, compressor, elastic: see `fit_family`.
      constants: how many the law has; raises ConfigError when the cells cannot determine them.
    """
    rows = _of_benchmark(rows, family, benchmark)
    kind, left_out = _choose_kind(rows, family, compressor, elastic)
    rows = table.family_mean([row for row in rows if (row.compressor, row.elastic) == kind], family)
    left_out += [
        f"{row.lm}, {row.visual_tokens} visual tokens, seed {row.seed} (error {row.error:.3f}): flagged {row.flag!r}"
        for row in rows
        if row.flag
    ]
    used = [row for row in rows if not row.flag]
    _check(used, family, constants, flagged=len(rows) - len(used))
    keys = [(*row.cell, row.train_samples) for row in used]
    index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    cell_of = np.array([index[key] for key in keys])
    return Cells(tuple(used), tuple(left_out), cell_of, np.ones(len(index)))


def _of_benchmark(rows: Sequence[Row], family: str, benchmark: str | None) -> list[Row]:
    """benchmark: one, or several with commas between; None: all."""
    own = [row for row in rows if row.family == family]
    if not own:
        has = sorted({row.family for row in rows})
        raise ConfigError(f"fit: family {family!r} is not in the table; it has {has}.")
    has = sorted({row.benchmark for row in own})
    wanted = has if benchmark is None else benchmark.split(",")
    for name in wanted:
        if name not in has:
            raise ConfigError(f"fit: benchmark {name!r} is not in family {family!r}; it has {has}.")
    return [row for row in own if row.benchmark in wanted]


def _choose_kind(
    rows: Sequence[Row], family: str, compressor: str | None, elastic: bool | None
) -> tuple[tuple[str, bool], list[str]]:
    """The compressor and the kind of training that are fitted, and a line for each that is left out."""
    counts = Counter((row.compressor, row.elastic) for row in rows)
    has = sorted({name for name, _ in counts})
    if compressor not in (None, *has):
        raise ConfigError(
            f"fit: compressor {compressor!r} is not in family {family!r}; it has {has}."
        )
    found = [
        (kind, count)
        for kind, count in counts.most_common()
        if compressor in (None, kind[0]) and elastic in (None, kind[1])
    ]
    if not found:
        raise ConfigError(
            f"fit: family {family!r} has no row of {compressor or 'any compressor'} with elastic = {elastic}; leave --elastic out."
        )
    if len(found) > 1 and found[0][1] == found[1][1]:
        if found[0][0][0] == found[1][0][0]:
            raise ConfigError(
                f"fit: family {family!r} holds {found[0][0][0]!r} equally often from elastic trainings and from others; choose "
                "with --elastic yes or no."
            )
        raise ConfigError(
            f"fit: family {family!r} holds {has} equally often; choose one with --compressor."
        )
    chosen = found[0][0]
    return chosen, [
        f"{count} row(s) with compressor {kind[0]!r}{' of elastic trainings' * kind[1]}: the law is fitted to "
        f"{chosen[0]!r}{' of elastic trainings' * chosen[1]} only"
        for kind, count in counts.items()
        if kind != chosen
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


def weighed(cells: Cells, weights: str, loss: str, fixed_d: float | None) -> Cells:
    """The cells with the weights of a fit with these options."""
    cells = binomial(cells) if weights == "binomial" else cells
    return huber(cells, fixed_d) if loss == "huber" else cells


def _check_options(level, draws, fixed_d, text_tokens, weights: str, loss: str) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"fit: level must lie in (0, 1), got {level}.")
    if draws < 100:
        raise ConfigError(f"fit: {draws} draws are too few for an interval; give at least 100.")
    if fixed_d is not None and not 0 <= fixed_d < 1:
        raise ConfigError(f"fit: D must lie in [0, 1), got {fixed_d}.")
    if text_tokens is not None and text_tokens < 1:
        raise ConfigError(f"fit: text_tokens must be at least 1, got {text_tokens}.")
    for name, given, allowed in (("weights", weights, WEIGHTS), ("loss", loss, LOSSES)):
        if given not in allowed:
            raise ConfigError(f"fit: {name} must be one of {', '.join(allowed)}; got {given!r}.")


def _resampled(
    cells: Cells,
    predicted: np.ndarray,
    constants: int,
    draws: int,
    seed: int,
    fixed_d: Number | None,
) -> dict[str, Solutions]:
    """The laws of every bootstrap sample, per mode. A robust fit's weights stay as they are."""
    fixed = None if fixed_d is None else np.full(draws, float(fixed_d))
    errors = np.tile(cells.errors, (draws, 1))
    solved = {
        mode: solve(cells.size, cells.tokens, errors, weights, fixed)
        for mode, weights in uncertainty.resample(cells, constants, draws, seed).items()
    }
    points = cells.points
    errors = uncertainty.resample_residuals(points, predicted, constants, draws, seed)
    even = np.tile(points.weights, (draws, 1))
    return solved | {RESIDUALS: solve(points.size, points.tokens, errors, even, fixed)}


def _bootstraps(
    cells: Cells,
    predicted: np.ndarray,
    constants: int,
    draws: int,
    seed: int,
    fixed_d: Number | None,
    level: float,
) -> dict[str, Any]:
    """What a fit says of its resamples, by the names of its fields."""
    solved = _resampled(cells, predicted, constants, draws, seed, fixed_d)
    tails = {m: uncertainty.expanded_tail(cells, m, constants, level) for m in solved}
    mode = next(m for m in reversed(MODES) if m in solved)  # both, where both can be drawn
    return {
        "intervals": {m: _intervals(s, tails[m], level) for m, s in solved.items()},
        "tails": tails,
        "p_alpha_greater": {m: float(np.mean(s.alpha > s.beta)) for m, s in solved.items()},
        "resamples": np.stack(solved[mode][:4], axis=1),
        "mode": mode,
    }


def _down_weighted(cells: Cells) -> tuple[str, ...]:
    """Cells whose weight is below the largest one's, heaviest cut first."""
    shares = cells.cell_weights / cells.cell_weights.max()
    names = {i: row.cell for i, row in zip(cells.cell_of, cells.rows, strict=True)}
    return tuple(
        f"{names[i][0]}, {names[i][1]} visual tokens ({shares[i]:.0%})"
        for i in np.argsort(shares, kind="stable")
        if shares[i] < 0.995
    )


def _intervals(solved: Solutions, tail: float, level: float) -> dict[str, Interval | None]:
    tails = [tail, 100 - tail]
    out: dict[str, Interval | None] = {
        name: _pair(np.percentile(getattr(solved, name), tails)) for name in CONSTANTS[:4]
    }
    positive = (solved.alpha > 0) & (solved.beta > 0)
    ratio = solved.alpha[positive] / solved.beta[positive]
    out["alpha/beta"] = _pair(np.percentile(ratio, tails)) if positive.mean() >= level else None
    return out


def _pair(values) -> Interval:
    low, high = values
    return float(low), float(high)


def _profile_d(profiles: Profiles, level: float) -> dict[str, Interval | None]:
    """Every D whose best law is not significantly worse, and the other constants of those best laws."""
    spans: dict[str, Any] = dict.fromkeys(CONSTANTS)
    ends = profiles.interval("D", level)
    if ends is None:
        return spans
    solved = profiles.hold("D", np.union1d(np.linspace(*ends, PROFILE_POINTS), [profiles.law.D]))
    spans |= {name: getattr(solved, name) for name in CONSTANTS[:4]}
    if ((solved.alpha > 0) & (solved.beta > 0)).all():
        spans["alpha/beta"] = solved.alpha / solved.beta
    return {name: None if v is None else _pair((v.min(), v.max())) for name, v in spans.items()}
