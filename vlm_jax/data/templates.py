"""Prompt formats as data, conversations rendered in them, and the query text of a compressor.

A format defines the text before and after a system prompt, a question and an answer, and which of it is supervised.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vlm_jax.data.records import IMAGE, Record, Turn

Piece = tuple[str, bool]  # text, supervised
# [begin, end) character offsets of the supervised parts of a text.
Spans = tuple[tuple[int, int], ...]
Chunk = tuple[str, Spans] | None  # text with its supervised spans, or an image
NO_QUERY = "image"  # the query of a row without one, as in the reference


@dataclasses.dataclass(frozen=True)
class Frame:
    """The text before and after a message."""

    before: tuple[Piece, ...]
    after: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt format. A prompt for generation ends with the last unsupervised piece of assistant.before."""

    system_prompt: str  # "" = no system message at all
    system: Frame
    user: Frame
    assistant: Frame
    closing: str  # ends an answer; one token
    control: tuple[str, ...]  # strings that must be one token each
    keeps_question: bool = True  # False: only image and answer are written (captioning)
    after_image: str = ""  # written after each image and tokenised on its own


def _plain(before: str, after: str) -> Frame:
    return Frame(((before, False),), ((after, False),))


_CHATML_CONTROL = ("<|im_start|>", "<|im_end|>")
_LLAMA3_CONTROL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_NEXT_END = (("<|im_end|>\n", True),)

TEMPLATES: dict[str, Template] = {
    # The space before the answer is supervised: "▁Yes" is one token, and the prompt ends with "ASSISTANT:".
    "vicuna_v1": Template(
        system_prompt="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        system=_plain("", " "),
        user=_plain("USER: ", " "),
        assistant=Frame((("ASSISTANT:", False), (" ", True)), (("</s>", True),)),
        closing="</s>",
        control=("</s>",),
    ),
    # LLaVA's alignment stage: image, caption, newline; the human text is not written and there is no EOS.
    "plain": Template(
        system_prompt="",
        system=Frame((), ()),
        user=Frame((), ()),
        assistant=Frame((), (("\n", True),)),
        closing="\n",
        control=(),
        keeps_question=False,
    ),
    "chatml": Template(
        system_prompt="You are a helpful assistant.",
        system=_plain("<|im_start|>system\n", "<|im_end|>\n"),
        user=_plain("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=Frame(
            (("<|im_start|>assistant\n", False),), (("<|im_end|>", True), ("\n", False))
        ),
        closing="<|im_end|>",
        control=_CHATML_CONTROL,
    ),
    # LLaVA-NeXT's preprocess_qwen until 21 June 2024: the frame tokens of every turn are supervised, role names are not,
    # and a newline of its own follows the image.
    "chatml_llava_next": Template(
        system_prompt="You are a helpful assistant.",
        system=Frame((("<|im_start|>", True), ("system\n", False)), _NEXT_END),
        user=Frame((("<|im_start|>", True), ("user\n", False)), _NEXT_END),
        assistant=Frame((("<|im_start|>", True), ("assistant\n", False)), _NEXT_END),
        closing="<|im_end|>",
        control=_CHATML_CONTROL,
        after_image="\n",
    ),
    "llama3": Template(
        system_prompt="",
        system=_plain("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=_plain("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=Frame(
            (("<|start_header_id|>assistant<|end_header_id|>\n\n", False),), (("<|eot_id|>", True),)
        ),
        closing="<|eot_id|>",
        control=_LLAMA3_CONTROL,
    ),
    "phi3": Template(
        system_prompt="",
        system=_plain("<|system|>\n", "<|end|>\n"),
        user=_plain("<|user|>\n", "<|end|>\n"),
        assistant=Frame((("<|assistant|>\n", False),), (("<|end|>", True), ("\n", False))),
        closing="<|end|>",
        control=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
}


# A message's content is a text, or parts of type "image" and "text"; images come first, each followed by a newline.
_WORDS = (
    "{%- macro words(content, image) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- set said = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
    "{%- for part in content if part['type'] == 'image' -%}"
    "{{ image }}{%- if said or not loop.last -%}{{ '\n' }}{%- endif -%}{%- endfor -%}{{ said }}"
    "{%- endif -%}{%- endmacro -%}"
)


def chat_template(template: Template, system: str | None) -> str:
    """A prompt format as the Jinja text of a Hugging Face `chat_template`, rendering what `render` renders.

    system: replaces the template's system prompt. Raises ValueError for a format that leaves the questions out.
    """
    if not template.keeps_question:
        raise ValueError("this format writes no questions; it is for training on captions only")

    def text(*pieces: Piece) -> str:
        return json.dumps("".join(piece for piece, _ in pieces), ensure_ascii=False)

    def framed(frame: Frame, words: str) -> str:
        return "{{- " + " + ".join((text(*frame.before), words, text(*frame.after))) + " -}}"

    prompt = json.dumps(template.system_prompt if system is None else system, ensure_ascii=False)
    image = json.dumps("<image>" + template.after_image, ensure_ascii=False)
    said = f"words(message['content'], {image})"
    return (
        _WORDS
        + f"{{%- set system, turns = {prompt}, messages -%}}"
        + "{%- if messages[0]['role'] == 'system' -%}"
        + f"{{%- set system, turns = words(messages[0]['content'], {image}), messages[1:] -%}}{{%- endif -%}}"
        + "{%- if system -%}"
        + framed(template.system, "system")
        + "{%- endif -%}"
        + "{%- for message in turns -%}{%- if message['role'] == 'user' -%}"
        + framed(template.user, said)
        + "{%- else -%}"
        + framed(template.assistant, said)
        + "{%- endif -%}{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{- "
        + text(*header(template))
        + " -}}{%- endif -%}"
    )


def header(template: Template) -> tuple[Piece, ...]:
    """The assistant's header without a trailing supervised piece, which belongs to the answer."""
    pieces = template.assistant.before
    while pieces and pieces[-1][1]:
        pieces = pieces[:-1]
    return pieces


class Segment(NamedTuple):
    """Consecutive text of a rendered conversation, or an image, whose text is IMAGE.

    alone: tokenised separately from the text before and after it.
    """

    text: str
    supervised: bool
    turn: int  # 0 = system prompt, n = n-th turn
    alone: bool = False


def render(template: Template, system: str, turns: Sequence[Turn]) -> list[Segment]:
    """A conversation as segments. If the last turn has no answer, the segments end with the assistant's header."""
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
    """A question with its pictures at their offsets. A newline follows each picture before the question, as in LLaVA."""

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
    """The segments joined into as few texts as possible, with their supervised spans; None for an image."""
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


def first_turn(record: Record) -> list[str]:
    """For each image, the whole question of the human turn that shows it.

    # Differs from llava-token-compression@bdedebd, which cuts the query out of decoded text at "\\n" and "ASSISTANT".
    """
    return [turn.question.strip() or NO_QUERY for turn in record.turns for _ in range(turn.images)]


def last_turn(record: Record) -> list[str]:
    """For each image, the last question: the one being asked, when a prompt has earlier turns."""
    return [record.turns[-1].question.strip() or NO_QUERY] * len(record.images)


# settings.run.DataConfig.query -> the query text of each image of a record. None: Q = 0, and the query vector is zero.
QUERIES: dict[str, Callable[[Record], list[str]] | None] = {
    "first_turn": first_turn,
    "last_turn": last_turn,
    "none": None,
}
