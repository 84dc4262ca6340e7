"""A plan in sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vlm_jax.laws.budget import spelt
from vlm_jax.laws.offer import LONGEST

if TYPE_CHECKING:
    from vlm_jax.laws.planning import Candidate, Plan


LARGEST = 1.0  # error


def statements(plan: Plan) -> list[str]:
    """The answer, how it changes with Q, the budget and the way of counting; one line each."""
    lines = [_answer(plan), *_closed_form(plan), _over_text_tokens(plan), *_over_budget(plan)]
    lines += _instead(plan)
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


def pair(lm: str, visual_tokens: int) -> str:
    """ "qwen1.5-7b with 16 visual tokens" """
    return f"{lm} with {visual_tokens} visual token{'' if visual_tokens == 1 else 's'}"


def _answer(plan: Plan) -> str:
    best = plan.best
    costs = ", ".join(spelt(kind, amount) for kind, amount in best.amounts.items())
    return (
        f"within {plan.budget.text} use {pair(best.lm, best.visual_tokens)}: predicted error {best.error:.3f} "
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
        return pair(lm, count) if lm else f"V = {count}"

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
    return pair(candidate.lm, candidate.visual_tokens)


def _instead(plan: Plan) -> list[str]:
    own = (plan.best.lm, plan.best.visual_tokens)
    lines = []
    for other in plan.instead:
        if not other.lm:
            outcome = f"there would be no choice: {other.reason}"
        elif (other.lm, other.visual_tokens) == own:
            outcome = "the choice would be the same"
        else:
            outcome = f"the choice would be {pair(other.lm, other.visual_tokens)}"
        lines.append(f"if {other.assumption}, {outcome.rstrip('.')}.")
    return lines
