"""Names of the Hugging Face hub and of its files. Nothing is ever downloaded; errors say how to."""

from __future__ import annotations

import os
import re

TOKENIZER_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
)  # what transformers may read of a tokenizer


def hub_hint(name: str) -> str:
    """The end of an error about a missing path that may be the name of a hub repository: how to fetch it. Else ""."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or os.path.isdir(
        os.path.dirname(name)
    ):
        return ""
    folder = name.split("/")[1]
    return (
        f" Nothing is downloaded here: if it is a name on the Hugging Face hub, `hf download {name} --local-dir {folder}` "
        f"fetches it; then give {folder}."
    )
