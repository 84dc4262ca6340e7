"""Given a law and an inference budget: which language model, how many visual tokens?

    python -m vlm_jax.laws.plan --law law.json --budget-gflops 500 --text-tokens 50

The best pair has the least predicted error among those that the budget and the memory allow. The cost of a question is the
paper's 2 N (Q + V) (arXiv 2411.03312, section 3; answer tokens are counted with Q) or, exactly, every part of the model:
see `costs/price.py`. `plan.py` is the command.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vlm_jax.costs.chips import GIB
from vlm_jax.costs.price import (
    Budget,
    Number,
    Price,
    Pricer,
    Workload,
    paper_flops,
    paper_price,
    spelt,
)
from vlm_jax.laws import choice
from vlm_jax.laws.alternatives import POWER, forecast
from vlm_jax.laws.choice import LARGEST, LONGEST, Candidate, Instead, Plan, Span
from vlm_jax.laws.law import Fit, Forecast, benchmarks_of, rows_of
from vlm_jax.laws.least_squares import Law
from vlm_jax.laws.table import Row
from vlm_jax.settings.checks import ConfigError, check_positive
from vlm_jax.settings.presets import size_name

Point = tuple[str, Number, int]  # LM name, its parameters, visual tokens
SIZES = 25  # of a free choice that stand for the whole range on the frontier
PRECISION = 1e-6  # relative, of the largest size a budget buys
ABOUT = 1.2  # costs within this factor of a budget are about equal to it
STOPS = 20  # numbers of text tokens at which the choice is looked up where sizes are free


class Method(NamedTuple):
    """How a cost is counted."""

    name: str
    price: Pricer


PAPER = Method("2 N (Q + V)", paper_price)


@dataclasses.dataclass(frozen=True)
class Offer:
    """Every LM with every token count; or, where sizes are free, every size between two with every token count."""

    lms: Mapping[str, Number]
    visual_tokens: tuple[int, ...]
    free_sizes: tuple[Number, Number] | None = None

    def __post_init__(self):
        if not (self.lms or self.free_sizes) or not self.visual_tokens:
            raise ConfigError(
                "plan: no candidates; give at least one LM and one visual token count."
            )
        sizes = self.free_sizes or ()
        for value in (*self.lms.values(), *sizes):
            check_positive("plan", **{"an LM's size": value})
        for count in self.visual_tokens:
            check_positive("plan", visual_tokens=count)
        if sizes and sizes[0] >= sizes[1]:
            raise ConfigError(
                f"plan: free sizes go from the smaller to the larger, not {sizes[0]:g} to {sizes[1]:g}."
            )

    def points(self, budget: Budget, workload: Workload, price: Pricer) -> list[Point]:
        """All pairs; with free sizes a grid of them, and for each count the largest that the budget buys."""
        if self.free_sizes is None:
            return [(lm, n, v) for lm, n in self.lms.items() for v in self.visual_tokens]
        grid = [float(n) for n in np.geomspace(*self.free_sizes, SIZES)]
        between = [(size_name(n), n, v) for n in grid[1:-1] for v in self.visual_tokens]
        high = [(size_name(grid[-1]), grid[-1], v) for v in self.visual_tokens]
        ends = self.ends(budget, workload, price)
        return [*ends, *between, *(point for point in high if point not in ends)]

    def ends(self, budget: Budget, workload: Workload, price: Pricer) -> list[Point]:
        """With free sizes, for each count the smallest size and the largest that the budget buys: one of them is best."""
        assert self.free_sizes is not None
        low, high = map(float, self.free_sizes)
        found = []
        for v in self.visual_tokens:
            largest = _largest(
                lambda n, v=v: budget.allows(price(size_name(n), n, v, workload)), low, high
            )
            found += [(size_name(n), n, v) for n in dict.fromkeys((low, largest))]
        return found


def _largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest size in [low, high] that fits, to PRECISION; low if none does."""
    steps = math.ceil(math.log(high / low) / PRECISION)
    i = last_that(lambda i: fits(low * (high / low) ** (i / steps)), steps)
    return high if i == steps else low * (high / low) ** (max(i, 0) / steps)


def last_that(fits: Callable[[int], bool], high: int) -> int:
    """The last number from 0 to `high` that fits, of which all smaller ones do too; -1 if none does."""
    return bisect.bisect_left(range(high + 1), True, key=lambda i: not fits(i)) - 1


def optimal_visual_tokens(alpha: float, beta: float, text_tokens: Number) -> float:
    """argmin over V of N^-alpha V^-beta at fixed cost N (Q + V): Q beta / (alpha - beta).

    inf when alpha <= beta (error falls with V all the way); 0 when beta <= 0 (tokens do not help: use the fewest).
    """
    if beta <= 0:
        return 0.0
    return text_tokens * beta / (alpha - beta) if alpha > beta else math.inf


def best_measured_tokens(
    law: Law, counts: Sequence[int], text_tokens: Int[np.ndarray, " q"]
) -> Int[np.ndarray, " q"]:
    """For each Q the count of least error at equal cost where LMs of every size exist: N = C / (Q + V), for any C."""
    v = np.array(counts)
    spent = np.asarray(text_tokens)[:, None] + v
    return v[np.argmin(spent**law.alpha * v**-law.beta, axis=1)]


def choose(
    fit: Fit,
    budget: Budget | Number,
    workload: Workload | int,
    *,
    lms: Mapping[str, Number] | None = None,
    visual_tokens: Sequence[int] | None = None,
    free_sizes: tuple[Number, Number] | None = None,
    method: Method = PAPER,
    other: Method | None = None,
    law_form: str = POWER,
    runners_up: int = 4,
) -> Plan:
    """The candidate of least predicted error that the budget and the memory allow; of equals the cheapest.

    Args:
      budget: a number is FLOPs of one question. workload: a number is its text tokens Q.
      lms, visual_tokens: candidates; None takes those the law was measured on.
      free_sizes: instead of `lms`, every size between two numbers of parameters.
      other: a second way to count, for what it would choose. law_form: see `alternatives.forecast`.
    """
    if not isinstance(budget, Budget):
        budget = Budget("gflops", budget / 1e9)
    if not isinstance(workload, Workload):
        workload = Workload(workload)
    offer = Offer(
        dict(fit.lms if lms is None else lms),
        tuple(sorted(set(fit.visual_tokens if visual_tokens is None else visual_tokens))),
        free_sizes,
    )
    points, law = offer.points(budget, workload, method.price), forecast(fit, law_form)
    prices = [method.price(*point, workload) for point in points]
    found = _candidates(fit, law, budget, points, prices)
    _check_affordable(budget, found)
    ranked = sorted((c for c in found if c.affordable), key=lambda c: (c.error, c.cost))
    best = ranked[0]
    plan = Plan(
        family=fit.family,
        budget=budget,
        workload=workload,
        method=method.name,
        law=law.formula,
        sizes_free=free_sizes is not None,
        best=best,
        runners_up=tuple(ranked[1 : 1 + runners_up]),
        frontier=tuple(_frontier(found, budget)),
        candidates=tuple(found),
        phases=method.price(best.lm, best.lm_params, best.visual_tokens, workload).phases,
        by_text_tokens=tuple(_spans(law, offer, budget, workload, method.price)),
        instead=tuple(_instead(law, offer, budget, workload, method, other)),
        continuous_optimum=math.nan
        if law_form != POWER
        else optimal_visual_tokens(fit.law.alpha, fit.law.beta, workload.paid_tokens),
    )
    return dataclasses.replace(plan, statements=tuple(choice.of_plan(plan)))


def _candidates(
    fit: Fit, law: Forecast, budget: Budget, points: Sequence[Point], prices: Sequence[Price]
) -> list[Candidate]:
    """All points, cheapest first, with the law's errors and how often each is the best."""
    sizes = fit.lms.values()
    params, tokens = (np.array([point[i] for point in points], float) for i in (1, 2))
    errors, drawn = law.error(params, tokens), law.drawn_errors(params, tokens)
    affordable = np.array([budget.allows(price) for price in prices])
    wins = np.zeros(len(points))
    if affordable.any():
        winners = np.flatnonzero(affordable)[drawn[:, affordable].argmin(1)]
        wins = np.bincount(winners, minlength=len(points)) / len(drawn)
    low, high = np.percentile(drawn, [law.tail, 100 - law.tail], axis=0)
    high = np.where(errors > LARGEST, high, np.minimum(high, LARGEST))
    found = [
        Candidate(
            lm, size, count, budget.amount(price), price.flops, budget.amounts(price), bool(affordable[i]),
            float(errors[i]), (float(low[i]), float(high[i])), float(wins[i]),
            not (min(sizes) <= size <= max(sizes) and fit.visual_tokens[0] <= count <= fit.visual_tokens[-1]),
        )
        for i, ((lm, size, count), price) in enumerate(zip(points, prices, strict=True))
    ]  # fmt: skip
    return sorted(found, key=lambda c: (c.cost, c.lm_params, c.visual_tokens))


def _check_affordable(budget: Budget, found: Sequence[Candidate]) -> None:
    """Raises ConfigError when no candidate fits in the memory, or none in the budget. found: cheapest first."""
    if any(c.affordable for c in found):
        return
    fitting = [c for c in found if c.amounts["gib"] * GIB <= budget.memory_bytes]
    if not fitting:
        c = min(found, key=lambda c: c.amounts["gib"])
        raise ConfigError(
            f"plan: nothing fits in {budget.memory_bytes / GIB:.4g} GiB; the smallest candidate, "
            f"{c.named}, takes {c.amounts['gib']:.4g}: add a smaller LM, or more memory."
        )
    c = fitting[0]
    raise ConfigError(
        f"plan: {budget.text} buy nothing; the cheapest candidate, {c.named}, costs "
        f"{spelt(budget.kind, c.cost)}: raise the budget or add a smaller LM."
    )


def _frontier(candidates: Sequence[Candidate], budget: Budget) -> list[Candidate]:
    """Those that fit in the memory and that no cheaper one beats, cheapest first; beyond the budget too."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.cost, c.error)):
        fits = candidate.amounts["gib"] * GIB <= budget.memory_bytes
        if fits and (not kept or candidate.error < kept[-1].error):
            kept.append(candidate)
    return kept


def _best(
    law: Forecast, points: Sequence[Point], budget: Budget, workload: Workload, price: Pricer
) -> Point | None:
    """The choice alone; None if nothing is affordable."""
    priced = [(point, price(*point, workload)) for point in points]
    allowed = [
        (float(law.error(point[1], point[2])), budget.amount(cost), point)
        for point, cost in priced
        if budget.allows(cost)
    ]
    return min(allowed)[2] if allowed else None


def _spans(
    law: Forecast, offer: Offer, budget: Budget, workload: Workload, price: Pricer
) -> list[Span]:
    """The choice for every Q from 0.

    A cost grows with Q and an error does not depend on it, so each given candidate has a last Q at which it is affordable,
    and the choice at Q is the best of those that last so long. Free sizes grow into what a shorter prompt leaves: see
    `_spans_of_free_sizes`.
    """
    if offer.free_sizes is not None:
        return _spans_of_free_sizes(law, offer, budget, workload, price)
    spans: list[Span] = []
    points = offer.points(budget, workload, price)
    longest = max(LONGEST, workload.text_tokens)
    for lm, size, count in sorted(points, key=lambda p: (float(law.error(p[1], p[2])), p[1])):

        def affordable(q: int, point: Point = (lm, size, count)) -> bool:
            return budget.allows(price(*point, dataclasses.replace(workload, text_tokens=q)))

        last, first = last_that(affordable, longest), spans[-1].last + 1 if spans else 0
        if last >= first:
            spans.append(Span(first, last, lm, count))
    return spans


def _spans_of_free_sizes(
    law: Forecast, offer: Offer, budget: Budget, workload: Workload, price: Pricer
) -> list[Span]:
    """As far as 4 Q: the choice at STOPS values of Q and beside the given one, and by bisection where it flips between two.

    A flip is exact; one that is undone before the next stop is not seen.
    """

    @functools.cache
    def count(q: int) -> int:
        now = dataclasses.replace(workload, text_tokens=q)
        best = _best(law, offer.ends(budget, now, price), budget, now, price)
        return 0 if best is None else best[2]

    here, far = workload.text_tokens, max(4 * workload.text_tokens, 256)
    stops = {round(q) for q in np.geomspace(1, far, STOPS)} | {0, max(here - 1, 0), here, here + 1}
    ends = []  # the last Q of every span
    for low, high in itertools.pairwise(sorted(stops)):
        while low < high and count(low) != count(high):
            last = low + last_that(lambda q, a=low: count(a + q) == count(a), high - 1 - low)
            ends.append(last)
            low = last + 1
    firsts = [0, *(last + 1 for last in ends)]
    spans = zip(firsts, [*ends, max(stops)], strict=True)
    return [Span(first, last, "", count(first)) for first, last in spans if count(first)]


def _instead(
    law: Forecast,
    offer: Offer,
    budget: Budget,
    workload: Workload,
    method: Method,
    other: Method | None,
) -> list[Instead]:
    """With the text cached if it is not (and the reverse), and with cost counted the other way."""

    def ask(assumption: str, workload: Workload, price: Pricer) -> Instead:
        try:
            points = offer.points(budget, workload, price)
            best = _best(law, points, budget, workload, price)
        except ConfigError as error:  # a size without shapes, a count the compressor cannot give
            return Instead(assumption, "", 0, str(error))
        if best is None:
            return Instead(assumption, "", 0, "nothing is affordable")
        return Instead(assumption, best[0], best[2], "")

    found = []
    if workload.text_tokens:
        turned = dataclasses.replace(workload, cached=not workload.cached)
        words = "the text were not cached" if workload.cached else "the text were cached"
        found.append(ask(words, turned, method.price))
    if other is not None:
        found.append(ask(f"cost were {other.name}", workload, other.price))
    return found


class Pair(NamedTuple):
    """An (LM, visual tokens) with its cost."""

    lm: str
    lm_params: Number
    visual_tokens: int
    flops: float  # 2 N (Q + V)


def measured_pairs(rows: Sequence[Row], fits: Mapping[str, Fit], text_tokens: int) -> list[Pair]:
    """The (LM, visual tokens) that every benchmark of every law was measured at, smallest LM first."""
    cells = [
        {row.cell for row in rows_of(rows, fit) if row.benchmark == name and not row.flag}
        for fit in fits.values()
        for name in benchmarks_of(rows, fit)
    ]
    sizes = {lm: params for fit in fits.values() for lm, params in fit.lms.items()}
    shared = sorted(set.intersection(*cells), key=lambda cell: (sizes[cell[0]], cell))
    return [
        Pair(lm, sizes[lm], v, float(paper_flops(sizes[lm], text_tokens, v))) for lm, v in shared
    ]


def equal_pairs(pairs: Sequence[Pair], flops: float | None = None) -> list[Pair]:
    """Of each LM the pair whose cost is nearest to `flops`, if it is within ABOUT of it; smallest LM first.

    flops: None takes the pair's cost that keeps the most LMs, of these the one whose costs differ the least.
    """

    def near(cost: float) -> list[Pair]:
        def distance(pair: Pair) -> float:
            return abs(math.log(pair.flops / cost))

        by_lm = [[p for p in pairs if p.lm == lm] for lm in dict.fromkeys(p.lm for p in pairs)]
        nearest = [min(own, key=distance) for own in by_lm]
        return [pair for pair in nearest if distance(pair) <= math.log(ABOUT)]

    def even(found: list[Pair]) -> float:
        costs = [pair.flops for pair in found]
        return min(costs, default=0) / max(costs, default=1)

    choices = [near(pair.flops) for pair in pairs] if flops is None else [near(flops)]
    found = max(choices, key=lambda found: (len(found), even(found)), default=[])
    if len(found) < 2:
        where = "of any one cost" if flops is None else f"of {flops / 1e9:g} GFLOPs"
        raise ConfigError(
            f"plot: fewer than 2 LMs have a cell within {ABOUT - 1:.0%} {where}; "
            "measure more token counts, or give another --budget-gflops."
        )
    return found
