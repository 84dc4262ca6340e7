"""Which pairs of language model and token count a plan may choose from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vlm_jax.costs.price import Number, Pricer, Workload
from vlm_jax.laws.budget import Budget
from vlm_jax.laws.table import size_name
from vlm_jax.settings.checks import ConfigError, check_positive

Point = tuple[str, Number, int]  # LM name, its parameters, visual tokens
LONGEST = 2**17  # text tokens up to which a choice is followed
SIZES = 25  # of a free choice that stand for the whole range on the frontier
PRECISION = 1e-6  # relative, of the largest size a budget buys


@dataclass(frozen=True)
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
    if not fits(low):
        return low
    if fits(high):
        return high
    while high / low > 1 + PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def last_that(fits: Callable[[int], bool], high: int) -> int:
    """The last number from 0 to `high` that fits, of which all smaller ones do too; -1 if none does."""
    low = -1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
