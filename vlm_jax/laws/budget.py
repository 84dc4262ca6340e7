"""What may be spent on a question: FLOPs, milliseconds on a chip, memory, or dollars per million questions."""

from __future__ import annotations

import dataclasses
import math

from vlm_jax.costs.chips import CHIPS, GIB, Chip
from vlm_jax.costs.price import Number, Price
from vlm_jax.settings.checks import ConfigError, check_choice, check_positive

UNITS = {"gflops": "GFLOPs", "ms": "ms", "gib": "GiB", "dollars": "$ per 1M questions"}
ON_A_CHIP = ("ms", "dollars")


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
