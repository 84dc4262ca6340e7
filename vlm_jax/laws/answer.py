"""What a sweep answers, in three sentences: which exponent is larger, what to build, what looking at the question buys."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

from vlm_jax.laws.budget import Plan, spell_pair
from vlm_jax.laws.cells import rows_of
from vlm_jax.laws.law import Fit, Interval
from vlm_jax.laws.table import Row, family_mean
from vlm_jax.laws.words import order

LEVEL = 0.95  # of the intervals of errors


class Change(NamedTuple):
    """A cell of a compressor that the law was not fitted to, and the same cell of the law's compressor."""

    own: Sequence[Row]  # one per seed, flagged ones included
    other: Sequence[Row]

    @property
    def mean(self) -> float:
        """How far the other compressor's mean error lies above the law's."""
        return mean_error(self.other) - mean_error(self.own)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the spread over seeds."""
        return len(good(self.own)) + len(good(self.other)) - 2

    @property
    def interval(self) -> Interval | None:
        """Of `mean`: Student's, from the spread over seeds, which both compressors are taken to share.

        With one run each, by the number of questions alone; None where that is not known.
        """
        groups = [[float(row.error) for row in good(runs)] for runs in (self.own, self.other)]
        if self.freedom:
            squares = sum(statistics.pvariance(group) * len(group) for group in groups)
            variance = squares / self.freedom * sum(1 / len(group) for group in groups)
            width = float(stats.t.ppf((1 + LEVEL) / 2, self.freedom))
        else:
            runs = [*good(self.own), *good(self.other)]
            if not all(row.n for row in runs):
                return None
            variance = sum(row.error * (1 - row.error) / row.n for row in runs if row.n)
            width = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
        half = width * math.sqrt(variance)
        return self.mean - half, self.mean + half


def runs_of(rows: Sequence[Row], fit: Fit) -> list[Row]:
    """The rows behind a fit, flagged ones included: one per cell and seed, the mean over benchmarks."""
    return family_mean(rows_of(rows, fit), fit.family)


def good(runs: Sequence[Row]) -> list[Row]:
    """Those that are not flagged; all of them where every one is."""
    return [row for row in runs if not row.flag] or list(runs)


def mean_error(runs: Sequence[Row]) -> float:
    return statistics.fmean(float(row.error) for row in good(runs))


def binomial_interval(error: float, n: int) -> Interval:
    """Of a share of n questions: Wilson's, which stays within 0 and 1."""
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (error + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(error * (1 - error) / n + (z / (2 * n)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def beside(rows: Sequence[Row], fit: Fit, leave_out: Sequence[str] = ()) -> list[Change]:
    """Cells of other compressors that the law's compressor has too, fewest tokens and then largest LM first.

    leave_out: compressors that are none of them.
    """
    own = runs_of(rows, fit)
    names = {row.compressor for row in rows} - {fit.compressor, *leave_out}
    others = [
        row for name in names for row in runs_of(rows, dataclasses.replace(fit, compressor=name))
    ]
    keys = {(row.visual_tokens, -row.lm_params, row.lm, row.compressor) for row in others}
    found = []
    for tokens, _, lm, name in sorted(keys):
        same = [row for row in own if row.cell == (lm, tokens)]
        runs = [row for row in others if (row.cell, row.compressor) == ((lm, tokens), name)]
        if same:
            found.append(Change(same, runs))
    return found


def spoken(family: str) -> str:
    """A family's name inside a sentence."""
    return "OCR" if family == "ocr" else family


def headline(text: str) -> str:
    """With a capital first letter."""
    return text[:1].upper() + text[1:]


def value(fit: Fit, name: str) -> str:
    """ "0.693 [0.548, 0.845]" """
    interval = fit.profile[name]
    return f"{getattr(fit.law, name):.3g}" + (spell(interval, ".3g") if interval else "")


def spell(interval: Interval, form: str) -> str:
    """ " [0.548, 0.845]", as it follows a number"""
    return f" [{interval[0]:{form}}, {interval[1]:{form}}]"


def of_exponents(fits: Mapping[str, Fit]) -> str:
    """Which resource error falls faster with, by family."""
    clauses = []
    for family, fit in fits.items():
        found, share = order(fit, f"{spoken(family)} error"), fit.p_alpha_greater[fit.mode]
        if found is None:
            found = (
                "alpha",
                "beta",
                f"it is not settled what {spoken(family)} error falls faster with",
            )
        else:
            share = max(share, 1 - share)
        large, small, meaning = found
        clauses.append(
            f"{meaning} ({large} = {value(fit, large)}, {small} = {value(fit, small)}, {large} > {small} in {share:.1%} of resamples)"
        )
    return headline("; ".join(clauses)) + "."


def of_plans(plans: Mapping[str, Plan], text_tokens: int) -> str:
    """What to build within the budget, by family."""
    if not plans:
        return "The budget buys none of the measured models."
    budget = next(iter(plans.values())).budget.text
    clauses = [
        f"{spell_pair(plan.best.lm, plan.best.visual_tokens)} for {spoken(family)} (predicted error {plan.best.error:.3f}"
        f"{spell(plan.best.interval, '.3f')}, the best in {plan.best.share:.0%} of resamples)"
        for family, plan in plans.items()
    ]
    return f"Within {budget} per question ({text_tokens} text tokens) use {' and '.join(clauses)}."


def of_looking(found: Mapping[str, Sequence[Change]]) -> str:
    """What a compressor that sees the question changes, with the fewest tokens and the largest LM; "" where none was run."""
    first = {family: pairs[0] for family, pairs in found.items() if pairs}
    if not first:
        return ""
    row = next(iter(first.values())).other[0]
    cell = spell_pair(row.lm, row.visual_tokens)
    clauses = []
    for family, pair in first.items():
        interval = pair.interval
        sure = interval is not None and not interval[0] <= 0 <= interval[1]
        verb = ("lowers" if pair.mean < 0 else "raises") if sure else "does not measurably change"
        span = spell(interval, "+.3f") if interval else ""
        span += "" if pair.freedom else ", one run each"
        clauses.append(
            f"{verb} the {spoken(family)} error ({mean_error(pair.own):.3f} to {mean_error(pair.other):.3f}: "
            f"{pair.mean:+.3f}{span})"
        )
    return f"Looking at the question ({row.compressor}, {cell}) {' and '.join(clauses)}."


def of_elastic(rows: Sequence[Row], fits: Mapping[str, Fit], elastic: Mapping[str, Fit]) -> str:
    """How many trainings each law took, and whether both say the same of the exponents."""
    counts = [
        len({(row.lm, row.seed, row.visual_tokens * per_cell) for f in laws.values() for row in runs_of(rows, f)})
        for laws, per_cell in ((fits, True), (elastic, False))
    ]  # fmt: skip
    clauses = []
    for family, fit in elastic.items():
        found, own = order(fit), order(fits[family])
        same = "not settled by both" if found is None or own is None else "the same" if found == own else "another"  # fmt: skip
        clauses.append(f"{same} for {spoken(family)}")
    return f"{counts[1]} trainings instead of {counts[0]}; the order of the exponents is {' and '.join(clauses)}."
