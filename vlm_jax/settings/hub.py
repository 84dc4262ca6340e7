"""Names of the Hugging Face hub, from which nothing is downloaded here."""

from __future__ import annotations

import os
import re


def hub_hint(name: str) -> str:
    """What an error adds about a path that is not there and may be a hub's name: how to fetch it; "" for a plain path."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or os.path.isdir(
        os.path.dirname(name)
    ):
        return ""
    folder = name.split("/")[1]
    return (
        f" Nothing is downloaded here: if it is a name on the Hugging Face hub, `hf download {name} --local-dir {folder}` "
        f"fetches it; then give {folder}."
    )
