"""A fit and a plan in sentences, and in tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from vlm_jax.costs.chips import GIB
from vlm_jax.laws.budget import LARGEST, LONGEST, Candidate, Plan, spell_pair, spelt
from vlm_jax.laws.law import CONSTANTS, EXPONENT_BOX, Check, Fit, Law

SETTLED = 2.0  # AICc: laws closer than this are as good as each other (Burnham and Anderson 2002, section 2.6)
HEADS = {"gflops": "GFLOPs", "ms": "ms", "gib": "GiB", "dollars": "$ / 1M"}


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
    lines += _which_law(fit)
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
    ratios = "" if ratio is None else f" and the ratio alpha/beta in {_between(ratio)}"
    stable = "" if steady is None else f", the best ratio in {_between(steady)}"
    return (
        f"{fit.family}: D is not identified: any D in {_between(d)} fits as well at {fit.level:.0%}, which leaves alpha in "
        f"{_between(alpha)}{ratios}; the best alpha for each such D lies in {_between(along)}{stable}; compare the "
        "exponents at D = 0."
    )


def _signs(fit: Fit) -> list[str]:
    lines = []
    for name, what in (("alpha", "LM size"), ("beta", "visual tokens")):
        interval, value = fit.profile[name], getattr(fit.law, name)
        assert interval is not None  # only D and the ratio may have none
        if interval[0] <= 0 <= interval[1]:
            lines.append(
                f"{fit.family}: {name} is not distinguishable from 0 ({fit.level:.0%} interval {_between(interval)})."
            )
        elif value < 0:
            lines.append(f"{fit.family}: {name} = {value:.3g} < 0: error rises with {what} here.")
    if fit.law_nonnegative != fit.law:
        law = fit.law_nonnegative
        lines.append(
            f"{fit.family}: with alpha, beta >= 0 the law is A = {law.A:.3g}, alpha = {law.alpha:.3g}, beta = {law.beta:.3g}, "
            f"D = {law.D:.3g}; SSE x {fit.sse_nonnegative / max(fit.sse, 1e-300):.3g}."
        )
    return lines


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


def _checked(fit: Fit, check: Check) -> str:
    side = "inside" if check.inside else "outside"
    return (
        f"{fit.family}: alpha = {check.law.alpha:g}, beta = {check.law.beta:g} lie {side} the joint {fit.level:.0%} region: "
        f"best A = {check.law.A:.3g}, D = {check.law.D:.3g}, SSE x {check.sse_ratio:.3g}, F = {check.f:.3g} (limit "
        f"{check.f_limit:.3g}), p = {check.p:.2g}."
    )


def _between(pair: tuple[float, float]) -> str:
    return f"[{pair[0]:.3g}, {pair[1]:.3g}]"


def of_plan(plan: Plan) -> list[str]:
    """The answer, how it changes with Q, the budget and the way of counting; one line each."""
    return [f"{plan.family}: {_answer(plan)}", *around(plan)]


def around(plan: Plan) -> list[str]:
    """How the answer changes with what was assumed, and how far it may be trusted; one line each."""
    lines = [*_closed_form(plan), _over_text_tokens(plan), *_over_budget(plan), *_instead(plan)]
    if plan.best.error > LARGEST:
        lines.append(
            "the law predicts an error above 1 there, which no error can be: do not use it."
        )
    elif plan.best.interval[1] >= LARGEST:
        lines.append(
            "the interval is cut off at 1, the largest error there is: the measured cells do not bound the error there."
        )
    if plan.best.extrapolated:
        lines.append(
            "the choice lies outside the measured sizes or token counts: an extrapolation."
        )
    return [f"{plan.family}: {line}" for line in lines]


def _answer(plan: Plan) -> str:
    best = plan.best
    costs = ", ".join(spelt(kind, amount) for kind, amount in best.amounts.items())
    return (
        f"within {plan.budget.text} use {spell_pair(best.lm, best.visual_tokens)}: predicted error {best.error:.3f} "
        f"[{best.interval[0]:.3f}, {best.interval[1]:.3f}]; {costs}; "
        f"chosen in {best.share:.0%} of the law's resamples."
    )


def _closed_form(plan: Plan) -> list[str]:
    """Only where cost is N times tokens."""
    if plan.budget.kind != "gflops":
        return []
    optimum = plan.continuous_optimum
    if math.isinf(optimum):
        return ["alpha <= beta, so at a fixed cost more visual tokens always beat a larger LM."]
    return [
        f"with sizes free, V* = Q beta / (alpha - beta) = {optimum:.3g} at Q = {plan.workload.paid_tokens} "
        "(cost 2 N (Q + V), any budget)."
    ]


def _over_text_tokens(plan: Plan) -> str:
    """Where the choice flips as the prompt grows or shrinks."""
    q, spans = plan.workload.text_tokens, plan.by_text_tokens
    kind = "cached text tokens" if plan.workload.cached else "text tokens"

    def named(lm: str, count: int) -> str:
        return spell_pair(lm, count) if lm else f"V = {count}"

    i = next(i for i, span in enumerate(spans) if span.first <= q <= span.last)
    here, parts = spans[i], []
    if i > 0:
        parts.append(f"it flips to {named(*spans[i - 1][2:])} below Q = {here.first}")
    if i + 1 < len(spans):
        parts.append(f"it flips to {named(*spans[i + 1][2:])} above Q = {here.last}")
    elif not plan.sizes_free and here.last < LONGEST:
        parts.append(f"nothing is affordable above Q = {here.last}")
    if parts:
        return f"at {q} {kind} the choice is {named(*here[2:])}; {'; '.join(parts)}."
    return f"the choice is the same for any number of {kind}" + (
        f" up to {here.last}." if plan.sizes_free else "."
    )


def _over_budget(plan: Plan) -> list[str]:
    """The budgets between which the choice is the same: the frontier's steps."""
    if plan.sizes_free:
        return []
    steps, kind = list(plan.frontier), plan.budget.kind
    cost = spelt(kind, plan.best.cost)
    i = steps.index(plan.best)
    below = f"; below it is {_named(steps[i - 1])}" if i else ""
    if i + 1 == len(steps):
        return [f"the choice holds from {cost} on{below}."]
    above = steps[i + 1]
    return [
        f"the choice holds from {cost} to {spelt(kind, above.cost)}{below}; from there it is {_named(above)}."
    ]


def _named(candidate: Candidate) -> str:
    return spell_pair(candidate.lm, candidate.visual_tokens)


def _instead(plan: Plan) -> list[str]:
    own = (plan.best.lm, plan.best.visual_tokens)
    lines = []
    for other in plan.instead:
        if not other.lm:
            outcome = f"there would be no choice: {other.reason}"
        elif (other.lm, other.visual_tokens) == own:
            outcome = "the choice would be the same"
        else:
            outcome = f"the choice would be {spell_pair(other.lm, other.visual_tokens)}"
        lines.append(f"if {other.assumption}, {outcome.rstrip('.')}.")
    return lines


def constants_table(fit: Fit) -> Table:
    """The constants with the headline intervals; law.json has all of them."""
    modes = list(fit.intervals)
    header = ["value", f"{fit.level:.0%} profile", *(f"over {mode}" for mode in modes), "at D = 0"]
    shown = [0, 1, 2 + modes.index(fit.mode), len(header) - 1]
    grid = Table(box=SIMPLE, pad_edge=False)
    grid.add_column("constant")
    for i in shown:
        grid.add_column(header[i], justify="right")
    for name, texts in constant_rows(fit).items():
        grid.add_row(name, *(texts[i] for i in shown))
    return grid


def constant_rows(fit: Fit) -> dict[str, list[str]]:
    """Per constant, as text: value, profile interval, interval per resampling mode, value at D = 0.

    An unidentified D has no interval from resamples: they all sit at 0 where the table does.
    """
    rows = {}
    for name in CONSTANTS:
        first, last = (_number(_constant(law, name)) for law in (fit.law, fit.law_d_zero))
        spans = [group[name] for group in fit.intervals.values()]
        if name == "D" and not fit.d_identified:
            spans = [None] * len(spans)
        rows[name] = [first, *(_span(s) for s in (fit.profile[name], *spans)), last]
    return rows


def alternatives_table(fit: Fit) -> Table:
    """The laws of other forms beside it, and how well each does."""
    grid = Table(box=SIMPLE, pad_edge=False)
    grid.add_column("law")
    for name in ("k", "RMSE", "+AICc", "+BIC", "one size out", "largest out"):
        grid.add_column(name, justify="right", no_wrap=True)
    least_aicc = min((a.aicc for a in fit.alternatives if a.aicc is not None), default=0.0)
    least_bic = min(a.bic for a in fit.alternatives)
    largest = max(fit.lms, key=lambda lm: fit.lms[lm])
    for law in fit.alternatives:
        out = list(law.held_out.values())
        each = (sum(m for m, _ in out) / len(out), max(w for _, w in out)) if out else None
        grid.add_row(
            law.formula,
            str(law.num_constants),
            f"{law.rmse:.3g}",
            "-" if law.aicc is None else f"{law.aicc - least_aicc:.1f}",
            f"{law.bic - least_bic:.1f}",
            _mean_and_most(each),
            _mean_and_most(law.held_out.get(largest)),
        )
    grid.caption = "+: above the lowest; out: mean / largest relative error of an LM size by the law of the others"
    grid.caption_justify = "left"
    return grid


def _constant(law: Law, name: str) -> float | None:
    return law.ratio if name == "alpha/beta" else getattr(law, name)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _span(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.3g}..{pair[1]:.3g}"


def _mean_and_most(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else " / ".join(f"{100 * share:.3g}%" for share in pair)


def shown(plan: Plan) -> dict[str, Sequence[Candidate]]:
    """The candidates that a terminal has room for: the best, the runners-up and the frontier near the budget."""
    return {"best": [plan.best], "next": plan.runners_up, "frontier": _around(plan)}


def candidates_table(plan: Plan, wide: bool) -> Table:
    """Those `shown`, a line each. wide: with every known amount, not the budget's alone."""
    kinds = [plan.budget.kind]
    if wide:
        kinds += [kind for kind in plan.best.amounts if kind not in kinds]
    grid = Table(box=SIMPLE, pad_edge=False)
    left = ("", "LM")
    for name in (*left, "tokens", *(HEADS[k] for k in kinds), "error", "interval", "chosen"):
        grid.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for mark, group in shown(plan).items():
        for i, c in enumerate(group):
            grid.add_row(
                *_cells(c, mark if i == 0 else "", kinds, plan), end_section=i == len(group) - 1
            )
    return grid


def phases_table(plan: Plan) -> Table:
    """What the best candidate's batch does, part by part."""
    chip = plan.budget.chip
    grid = Table(box=SIMPLE, pad_edge=False)
    grid.add_column("phase", no_wrap=True)
    for name in ("GFLOPs", "GiB moved", *(("ms at least", "bounded by") if chip else ())):
        grid.add_column(name, justify="right", no_wrap=True)
    for phase in plan.phases:
        cells = [phase.name, f"{phase.flops / 1e9:.4g}", f"{phase.bytes / GIB:.3g}"]
        if chip:
            cells += [f"{phase.seconds(chip) * 1e3:.3g}", phase.bounded_by(chip)]
        grid.add_row(*cells)
    return grid


def _around(plan: Plan, below: int = 4, above: int = 3) -> list[Candidate]:
    """The part of the frontier near the budget; --json and --plot show all of it."""
    split = sum(c.affordable for c in plan.frontier)
    return list(plan.frontier[max(0, split - below) : split + above])


def _cells(c: Candidate, mark: str, kinds: Sequence[str], plan: Plan) -> list[str]:
    refused = "too dear" if c.cost > plan.budget.limit else "too big"
    return [
        mark, c.lm, str(c.visual_tokens), *(f"{c.amounts[kind]:.4g}" for kind in kinds),
        f"{c.error:.3f}" + ("*" if c.extrapolated else ""), f"{c.interval[0]:.3f}..{c.interval[1]:.3f}",
        f"{c.share:.0%}" if c.affordable else refused,
    ]  # fmt: skip
