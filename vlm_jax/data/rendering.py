"""A conversation as text: what a template writes around it, which stretches are supervised, where images stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlm_jax.data.sources import IMAGE, Turn
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
        question = turn.question if template.keeps_question else ""
        write(template.user.before, number)
        for image in range(turn.images):
            segments.append(Segment(IMAGE, False, number))
            if template.after_image:
                segments.append(Segment(template.after_image, False, number, alone=True))
            if template.keeps_question and (question or image + 1 < turn.images):
                segments.append(Segment("\n", False, number))
        write(((question, False), *template.user.after), number)
        if turn.answer is None:
            write(header(template), number)
        else:
            answer = (turn.answer, True)
            write((*template.assistant.before, answer, *template.assistant.after), number)
    return [segment for segment in segments if segment.text]


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
