"""Refuses addresses such as gs://bucket/run where a local path is expected; pathlib would take them for folders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_jax.settings.checks import ConfigError

# "gs://bucket/run" by itself, as a flag's value, or inside a list of paths.
ADDRESS = re.compile(r"(?:^|[=\s'\"(\[,])([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\")\],]*)")
SENTENCES = ("question", "system")  # flags and fields that hold text for a model, not a path


def check_local(owner: str, value: str) -> None:
    """Raises ConfigError when `value` is or contains an address such as gs://bucket/run."""
    found = ADDRESS.search(value)
    if found is None:
        return
    scheme, rest = found.groups()
    fix = (
        f"leave out {scheme}:// and give {rest!r}"
        if scheme.lower() == "file"
        else "mount it or copy it to a local disk, and give the path there"
    )
    raise ConfigError(
        f"{owner}: {f'{scheme}://{rest}'!r} is an address; only paths of this machine can be used: {fix}."
    )


def check_words(argv: Sequence[str]) -> None:
    """`check_local` for every word of a command line that may be a path."""
    flag = ""
    for word in argv:
        is_flag = word.startswith("-")
        owner = word.partition("=")[0] if is_flag else flag
        if owner.lstrip("-").rpartition(".")[2] not in SENTENCES:
            check_local(owner or "command line", word)
        flag = word if is_flag and "=" not in word else ""


def check_settings(settings: Mapping[str, Any], owner: str = "config") -> None:
    """`check_local` for every text of a config, however deep; a field is named as config.data.annotations."""
    for name, value in _texts(settings, owner):
        check_local(name, value)


def _texts(node: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield name, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            if key not in SENTENCES:
                yield from _texts(value, f"{name}.{key}")
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value, name)
