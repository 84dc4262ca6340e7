"""Prompt formats as data: what stands around a system prompt, a question and an answer, and what is supervised."""

from __future__ import annotations

import dataclasses

Piece = tuple[str, bool]  # text, supervised


@dataclasses.dataclass(frozen=True)
class Frame:
    """What stands before and after a message's text."""

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
    # The space before the answer is supervised: "▁Yes" is one piece, and the prompt ends in "ASSISTANT:".
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
            (("<|start_header_id|>assistant<|end_header_id|>\n\n", False),),
            (("<|eot_id|>", True),),
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
