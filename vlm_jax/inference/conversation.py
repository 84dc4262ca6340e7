"""Turns about one or several pictures. What an earlier turn has read stays in the cache: only what is new is read."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from jax.sharding import Mesh

from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.files import ImageSource
from vlm_jax.inference.batching import LENGTH, Batcher, Ticket, texts
from vlm_jax.inference.prompts import Item, Pictures, Prompt, Prompter, listed
from vlm_jax.inference.slots import Sampling, Slots


class Conversation:
    """Made by `Model.chat`. `images` may grow between turns: a new picture belongs to the question asked next."""

    def __init__(
        self,
        prompter: Prompter,
        params: Any,
        mesh: Mesh,
        tokenizer: Tokenizer,
        slots: Slots,
        visual_tokens: int,
        images: Sequence[ImageSource],
        sampling: Sampling,
        max_new_tokens: int,
        system: str | None,
    ):
        self.prompter, self.tokenizer, self.visual_tokens = prompter, tokenizer, visual_tokens
        self.sampling, self.max_new_tokens, self.system = sampling, max_new_tokens, system
        self.images = list(images)
        self.turns: list[tuple[str, str]] = []  # questions and answers so far
        self.ticket: Ticket | None = None  # of the newest turn
        eos_ids = prompter.chat(visual_tokens).closing_ids
        self._batcher = Batcher(slots, params, mesh, eos_ids)
        self._seen: list[int] = []  # of each turn, how many pictures had been shown
        self._held: list[tuple[Item, int]] = []  # what the cache holds, and the slot behind each

    def show(self, images: Pictures) -> None:
        """More pictures, about which the next question is asked."""
        self.images += listed(images)

    def ask(self, question: str) -> str:
        """The answer to the next question. Raises ConfigError as `Model.ask` does; the conversation is then as before."""
        return "".join(self.stream(question))

    def stream(self, question: str) -> Generator[str, None, None]:
        """The answer of `ask` in pieces. Where the iteration is stopped, what was said so far is the turn's answer."""
        turns = [*self.turns, (question, None)]
        seen = [*self._seen, len(self.images)]
        record = self.prompter.record(self.images, turns, self.system, seen)
        items = self.prompter.items(record, self.visual_tokens)
        kept = self._common(items)
        ticket = self._begin(record, items, kept)
        self.ticket = ticket
        answer = ""
        try:
            for piece in texts(ticket, self._batcher, self.tokenizer):
                answer += piece
                yield piece
        finally:
            ticket.finished = ticket.finished or LENGTH
            self._batcher.rows[0] = None
            self._remember(items, ticket)
            if answer.strip():  # a turn without an answer is as if it had not been
                self.turns.append((question, answer))
                self._seen = seen

    def _common(self, items: Sequence[Item]) -> int:
        """How many of the first items the cache holds."""
        pairs = zip(items, self._held, strict=False)
        return next((n for n, (item, (held, _)) in enumerate(pairs) if item != held), min(len(items) - 1, len(self._held)))  # fmt: skip

    def _begin(self, record: Any, items: Sequence[Item], kept: int) -> Ticket:
        """Reads what is new of a conversation into the cache: behind what it holds where there is room, else all of it."""
        room = self._batcher.slots.length
        if kept:
            prompt = self.prompter.rest(record, items[kept:], self.visual_tokens)
            start = self._held[kept - 1][1]
            if start + prompt.width < room:
                return self._read(prompt, start, self._held[:kept], items[kept:])
        prompt = self.prompter.prompt(record, self.visual_tokens)
        return self._read(prompt, 0, [], items)

    def _read(
        self, prompt: Prompt, start: int, before: list[tuple[Item, int]], new: Sequence[Item]
    ) -> Ticket:
        ticket = Ticket(prompt, self.visual_tokens, self.max_new_tokens, self.sampling)
        self._batcher.read(0, ticket, start)
        slot = start + prompt.width - prompt.length
        self._held = list(before)
        for item in new:
            slot += self.visual_tokens if item.token < 0 else 1
            self._held.append((item, slot))
        return ticket

    def _remember(self, items: Sequence[Item], ticket: Ticket) -> None:
        """The answer's tokens are in the cache too, but for its last one."""
        slot = self._held[-1][1]
        written = ticket.slot - slot
        for token in ticket.tokens[:written]:
            slot += 1
            self._held.append((Item(token), slot))
