"""How the benchmarks ask: LLaVA-1.5's list of options and endings, and the dialogue of a question."""

from __future__ import annotations

import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase

# The endings of LLaVA-1.5's evaluation prompts.
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

YES_NO = ("Yes", "No")  # the possible replies to a yes-or-no question that ends with SHORT


def with_options(question: str, options: Sequence[str]) -> str:
    """The question, then one line "A. option" each."""
    return "\n".join([question, *(f"{c}. {option}" for c, option in lettered(options).items())])


def lettered(options: Sequence[str]) -> dict[str, str]:
    """{"A": option, ...}; options after "Z" are left out."""
    return dict(zip(LETTERS, options, strict=False))


def ask(text: str, images: int = 1) -> list[dict[str, str]]:
    """The dialogue of one question: its images, then its text."""
    return [{"from": "human", "value": "<image>\n" * images + text}]
