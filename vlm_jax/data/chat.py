"""Conversations to ids and exact loss masks.

A record is rendered as segments (text, supervised, turn). All text between two images is tokenised in one call, because
tokens may span segments, and a token is supervised if its first character is. The loss mask comes from character offsets and
never from a search in the rendered text, so a question may contain "ASSISTANT:".
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from vlm_jax.data.records import IMAGE, Record, Turn
from vlm_jax.data.templates import NO_QUERY, QUERIES, TEMPLATES, Chunk, Spans, chunks, render
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.settings.checks import ConfigError, check_choice

CACHED_CHARS = 300  # shorter texts are tokenised once per process
CACHE_SIZE = 1 << 16


class TokenRow(NamedTuple):
    """One sample in T slots; `pipeline` defines the entries."""

    tokens: Int32[np.ndarray, "T"]
    visual_index: Int32[np.ndarray, "T"]
    positions: Int32[np.ndarray, "T"]
    segments: Int32[np.ndarray, "T"]
    loss_mask: Bool[np.ndarray, "T"]


class Unit(NamedTuple):
    """Consecutive slots of a row: text with ids, or (ids None) the visual tokens of one image."""

    ids: np.ndarray | None  # int32 [n]
    loss: np.ndarray  # bool [n]; empty for an image
    segment: int = 0


_IMAGE_UNIT = Unit(None, np.zeros(0, bool))


class Chat:
    """Encodes records for one template, tokenizer and set of sizes; thread-safe and picklable.

    Raises ConfigError if the tokenizer lacks the template's control tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        system: str | None,
        turns: str,
        visual_tokens: int,
        max_tokens: int,
        max_query_tokens: int,
        max_images: int,
        query: str = "first_turn",
    ):
        check_choice("data", "template", template, TEMPLATES)
        self.tokenizer, self.template = tokenizer, TEMPLATES[template]
        for token in self.template.control:
            if not tokenizer.holds(token):
                fits = [name for name, t in TEMPLATES.items() if t.control and all(map(tokenizer.holds, t.control))]  # fmt: skip
                choice = f"use one that it can write ({', '.join(fits)})" if fits else "choose the model's own template"  # fmt: skip
                raise ConfigError(
                    f"data: template {template!r} needs the token {token!r}, which the tokenizer lacks;"
                    f" {choice} or add the token."
                )
        self.system = self.template.system_prompt if system is None else system
        self.independent = turns == "independent"
        self.visual_tokens, self.max_tokens = visual_tokens, max_tokens
        self.max_query_tokens, self.max_images = max_query_tokens, max_images
        self.queries = QUERIES[query]
        self._bos_ids = np.array(tokenizer.bos_ids, np.int32)
        self._bos = Unit(self._bos_ids, np.zeros(len(tokenizer.bos_ids), bool))
        reserved = sorted(
            {*tokenizer.specials, *self.template.control, IMAGE}, key=len, reverse=True
        )
        self._reserved = re.compile("|".join(map(re.escape, reserved)))
        self._make_caches()

    def _make_caches(self) -> None:
        self._cached_chunk = functools.lru_cache(CACHE_SIZE)(self._chunk)
        self._cached_alone = functools.lru_cache(CACHE_SIZE)(self._alone)
        self._cached_header = functools.lru_cache(CACHE_SIZE)(self._header)
        self._cached_query = functools.lru_cache(CACHE_SIZE)(self._query)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_cached")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._make_caches()

    @property
    def closing_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's closing token and the tokenizer's EOS."""
        ids, _ = self.tokenizer.encode(self.template.closing)
        return tuple(sorted({i for i in (self.tokenizer.eos_id, *ids[-1:]) if i is not None}))

    def encode(self, record: Record) -> TokenRow:
        """A training row, right padded to max_tokens; what does not fit is cut, but never inside an image.

        Raises BadRecord: control tokens in the text, too many images, an image that does not fit, no supervised token.
        """
        units = self._units(record)
        row = self.lay_out(record, units, self.max_tokens)
        if not row.loss_mask.any():
            raise record.bad(
                f"no answer fits into max_tokens {self.max_tokens}; raise it or drop the record"
            )
        return row

    def prompt(self, record: Record) -> list[Unit]:
        """A prompt for generation: the record's last turn has no answer. `lay_out` puts it into slots.

        Raises BadRecord as `encode` does, and if the prompt is longer than max_tokens.
        """
        if self.independent and len(record.turns) > 1:
            raise record.bad(
                "turns are independent, but the prompt has earlier turns; ask with turns = 'dialogue'"
            )
        self._check(record)
        units = self._dialogue(record)
        if self.length(units) > self.max_tokens:
            raise record.bad(
                f"the prompt has {self.length(units)} tokens, more than max_tokens {self.max_tokens}"
            )
        return units

    def replies(self, record: Record, texts: Sequence[str]) -> list[np.ndarray]:
        """For each of `texts`, the ids int32 [n] that a model generates as that answer, the closing id included.

        Raises BadRecord where the tokenizer merges the end of the prompt with the beginning of the answer.
        """
        *earlier, last = record.turns
        prompt_ids = self._dialogue(record)[-1].ids
        # None: the prompt ends with an image.
        before = np.zeros(0, np.int32) if prompt_ids is None else prompt_ids
        found = []
        for text in texts:
            turns = (*earlier, dataclasses.replace(last, answer=text))
            answered = dataclasses.replace(record, turns=turns)
            self._check(answered)
            ids, loss, _ = self._dialogue(answered)[-1]
            if ids is None or not np.array_equal(ids[: len(before)], before):
                raise record.bad(f"the reply {text!r} changes the tokens of the prompt before it")
            reply = ids[len(before) :][loss[len(before) :]]
            ends = np.flatnonzero(np.isin(reply, self.closing_ids))
            found.append(reply[: ends[0] + 1] if len(ends) else reply)
        return found

    def length(self, units: Sequence[Unit]) -> int:
        return sum(self.visual_tokens if u.ids is None else len(u.ids) for u in units)

    def row_length(self, record: Record) -> int:
        """Filled slots of the record's training row. Raises BadRecord as `encode` does, except where no answer fits."""
        return min(self.length(self._units(record)), self.max_tokens)

    def query_arrays(
        self, record: Record
    ) -> tuple[Int32[np.ndarray, "I Q"], Bool[np.ndarray, "I Q"]]:
        """One query per image slot, right padded; an empty slot has the query "image". Q = 0 when queries are off."""
        length = self.max_query_tokens if self.queries else 0
        tokens = np.full((self.max_images, length), self.tokenizer.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        if self.queries is None:
            return tokens, mask
        texts = self.queries(record)
        for i in range(self.max_images):
            text = texts[i] if i < len(texts) else NO_QUERY
            ids = (self._cached_query if len(text) < CACHED_CHARS else self._query)(text)
            tokens[i, : len(ids)] = ids
            mask[i, : len(ids)] = True
        return tokens, mask

    def lay_out(
        self, record: Record, units: Sequence[Unit], width: int, left: bool = False
    ) -> TokenRow:
        """Units laid out in `width` slots, padded on the right, or on the left (they must then fit)."""
        tokens = np.full(width, self.tokenizer.pad_id, np.int32)
        visual = np.full(width, -1, np.int32)
        positions = np.zeros(width, np.int32)
        segments = np.full(width, -1, np.int32)
        loss = np.zeros(width, bool)
        at = first = width - self.length(units) if left else 0
        image = position = prefix = 0  # prefix: where every independent turn's positions start
        for ids, targets, segment in units:
            count = self.visual_tokens if ids is None else len(ids)
            end = min(at + count, width)
            if ids is None:
                if at + count > width:
                    raise record.bad(
                        f"image {image} does not fit into max_tokens {self.max_tokens}"
                    )
                tokens[at:end] = 0
                visual[at:end] = np.arange(image * count, (image + 1) * count)
                image += 1
            else:
                tokens[at:end] = ids[: end - at]
                loss[at:end] = targets[: end - at]
            if segment == 0:
                prefix = position + count
            elif at > 0 and segments[at - 1] != segment:  # a turn begins
                position = prefix
            segments[at:end] = segment
            positions[at:end] = np.arange(position, position + end - at)
            position += count
            at = end
            if at == width:
                break
        loss[first] = False  # nothing predicts the first token
        return TokenRow(tokens, visual, positions, segments, loss)

    # --- records to units -------------------------------------------------------------------------------------------

    def _check(self, record: Record) -> None:
        if len(record.images) > self.max_images:
            raise record.bad(
                f"has {len(record.images)} images, but max_images is {self.max_images}"
            )
        text = "\n".join(
            [record.system or "", *(f"{t.question}\n{t.answer}" for t in record.turns)]
        )
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise record.bad("its text contains half of a surrogate pair, which is no character")
        found = self._reserved.search(text)
        if found:
            raise record.bad(f"its text contains the control token {found.group()!r}")
        if not self.template.keeps_question and len(record.turns) > 1 and not self.independent:
            raise record.bad(
                f"has {len(record.turns)} turns, but the template writes one caption per record"
            )

    def _units(self, record: Record) -> list[Unit]:
        self._check(record)
        if not self.independent:
            return self._dialogue(record)
        if any(turn.images for turn in record.turns[1:]):
            raise record.bad(
                "turns are independent, but a later turn has an image; move it to the first turn"
            )
        if record.turns[0].places and len(record.turns) > 1:
            raise record.bad(
                "turns are independent, but an image stands inside the first question; put the images before it"
            )
        return self._turns_apart(record)

    def _dialogue(self, record: Record) -> list[Unit]:
        system = self.system if record.system is None else record.system
        try:
            return [self._bos, *self._encoded(chunks(render(self.template, system, record.turns)))]
        except ValueError as error:
            raise record.bad(str(error)) from None

    def _encoded(self, texts: Sequence[Chunk]) -> list[Unit]:
        units = []
        for chunk in texts:
            if chunk is None:
                units.append(_IMAGE_UNIT)
            else:
                ids, loss, _ = self._tokenised(*chunk)
                units.append(Unit(ids, loss))
        return units

    def _turns_apart(self, record: Record) -> list[Unit]:
        """The shared prefix (BOS, system prompt, images) as segment 0, then each turn as its own segment.

        A turn has the ids that it would have as the only turn of the record.
        """
        system = self.system if record.system is None else record.system
        images = record.turns[0].images
        chars = len(system) + max(len(t.question) + len(t.answer or "") for t in record.turns)
        encode = self._cached_alone if chars < CACHED_CHARS else self._alone
        try:
            alone = [encode(system, images, turn) for turn in record.turns]
        except ValueError as error:
            raise record.bad(str(error)) from None
        first = alone[0]
        shared = common_length([a.shared for a in alone])
        units = list(first.prefix)
        if shared:
            units.append(Unit(first.ids[:shared], first.loss[:shared]))
        for number, a in enumerate(alone, start=1):
            loss = a.loss[shared:]
            if number > 1 and len(loss) and loss[0]:
                loss = loss.copy()
                loss[0] = False  # the slot before it is of another turn and cannot predict it
            units.append(Unit(a.ids[shared:], loss, number))
        return units

    def _alone(self, system: str, images: int, turn: Turn) -> Alone:
        """The turn after the `images` pictures of its record's first turn."""
        shown = dataclasses.replace(turn, images=images)
        *before, text = chunks(render(self.template, system, [shown]))
        assert text is not None  # every template writes something after the answer
        prefix = (self._bos, *self._encoded(before))
        if images:
            ids, loss, _ = self._tokenised(*text)
            return Alone(prefix, ids, loss, [])
        ids, loss, stops = self._chunk(*text)
        header = self._cached_header(system)
        return Alone(prefix, ids, loss, ids[: bisect.bisect_right(stops, header)].tolist())

    def _header(self, system: str) -> int:
        """Characters before the first question."""
        before = [text for text, _, _, _ in render(self.template, system, [])]
        return sum(map(len, before)) + sum(len(text) for text, _ in self.template.user.before)

    def _tokenised(self, text: str, spans: Spans) -> tuple[np.ndarray, np.ndarray, list[int]]:
        return (self._cached_chunk if len(text) < CACHED_CHARS else self._chunk)(text, spans)

    def _chunk(self, text: str, spans: Spans) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Ids, loss mask and end offsets of one text; spans: the ranges of its supervised characters, ascending.

        Raises ValueError for a token that begins before an answer and ends inside it, which prompt and answer would share.
        """
        ids, offsets = self.tokenizer.encode(text)
        loss = []
        ahead = [*spans, (len(text) + 1, len(text) + 1)]
        for start, stop in offsets:
            while start >= ahead[0][1]:
                del ahead[0]
            begin = ahead[0][0]
            if start < begin < stop:
                token = text[start:stop]
                raise ValueError(f"the tokenizer merges prompt and answer into the token {token!r}")
            loss.append(start >= begin)
        return np.array(ids, np.int32), np.array(loss, bool), [stop for _, stop in offsets]

    def _query(self, text: str) -> np.ndarray:
        ids, _ = self.tokenizer.encode(text)
        return np.concatenate([self._bos_ids, np.array(ids, np.int32)])[: self.max_query_tokens]


def common_length(rows: Sequence[list[int]]) -> int:
    """The length of the longest common prefix of all rows: that of the smallest and the largest in lexicographic order."""
    low, high = min(rows), max(rows)
    differ = (i for i, (x, y) in enumerate(zip(low, high, strict=False)) if x != y)
    return next(differ, len(low))


class Alone(NamedTuple):
    """A turn encoded as the only one of its record: the prefix units, then the ids of its text.

    shared: the first of these ids, up to the question, which other turns may have in common with it.
    """

    prefix: tuple[Unit, ...]
    ids: np.ndarray  # int32 [n]
    loss: np.ndarray  # bool [n]
    shared: list[int]
