"""A plan, in sentences and in tables: what to build for a budget, how firmly the law says so, what would change it.

`planning.py` makes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vlm_jax.costs.chips import GIB
from vlm_jax.costs.price import Budget, Number, Phase, Workload, spelt
from vlm_jax.laws.table import spell_pair
from vlm_jax.laws.words import Table, estimate, span, spoken

LONGEST = 2**17  # text tokens up to which the choice is computed
LARGEST = 1.0  # possible error
BELOW, ABOVE = (
    4,
    3,
)  # the budget: steps of the frontier that a terminal shows; --json and --plot have all of it
HEADS = {"gflops": "GFLOPs", "ms": "ms", "gib": "GiB", "dollars": "$ / 1M"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One (LM, visual tokens) with its cost and predicted error."""

    lm: str
    lm_params: Number
    visual_tokens: int
    cost: float  # in the budget's unit
    flops: float  # of one question
    amounts: Mapping[str, float]  # the cost by kind of budget, for all that are known
    affordable: bool  # within the budget and the memory
    error: float
    # Of the error over the law's resamples, at the fit's level; of an error below 1 it ends at 1.
    interval: tuple[float, float]
    share: float  # of resamples in which this candidate is the best affordable one
    extrapolated: bool  # size or token count outside what was measured

    @property
    def named(self) -> str:
        return spell_pair(self.lm, self.visual_tokens)


class Span(NamedTuple):
    """The choice for Q text tokens from `first` to `last`, both included; nothing is affordable outside of spans."""

    first: int
    last: int
    lm: str  # "" where sizes are free: as large as the budget allows
    visual_tokens: int

    @property
    def named(self) -> str:
        return spell_pair(self.lm, self.visual_tokens) if self.lm else f"V = {self.visual_tokens}"


class Instead(NamedTuple):
    """What the same budget buys if one thing is otherwise; lm is "" when nothing, for a reason."""

    assumption: str
    lm: str
    visual_tokens: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to build for a budget, and how firmly the law says so."""

    family: str
    budget: Budget
    workload: Workload
    method: str  # how cost was counted
    law: str  # the formula of the law that errors are predicted by
    sizes_free: bool
    best: Candidate
    runners_up: tuple[Candidate, ...]  # the next affordable ones by predicted error
    frontier: tuple[Candidate, ...]  # of those that fit in the memory: none cheaper and better
    candidates: tuple[Candidate, ...]  # all of them, cheapest first
    phases: tuple[Phase, ...]  # of the best one, for the whole batch
    by_text_tokens: tuple[Span, ...]  # the choice for other Q at the same budget
    instead: tuple[Instead, ...]
    # V* were LM size and V free: Q beta / (alpha - beta); inf: all; NaN for a law of another form.
    continuous_optimum: float
    statements: tuple[str, ...] = ()  # the answer in words, one sentence each


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
        f"within {plan.budget.text} use {best.named}: predicted error {estimate(best.error, best.interval, '.3f')}; "
        f"{costs}; chosen in {best.share:.0%} of the law's resamples."
    )


def _closed_form(plan: Plan) -> list[str]:
    """Only where cost is N times tokens."""
    if math.isnan(plan.continuous_optimum):
        return [f"errors are predicted by {plan.law}, not by the power law of the fit."]
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
    i = next(i for i, span in enumerate(spans) if span.first <= q <= span.last)
    here, parts = spans[i], []
    if i > 0:
        parts.append(f"it flips to {spans[i - 1].named} below Q = {here.first}")
    if i + 1 < len(spans):
        parts.append(f"it flips to {spans[i + 1].named} above Q = {here.last}")
    elif not plan.sizes_free and here.last < LONGEST:
        parts.append(f"nothing is affordable above Q = {here.last}")
    if parts:
        return f"at {q} {kind} the choice is {here.named}; {'; '.join(parts)}."
    end = f" up to {here.last}" if plan.sizes_free else ""
    return f"the choice is the same for any number of {kind}{end}."


def _over_budget(plan: Plan) -> list[str]:
    """The budgets between which the choice is the same: the frontier's steps."""
    if plan.sizes_free:
        return []
    steps, kind = list(plan.frontier), plan.budget.kind
    cost = spelt(kind, plan.best.cost)
    i = steps.index(plan.best)
    below = f"; below it is {steps[i - 1].named}" if i else ""
    if i + 1 == len(steps):
        return [f"the choice holds from {cost} on{below}."]
    above = steps[i + 1]
    return [
        f"the choice holds from {cost} to {spelt(kind, above.cost)}{below}; from there it is {above.named}."
    ]


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


def of_plans(plans: Mapping[str, Plan], text_tokens: int) -> str:
    """What to build within the budget, by family."""
    if not plans:
        return "The budget buys none of the measured models."
    budget = next(iter(plans.values())).budget.text
    clauses = [
        f"{plan.best.named} for {spoken(family)} (predicted error "
        f"{estimate(plan.best.error, plan.best.interval, '.3f')}, the best in {plan.best.share:.0%} of resamples)"
        for family, plan in plans.items()
    ]
    return f"Within {budget} per question ({text_tokens} text tokens) use {' and '.join(clauses)}."


def shown(plan: Plan) -> dict[str, Sequence[Candidate]]:
    """The candidates that a terminal has room for: the best, the runners-up and the frontier near the budget."""
    split = sum(c.affordable for c in plan.frontier)
    near = plan.frontier[max(0, split - BELOW) : split + ABOVE]
    return {"best": [plan.best], "next": plan.runners_up, "frontier": near}


def candidates_table(plan: Plan, wide: bool) -> Table:
    """Those `shown`, a line each. wide: with every known amount, not the budget's alone."""
    kinds = [plan.budget.kind]
    if wide:
        kinds += [kind for kind in plan.best.amounts if kind not in kinds]
    header = ["", "LM", "tokens", *(HEADS[kind] for kind in kinds), "error", "interval", "chosen"]
    groups = [
        [_line(c, "" if i else mark, kinds, plan) for i, c in enumerate(group)]
        for mark, group in shown(plan).items()
    ]
    return Table(header, [line for group in groups for line in group], [len(g) for g in groups])


def _line(c: Candidate, mark: str, kinds: Sequence[str], plan: Plan) -> list[str]:
    refused = "too dear" if c.cost > plan.budget.limit else "too big"
    return [
        mark, c.lm, str(c.visual_tokens), *(f"{c.amounts[kind]:.4g}" for kind in kinds),
        f"{c.error:.3f}" + ("*" if c.extrapolated else ""), span(c.interval, ".3f"),
        f"{c.share:.0%}" if c.affordable else refused,
    ]  # fmt: skip


def phases_table(plan: Plan) -> Table:
    """What the best candidate's batch does, part by part."""
    chip = plan.budget.chip
    body = [
        [phase.name, f"{phase.flops / 1e9:.4g}", f"{phase.bytes / GIB:.3g}"]
        + ([f"{phase.seconds(chip) * 1e3:.3g}", phase.bounded_by(chip)] if chip else [])
        for phase in plan.phases
    ]
    header = ["phase", "GFLOPs", "GiB moved", *(("ms at least", "bounded by") if chip else ())]
    return Table(header, body)
