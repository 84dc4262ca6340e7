"""The one door to what users' paths name: only local ones, and text and JSON that are read or refused in one line."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.config import ConfigError

# "gs://bucket/run" by itself, as a flag's value, or inside a list of paths.
ADDRESS = re.compile(r"(?:^|[=\s'\"(\[,])([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\")\],]*)")
SENTENCES = ("question", "system")  # flags and fields that hold words to a model, not a path


def check_local(owner: str, value: str) -> None:
    """Raises ConfigError when `value` is or holds an address such as gs://bucket/run, which pathlib takes for a folder."""
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


# Byte-order marks; UTF-32's begins with UTF-16's, so it comes first.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or in the encoding that its byte-order mark names (UTF-8, UTF-16 or UTF-32).

    Raises ConfigError with the file's name when it cannot be read, and with the line of a byte that is no text.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte, name = (
            data[error.start : error.start + 1].hex(),
            encoding.upper().removesuffix("-SIG"),
        )
        raise ConfigError(
            f"{path}:{line}: byte 0x{byte} is no character in {name}; save the file as UTF-8."
        ) from error
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{path}:{line}: byte 0x00 is in no text; save the file as UTF-8.")
    return text


def parse_json(text: str | bytes, where: str) -> Any:
    """What JSON says. Raises ConfigError that begins with `where` when it is not valid or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply to be read as JSON.") from error
    except ValueError as error:  # also UnicodeDecodeError, and a number of too many digits
        raise ConfigError(f"{where} is not valid JSON: {error}.") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ConfigError with the file's name when it holds none."""
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file in UTF-8. Raises ConfigError with its name when it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; give another path."
        ) from error
