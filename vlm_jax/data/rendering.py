"""A conversation as text: what a template writes around it, which stretches are supervised, where images stand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vlm_jax.data.records import IMAGE, Turn
from vlm_jax.data.templates import Piece, Template, header

Spans = tuple[tuple[int, int], ...]  # [begin, end) characters of the supervised stretches of a text
Chunk = tuple[str, Spans] | None  # text with its supervised spans, or an image


class Segment(NamedTuple):
    """A stretch of a rendered conversation; text IMAGE is an image. alone: not tokenised together with its neighbours."""

    text: str
    supervised: bool
    turn: int  # 0 = system prompt, n = n-th turn
    alone: bool = False


def render(template: Template, system: str, turns: Sequence[Turn]) -> list[Segment]:
    """A conversation as segments. A last turn without an answer ends in the assistant's header."""
    segments: list[Segment] = []

    def write(pieces: Sequence[Piece], turn: int) -> None:
        segments.extend(Segment(text, supervised, turn) for text, supervised in pieces)

    if system:
        write((*template.system.before, (system, False), *template.system.after), 0)
    for number, turn in enumerate(turns, start=1):
        write(template.user.before, number)
        segments.extend(_asked(template, turn, number))
        write(template.user.after, number)
        if turn.answer is None:
            write(header(template), number)
        else:
            answer = (turn.answer, True)
            said = (*template.assistant.before, answer, *template.assistant.after)
            write([(text, learnt and turn.learnt) for text, learnt in said], number)
    return [segment for segment in segments if segment.text]


def _asked(template: Template, turn: Turn, number: int) -> Iterator[Segment]:
    """A question with its pictures where they stand; those before it are followed by a newline each, as LLaVA writes them."""

    def picture() -> Iterator[Segment]:
        yield Segment(IMAGE, False, number)
        if template.after_image:
            yield Segment(template.after_image, False, number, alone=True)

    if turn.places and template.keeps_question:
        for begin, end in itertools.pairwise((0, *turn.places)):
            yield Segment(turn.question[begin:end], False, number)
            yield from picture()
        yield Segment(turn.question[turn.places[-1] :], False, number)
        return
    question = turn.question if template.keeps_question else ""
    for image in range(turn.images):
        yield from picture()
        if template.keeps_question and (question or image + 1 < turn.images):
            yield Segment("\n", False, number)
    yield Segment(question, False, number)


def chunks(segments: Sequence[Segment]) -> list[Chunk]:
    """Joined texts with their supervised spans (adjacent ones merged); None for an image."""
    found: list[Chunk] = []
    text, spans = "", []

    def close() -> None:
        nonlocal text, spans
        if text:
            found.append((text, tuple(spans)))
        text, spans = "", []

    for segment in segments:
        if segment.text == IMAGE or segment.alone:
            close()
        if segment.text == IMAGE:
            found.append(None)
            continue
        if segment.supervised:
            end = len(text) + len(segment.text)
            if spans and spans[-1][1] == len(text):
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((len(text), end))
        text += segment.text
        if segment.alone:
            close()
    close()
    return found
