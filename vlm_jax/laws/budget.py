"""What may be spent on a question (FLOPs, milliseconds on a chip, memory, dollars per million), and a plan made for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from vlm_jax.costs.chips import CHIPS, GIB, Chip
from vlm_jax.costs.price import Number, Phase, Price, Workload
from vlm_jax.settings.checks import ConfigError, check_choice, check_positive

UNITS = {"gflops": "GFLOPs", "ms": "ms", "gib": "GiB", "dollars": "$ per 1M questions"}
ON_A_CHIP = ("ms", "dollars")
LONGEST = 2**17  # text tokens up to which the choice is computed
LARGEST = 1.0  # possible error


def spelt(kind: str, amount: Number) -> str:
    """ "50 ms", "$3.5 per 1M questions" """
    return f"${amount:.4g} per 1M questions" if kind == "dollars" else f"{amount:.4g} {UNITS[kind]}"


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit in the unit of its kind, and the memory beside it: the chip's, or less if `memory_gib` says so."""

    kind: str  # a key of UNITS
    limit: Number
    chip: Chip | None = None
    chip_hour_dollars: Number | None = None
    memory_gib: Number | None = None

    def __post_init__(self):
        check_choice("plan", "budget", self.kind, UNITS)
        check_positive("plan", **{f"the budget in {self.unit}": self.limit})
        if self.memory_gib is not None:
            check_positive("plan", **{"the budget in GiB": self.memory_gib})
        if self.chip_hour_dollars is not None:
            check_positive("plan", chip_hour_dollars=self.chip_hour_dollars)
        if self.kind in ON_A_CHIP and self.chip is None:
            raise ConfigError(
                f"plan: a budget in {self.unit} needs a chip; use one of {', '.join(c.name for c in CHIPS)}."
            )
        if self.kind == "dollars" and self.chip_hour_dollars is None:
            raise ConfigError(
                "plan: a budget in dollars needs chip_hour_dollars, what an hour of one chip costs."
            )

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

    @property
    def memory_bytes(self) -> float:
        """What a model may take; inf where nothing limits it."""
        own = math.inf if self.memory_gib is None else self.memory_gib * GIB
        return min(own, math.inf if self.chip is None else self.chip.hbm_bytes)

    @property
    def text(self) -> str:
        """ "50 ms on a H100" """
        where = f" on a {self.chip.name}" if self.chip else ""
        beside = "" if self.memory_gib is None else f" with {self.memory_gib:.4g} GiB"
        return f"{spelt(self.kind, self.limit)}{where}{beside}"

    def allows(self, price: Price) -> bool:
        return self.amount(price) <= self.limit and price.memory_bytes <= self.memory_bytes

    def amount(self, price: Price) -> float:
        """What a price comes to, in the budget's unit."""
        return self.amounts(price)[self.kind]

    def amounts(self, price: Price) -> dict[str, float]:
        """In every unit for which chip and price are known."""
        found = {"gflops": price.flops / 1e9, "gib": price.memory_bytes / GIB}
        if self.chip:
            found["ms"] = price.seconds(self.chip) * 1e3
            if self.chip_hour_dollars is not None:
                found["dollars"] = price.dollars(self.chip, self.chip_hour_dollars)
        return found


def find_chip(name: str) -> Chip:
    """By the name in `chips.CHIPS`; ConfigError for another."""
    table = {chip.name: chip for chip in CHIPS}
    check_choice("plan", "chip", name, table)
    return table[name]


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


class Span(NamedTuple):
    """The choice for Q text tokens from `first` to `last`, both included; nothing is affordable outside of spans."""

    first: int
    last: int
    lm: str  # "" where sizes are free: as large as the budget allows
    visual_tokens: int


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
    sizes_free: bool
    best: Candidate
    runners_up: tuple[Candidate, ...]  # the next affordable ones by predicted error
    frontier: tuple[Candidate, ...]  # of those that fit in the memory: none cheaper and better
    candidates: tuple[Candidate, ...]  # all of them, cheapest first
    phases: tuple[Phase, ...]  # of the best one, for the whole batch
    by_text_tokens: tuple[Span, ...]  # the choice for other Q at the same budget
    instead: tuple[Instead, ...]
    continuous_optimum: float  # V* were LM size and V free: Q beta / (alpha - beta); inf: all
    statements: tuple[str, ...] = ()  # the answer in words, one sentence each; see `words.py`


def spell_pair(lm: str, visual_tokens: int) -> str:
    """ "qwen1.5-7b with 16 visual tokens" """
    return f"{lm} with {visual_tokens} visual token{'' if visual_tokens == 1 else 's'}"
