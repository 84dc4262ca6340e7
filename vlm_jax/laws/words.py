"""A fit in sentences and in tables, and what the fits of a sweep answer."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import rich.table
from rich.box import SIMPLE
from scipy import stats

from vlm_jax.laws.law import CONSTANTS, QUESTIONS, Check, Fit, Interval, rows_of
from vlm_jax.laws.least_squares import EXPONENT_BOX, Law
from vlm_jax.laws.table import Row, family_mean, spell_pair

LEVEL = 0.95  # of the intervals of errors
SETTLED = 2.0  # AICc: laws closer than this are as good as each other (Burnham and Anderson 2002, section 2.6)


def of_fit(fit: Fit) -> list[str]:
    """What a fit's numbers say; one sentence each."""
    lines = [_order(fit), *doubts(fit)]
    return lines + [f"{fit.family}: not fitted: {line}." for line in fit.left_out]


def doubts(fit: Fit) -> list[str]:
    """What keeps the constants from being the whole story; one sentence each."""
    lines = []
    if not fit.d_fixed:
        lines.append(_about_d(fit))
    lines += _signs(fit)
    edge = np.mean(np.abs(fit.resamples[:, 1:3]).max(1) >= EXPONENT_BOX)
    if edge > 0:
        lines.append(
            f"{fit.family}: in {edge:.1%} of the resamples an exponent reached the largest value that the fit allows, {EXPONENT_BOX:g}: these errors jump between two sizes or token counts rather than fall as a power law."
        )
    if fit.num_seeds == 1:
        lines.append(
            f"{fit.family}: one seed per cell: the intervals know nothing of run-to-run differences."
        )
    lines += _over_questions(fit)
    lines += _which_law(fit)
    lines += _best_beyond(fit)
    if fit.down_weighted:
        lines.append(
            f"{fit.family}: the robust loss counts these cells less: {'; '.join(fit.down_weighted)}."
        )
    if fit.check is not None:
        lines.append(_checked(fit, fit.check))
    return lines


def order(fit: Fit, error: str = "error") -> tuple[str, str, str] | None:
    """The larger exponent, the smaller one and what that means; None where the resamples do not settle it.

    error: what the last of them calls the error.
    """
    share = fit.p_alpha_greater[fit.mode]
    if 1 - fit.level < share < fit.level:
        return None
    sizes, tokens = ("alpha", "LM size"), ("beta", "visual tokens")
    (large, faster), (small, slower) = (sizes, tokens) if share > 0.5 else (tokens, sizes)
    interval = fit.profile[large]
    if interval is None or interval[0] <= 0:
        return large, small, f"whether {error} falls with {faster} at all is not settled"
    return large, small, f"{error} falls faster with {faster} than with {slower}"


def _order(fit: Fit) -> str:
    share, which = fit.p_alpha_greater[fit.mode], f"{len(fit.resamples)} resamples ({fit.mode})"
    found = order(fit)
    if found is None:
        return f"{fit.family}: the order of alpha and beta is not settled: alpha > beta in {share:.1%} of {which}."
    large, small, meaning = found
    return f"{fit.family}: {large} > {small} in {max(share, 1 - share):.1%} of {which}: {meaning}."


def _about_d(fit: Fit) -> str:
    if fit.d_identified:
        return f"{fit.family}: D = {fit.law.D:.3g} is identified: D = 0 fits significantly worse."
    d, alpha, ratio = fit.profile["D"], fit.profile["alpha"], fit.profile["alpha/beta"]
    along, steady = fit.d_profile["alpha"], fit.d_profile["alpha/beta"]
    assert d is not None and alpha is not None and along is not None  # None only where D is fixed
    ratios = "" if ratio is None else f" and the ratio alpha/beta in {between(ratio)}"
    stable = "" if steady is None else f", the best ratio in {between(steady)}"
    return (
        f"{fit.family}: D is not identified: any D in {between(d)} fits as well at {fit.level:.0%}, which leaves alpha in "
        f"{between(alpha)}{ratios}; the best alpha for each such D lies in {between(along)}{stable}; compare the "
        "exponents at D = 0."
    )


def _signs(fit: Fit) -> list[str]:
    lines = []
    for name, what in (("alpha", "LM size"), ("beta", "visual tokens")):
        interval, value = fit.profile[name], getattr(fit.law, name)
        assert interval is not None  # only D and the ratio may have none
        if interval[0] <= 0 <= interval[1]:
            lines.append(
                f"{fit.family}: {name} is not distinguishable from 0 ({fit.level:.0%} interval {between(interval)})."
            )
        elif value < 0:
            hint = "; is the column error 1 - metric?" if name == "alpha" else ""
            lines.append(
                f"{fit.family}: {name} = {value:.3g} < 0: error rises with {what} here{hint}."
            )
    if fit.law_nonnegative != fit.law:
        law = fit.law_nonnegative
        lines.append(
            f"{fit.family}: with alpha, beta >= 0 the law is A = {law.A:.3g}, alpha = {law.alpha:.3g}, beta = {law.beta:.3g}, "
            f"D = {law.D:.3g}; SSE x {fit.sse_nonnegative / max(fit.sse, 1e-300):.3g}."
        )
    return lines


def _over_questions(fit: Fit) -> list[str]:
    if fit.question_error is None:
        return []
    found = fit.intervals[QUESTIONS]
    spans = ", ".join(f"{name} in {between(span)}" for name, span in found.items() if span)
    shares = ", ".join(f"{share:.0%} {name}" for name, share in fit.question_shares.items())
    return [
        f"{fit.family}: other questions of the same kind would leave {spans} (pictures drawn whole, the same for every cell; "
        f"{shares} of that variance); the standard error of a cell is {fit.question_error:.2g} at most."
    ]


def _which_law(fit: Fit) -> list[str]:
    known = [(law.aicc, law.formula) for law in fit.alternatives if law.aicc is not None]
    if len(known) < 2:
        return [f"{fit.family}: too few cells to compare laws by AICc."]
    known.sort()
    least = known[0][0]
    close = [formula for aicc, formula in known if aicc - least < SETTLED]
    if len(close) == 1:
        return [
            f"{fit.family}: the cells support {close[0]}: AICc {known[1][0] - least:.1f} below the next law, {known[1][1]}."
        ]
    return [
        f"{fit.family}: not settled which law holds: AICc differs by less than {SETTLED:g} between {' and '.join(close)}."
    ]


def _best_beyond(fit: Fit) -> list[str]:
    """Which law predicts an LM size from the others, where every law can be asked."""
    off = {
        law.formula: statistics.fmean(mean for mean, _ in law.held_out.values())
        for law in fit.alternatives
        if law.held_out
    }
    if len(off) < max(2, len(fit.alternatives)):
        return []
    best, fitted = min(off, key=lambda formula: off[formula]), fit.alternatives[0].formula
    return [
        f"{fit.family}: LM sizes left out are predicted best by {best}: {off[best]:.2%} off on average, against "
        f"{off[fitted]:.2%} by {fitted}."
    ]


def _checked(fit: Fit, check: Check) -> str:
    side = "inside" if check.inside else "outside"
    return (
        f"{fit.family}: alpha = {check.law.alpha:g}, beta = {check.law.beta:g} lie {side} the joint {fit.level:.0%} region: "
        f"best A = {check.law.A:.3g}, D = {check.law.D:.3g}, SSE x {check.sse_ratio:.3g}, F = {check.f:.3g} (limit "
        f"{check.f_limit:.3g}), p = {check.p:.2g}."
    )


def between(pair: Interval, form: str = ".3g") -> str:
    """ "[0.548, 0.845]" """
    return f"[{pair[0]:{form}}, {pair[1]:{form}}]"


def estimate(number: float, interval: Interval | None, form: str = ".3g") -> str:
    """ "0.693 [0.548, 0.845]" """
    return f"{number:{form}}" + (f" {between(interval, form)}" if interval else "")


def span(pair: Interval | None, form: str = ".3g") -> str:
    """ "0.548..0.845" """
    return "-" if pair is None else f"{pair[0]:{form}}..{pair[1]:{form}}"


class Table(NamedTuple):
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[int] = ()  # how many rows stand together, from the top

    def on_terminal(self, left: int = 1, caption: str = "") -> rich.table.Table:
        """left: columns of words, before those of numbers."""
        grid = rich.table.Table(box=SIMPLE, pad_edge=False, caption=caption, caption_justify="left")
        for i, name in enumerate(self.header):
            grid.add_column(name, justify="left" if i < left else "right", no_wrap=i > 0)
        ends = set(np.cumsum(self.groups) - 1)
        for i, line in enumerate(self.rows):
            grid.add_row(*line, end_section=i in ends)
        return grid


def constants_table(fit: Fit) -> Table:
    """The constants with the headline intervals; law.json has all of them.

    An unidentified D has no interval from resamples: they all sit at 0 where the table does.
    """
    body = []
    for name in CONSTANTS:
        first, last = (_number(_constant(law, name)) for law in (fit.law, fit.law_d_zero))
        drawn = fit.intervals[fit.mode][name] if name != "D" or fit.d_identified else None
        body.append([name, first, span(fit.profile[name]), span(drawn), last])
        if QUESTIONS in fit.intervals:
            body[-1].append(span(fit.intervals[QUESTIONS][name]))
    header = ["constant", "value", f"{fit.level:.0%} profile", f"over {fit.mode}", "at D = 0", "over questions"]  # fmt: skip
    return Table(header[: len(body[0])], body)


def alternatives_table(fit: Fit) -> Table:
    """The laws of other forms beside it, and how well each does."""
    least_aicc = min((a.aicc for a in fit.alternatives if a.aicc is not None), default=0.0)
    least_bic = min(a.bic for a in fit.alternatives)
    largest = max(fit.lms, key=lambda lm: fit.lms[lm])
    body = []
    for law in fit.alternatives:
        out = list(law.held_out.values())
        each = (sum(m for m, _ in out) / len(out), max(w for _, w in out)) if out else None
        body.append([
            law.formula, str(law.num_constants), f"{law.rmse:.3g}",
            "-" if law.aicc is None else f"{law.aicc - least_aicc:.1f}", f"{law.bic - least_bic:.1f}",
            _mean_and_most(each), _mean_and_most(law.held_out.get(largest)),
        ])  # fmt: skip
    return Table(["law", "k", "RMSE", "+AICc", "+BIC", "one size out", "largest out"], body)


ABOUT_ALTERNATIVES = (
    "+: above the lowest; out: mean / largest relative error of an LM size by the law of the others"
)


def _constant(law: Law, name: str) -> float | None:
    return law.ratio if name == "alpha/beta" else getattr(law, name)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _mean_and_most(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else " / ".join(f"{100 * share:.3g}%" for share in pair)


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


def beside(rows: Sequence[Row], fit: Fit, compressors: Collection[str]) -> list[Change]:
    """Cells of these compressors that the law's compressor has too, fewest tokens and then largest LM first."""
    own = runs_of(rows, fit)
    names = {row.compressor for row in rows if row.compressor in compressors} - {fit.compressor}
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
    found = _constant(fit.law, name)
    return "-" if found is None else estimate(found, fit.profile[name])


def of_exponents(fits: Mapping[str, Fit]) -> str:
    """Which resource error falls faster with, by family."""
    clauses = []
    for family, fit in fits.items():
        found, share = order(fit, f"{spoken(family)} error"), fit.p_alpha_greater[fit.mode]
        if found is None:
            unsettled = f"it is not settled what {spoken(family)} error falls faster with"
            found = ("alpha", "beta", unsettled)
        else:
            share = max(share, 1 - share)
        large, small, meaning = found
        clauses.append(
            f"{meaning} ({large} = {value(fit, large)}, {small} = {value(fit, small)}, {large} > {small} in {share:.1%} of resamples)"
        )
    return headline("; ".join(clauses)) + "."


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
        change = estimate(pair.mean, interval, "+.3f") + ("" if pair.freedom else ", one run each")
        clauses.append(
            f"{verb} the {spoken(family)} error ({mean_error(pair.own):.3f} to {mean_error(pair.other):.3f}: "
            f"{change})"
        )
    return f"Looking at the question ({row.compressor}, {cell}) {' and '.join(clauses)}."


def of_elastic(rows: Sequence[Row], fits: Mapping[str, Fit], elastic: Mapping[str, Fit]) -> str:
    """How many trainings each law took, and whether both say the same of the exponents."""
    counts = [
        len({(row.lm, row.seed, row.visual_tokens * (not row.elastic)) for f in laws.values() for row in runs_of(rows, f)})
        for laws in (fits, elastic)
    ]  # fmt: skip
    clauses = []
    for family in (name for name in elastic if name in fits):
        found, own = order(elastic[family]), order(fits[family])
        same = "not settled by both" if found is None or own is None else "the same" if found == own else "another"  # fmt: skip
        clauses.append(f"{same} for {spoken(family)}")
    name = next(iter(elastic.values())).compressor
    return f"{name}: {counts[1]} trainings instead of {counts[0]}; the order of the exponents is {' and '.join(clauses)}."
