"""Trainings that went wrong although they are not at chance: their error rises where it should fall.

More visual tokens or a larger LM should not make a model worse. A training that got stuck on a plateau does: it stands out
against the cell with fewer tokens, against a smaller LM with as many, or above the line from its neighbour with fewer tokens
to the one with more.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from vlm_jax.laws.table import Row, spell_pair

log = logging.getLogger(__name__)

CHANCE, OUT_OF_LINE = "chance level", "out of line"  # flags of rows that are not fitted
Cell = TypeVar("Cell", bound=Hashable)

# A rise is ordinary unless it is larger than all three. Between the three seeds of tests/laws/plateau.csv the same cell
# differs by 0.02 to 0.05, or by a quarter where its error is small. Where the reasoning error rises with visual tokens, as
# the miniature's does, a step of four times as many costs 0.084 (26 %) or 0.066 (34 %) at most.
ABSOLUTE = 0.08
RELATIVE = 0.28  # of the smaller error
SIGMAS = 3.0  # standard errors of a difference of two shares of n questions


@dataclasses.dataclass(frozen=True)
class Rise:
    """A row whose error is too far above that of a cell that should be no better."""

    row: Row
    other: Row  # the same benchmark, compressor and seed
    beyond: Row | None = None  # above the line from `other` to this one, with more tokens

    @property
    def limit(self) -> float:
        """The error that the row should not have exceeded; on a line, it falls evenly with the logarithm of the tokens."""
        if self.beyond is None:
            return self.other.error
        low, here, high = (math.log(r.visual_tokens) for r in (self.other, self.row, self.beyond))
        share = (here - low) / (high - low)
        return (1 - share) * self.other.error + share * self.beyond.error

    @property
    def sentence(self) -> str:
        what = (
            f"the {self.other.error:.3f} of {spell_pair(self.other.lm, self.other.visual_tokens)}"
        )
        if self.beyond is not None:
            what = f"{self.limit:.3f}, the line from {what} to the {self.beyond.error:.3f} with {self.beyond.visual_tokens}"
        return f"{self.row.benchmark} error {self.row.error:.3f} is above {what}"

    @property
    def is_odd(self) -> bool:
        noise = math.hypot(_standard_error(self.row), _standard_error(self.other))
        limit = self.limit
        return self.row.error - limit > max(ABSOLUTE, RELATIVE * limit, SIGMAS * noise)


def rises(rows: Sequence[Row]) -> list[Rise]:
    """The rows that are suspicious, at most one Rise per row, the larger one of two. Flagged rows do not take part.

    Each row is compared, within its benchmark, compressor and seed, with three others:
    - the same LM with the next smaller number of visual tokens. Not with still fewer: a slow rise over all counts is a trend,
      which the law shows, and no failure of one training;
    - the best smaller LM with as many visual tokens;
    - the line from the same LM's next smaller to its next larger number of visual tokens. A power law lies below it.
    A suspicious row is not compared with any more: the larger cells are judged by the next one.
    """
    sound: dict[tuple, list[Row]] = {}
    found = []
    unflagged = [row for row in rows if not row.flag]
    for row in sorted(unflagged, key=lambda row: (row.lm_params, row.visual_tokens)):
        group = sound.setdefault(_run(row), [])
        later = [r for r in unflagged if r.lm == row.lm and r.visual_tokens > row.visual_tokens and _run(r) == _run(row)]  # fmt: skip
        if above := [rise for rise in _comparisons(row, group, later) if rise.is_odd]:
            found.append(min(above, key=lambda rise: rise.limit))
        else:
            group.append(row)
    return found


def _run(row: Row) -> tuple:
    """What rows that are compared have in common."""
    return (row.benchmark, row.family, row.compressor, row.seed, row.train_samples, row.elastic)


def _comparisons(row: Row, sound: Sequence[Row], later: Sequence[Row]) -> list[Rise]:
    """What `row` is compared with. sound: rows before it by (LM size, visual tokens); later: its LM's with more tokens."""
    fewer = [other for other in sound if other.lm == row.lm]
    smaller = [
        other
        for other in sound
        if other.visual_tokens == row.visual_tokens and other.lm_params < row.lm_params
    ]
    nearest = sorted(fewer, key=lambda other: other.visual_tokens)[-1:]
    following = sorted(later, key=lambda other: other.visual_tokens)[:1]
    return [
        *(Rise(row, other) for other in nearest),
        *(Rise(row, other) for other in sorted(smaller, key=lambda other: other.error)[:1]),
        *(Rise(row, a, b) for a in nearest for b in following),
    ]


def _standard_error(row: Row) -> float:
    """Of a share of n questions, drawn half a question towards the middle; 0 where n is unknown."""
    if not row.n:
        return 0.0
    share = (row.error * row.n + 0.5) / (row.n + 1)
    return math.sqrt(share * (1 - share) / row.n)


@dataclasses.dataclass(frozen=True)
class Try:
    """One training of a cell and its evaluation."""

    seed: int
    rows: list[Row]
    fault: str = ""  # why it does not count, a clause

    @property
    def errors(self) -> str:
        return "  ".join(f"{row.benchmark} {row.error:.3f}" for row in self.rows)


def judged(tries: Mapping[Cell, list[Try]]) -> dict[Cell, list[Try]]:
    """The tries, with the rows of last ones flagged whose errors are out of line with those of the other cells."""
    odd = {
        rise.row: rise.sentence
        for rise in rises([row for own in tries.values() for row in own[-1].rows])
    }
    found = {}
    for cell, (*before, last) in tries.items():
        if faults := [odd[row] for row in last.rows if row in odd]:
            rows = [
                dataclasses.replace(row, flag=OUT_OF_LINE) if row in odd else row
                for row in last.rows
            ]
            last = Try(last.seed, rows, " and ".join(faults))
            log.warning("%s: %s", cell, last.fault)
        found[cell] = [*before, last]
    return found


def stories(tries: Mapping[Cell, list[Try]]) -> list[str]:
    """A sentence about each cell of which a training went wrong: every try and its error, and what came of it."""
    told = []
    for cell, own in tries.items():
        if len(own) > 1 or own[-1].fault:
            each = "; seed ".join(f"{one.seed}: {one.fault or one.errors}" for one in own)
            end = "flagged and not fitted" if own[-1].fault else "which counts"
            told.append(f"{cell}, trained with seed {each}, {end}.")
    return told
