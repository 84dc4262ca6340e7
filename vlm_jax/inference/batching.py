"""Continuous batching: requests join and leave the rows of one cache between decode steps, first come first served."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlm_jax import sharding
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.inference.prompts import Prompt
from vlm_jax.inference.slots import GREEDY, Sampling, Slots, State, ended
from vlm_jax.models.vlm import Inputs

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"  # why an answer ended


def _ignored(ticket: Ticket) -> None:
    """For a request that nobody watches."""


@dataclasses.dataclass(eq=False)
class Ticket:
    """One answer on its way. Its fields are written by the thread that calls `Batcher.step`; others may set `cancelled`."""

    prompt: Prompt
    visual_tokens: int
    max_new_tokens: int
    sampling: Sampling = GREEDY
    changed: Callable[[Ticket], object] = _ignored  # called after every token and at the end
    tokens: list[int] = dataclasses.field(default_factory=list)  # without the one that closes it
    finished: str = ""  # STOP, LENGTH or CANCELLED
    cancelled: bool = False
    slot: int = 0  # where its next token is written
    # Seconds of time.perf_counter: made, began to be read, first token, last one.
    asked: float = dataclasses.field(default_factory=time.perf_counter)
    began: float = 0.0
    first: float = 0.0
    last: float = 0.0

    @property
    def milliseconds(self) -> dict[str, float]:
        """Time in the queue, of reading the prompt (pictures included), and of all later tokens."""
        spans = {"queue": (self.asked, self.began), "prompt": (self.began, self.first), "decode": (self.first, self.last)}  # fmt: skip
        return {name: 1000 * (end - start) for name, (start, end) in spans.items()}


class Batcher:
    """The rows of a model's cache and the requests that wait for one. `submit` may be called from any thread."""

    def __init__(self, slots: Slots, params: Any, mesh: Mesh, eos_ids: Sequence[int]):
        self.slots, self.params, self.mesh = slots, params, mesh
        self.eos_ids = frozenset(eos_ids)
        self.waiting: collections.deque[Ticket] = collections.deque()
        self.rows: list[Ticket | None] = [None] * slots.rows
        self.state: State = self._empty()

    @property
    def live(self) -> int:
        """Requests that have a row."""
        return sum(ticket is not None for ticket in self.rows)

    def submit(self, ticket: Ticket) -> None:
        self.waiting.append(ticket)

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while self.step():
            pass

    def step(self) -> bool:
        """Reads one waiting prompt, or as many as fit while nothing decodes, and decodes one token for each row.

        False when there was nothing to do.
        """
        self._drop_cancelled()
        before = self.live
        while self.waiting and None in self.rows:
            self._join(self.waiting.popleft())
            if before:
                break
        if self.live:
            self._decode()
        return bool(self.waiting or self.live)

    def abandon(self) -> list[Ticket]:
        """Every request that has not ended, after an error in `step`; the rows are empty again."""
        lost = [*self.waiting, *(ticket for ticket in self.rows if ticket)]
        self.waiting.clear()
        self.rows = [None] * len(self.rows)
        self.state = self._empty()
        return lost

    def _empty(self) -> State:
        with sharding.use(self.mesh):
            return self.slots.empty()

    def _drop_cancelled(self) -> None:
        for ticket in [t for t in list(self.waiting) if t.cancelled]:
            self.waiting.remove(ticket)
            _end(ticket, CANCELLED)
        for row, ticket in enumerate(self.rows):
            if ticket and ticket.cancelled:
                self._leave(row, CANCELLED)

    def _join(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            return _end(ticket, CANCELLED)
        return self.read(self.rows.index(None), ticket)

    def read(self, row: int, ticket: Ticket, start: int = 0) -> None:
        """Reads a request's prompt into a row, behind the first `start` slots that it holds already, and its first token."""
        ticket.began = time.perf_counter()
        with sharding.use(self.mesh):
            inputs = Inputs.from_batch(sharding.put(ticket.prompt.batch, self.mesh))
            given = {"state": self.state, "row": jnp.int32(row), "sampling": on_device(ticket.sampling)}  # fmt: skip
            if start:
                given["start"] = jnp.int32(start)
                self.state, first = self.slots.extend(self.params, inputs, **given)
            else:
                given["visual_tokens"] = ticket.visual_tokens
                self.state, first = self.slots.join(self.params, inputs, **given)
        self.rows[row] = ticket
        ticket.slot = start + ticket.prompt.width
        self._took(row, int(first))

    def _decode(self) -> None:
        rows = max(row for row, ticket in enumerate(self.rows) if ticket) + 1
        slots = max(ticket.slot for ticket in self.rows if ticket) + 1
        with sharding.use(self.mesh):
            self.state, chosen = self.slots.step(self.params, self.state, rows, slots)
        tokens = np.asarray(chosen)
        for row, ticket in enumerate(self.rows[: len(tokens)]):
            if ticket:
                ticket.slot += 1
                self._took(row, int(tokens[row]))

    def _took(self, row: int, token: int) -> None:
        """Gives a row's request its next token, or ends it."""
        ticket = self.rows[row]
        assert ticket is not None
        ticket.last = time.perf_counter()
        ticket.first = ticket.first or ticket.last
        if token in self.eos_ids:
            return self._leave(row, STOP)
        ticket.tokens.append(token)
        if len(ticket.tokens) >= ticket.max_new_tokens or ticket.slot >= self.slots.length:
            return self._leave(row, LENGTH)
        ticket.changed(ticket)
        return None

    def _leave(self, row: int, why: str) -> None:
        ticket, self.rows[row] = self.rows[row], None
        self.state = self.state._replace(live=ended(self.state.live, jnp.int32(row)))
        assert ticket is not None
        _end(ticket, why)


def _end(ticket: Ticket, why: str) -> None:
    ticket.finished = why
    ticket.changed(ticket)


def on_device(sampling: Sampling) -> Sampling:
    """As arrays, so that other values are the same program."""
    seed = np.uint32(int(sampling.seed) % 2**32).view(np.int32)
    chances = jnp.float32(sampling.temperature), jnp.float32(sampling.top_p)
    return Sampling(*chances, jnp.asarray(seed))


def texts(ticket: Ticket, batcher: Batcher, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of a request that a batcher has, in pieces, while the batcher is stepped here."""
    text, said = Words(tokenizer), 0
    while True:
        piece, said = text.add(ticket.tokens[said:]), len(ticket.tokens)
        if ticket.finished:
            piece += text.end()
        if piece:
            yield piece
        if ticket.finished:
            return
        batcher.step()


class Words:
    """The text of tokens as they come. What `add` and `end` give, joined, is the whole answer without outer white space."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._tokens, self._said = tokenizer, list[int](), ""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain now: no half character, and no white space that may turn out to be the last."""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens).strip()
        return "" if text.endswith("\ufffd") else self._new(text)

    def end(self) -> str:
        """What is left."""
        return self._new(self._tokenizer.decode(self._tokens).strip())

    def _new(self, text: str) -> str:
        if not text.startswith(self._said):
            return ""
        new, self._said = text[len(self._said) :], text
        return new
