"""Addresses among paths: gs://bucket/run is one of a bucket; hdfs://, http:// and others are refused."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_jax.settings.checks import ConfigError

# "gs://bucket/run" by itself, as a flag's value, or inside a list of paths.
ADDRESS = re.compile(r"(?:^|[=\s'\"(\[,])([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\")\],]*)")
# Scheme of a bucket -> the package that reads it, and the extra of ours that installs it.
BUCKETS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
SENTENCES = ("question", "system")  # flags and fields that hold text for a model, not a path


def scheme(path: str) -> str | None:
    """ "gs" or "s3" for a path of a bucket, None for one of this machine."""
    kind, mark, _ = path.partition("://")
    return kind if mark and kind in BUCKETS else None


def check_usable(owner: str, value: str) -> None:
    """Raises ConfigError when `value` is or contains an address that is no path of a bucket, such as hdfs://run."""
    for kind, rest in ADDRESS.findall(value):
        if kind in BUCKETS and rest.partition("/")[0]:
            if importlib.util.find_spec(BUCKETS[kind][0]) is None:
                package, extra = BUCKETS[kind]
                raise ConfigError(
                    f"{owner}: {kind}:// needs the package {package}, which is not installed: pip install 'vlm_jax[{extra}]'."
                )
            continue
        fix = "mount it or copy it to a local disk or a bucket, and give the path there"
        if kind.lower() == "file":
            fix = f"leave out {kind}:// and give {rest!r}"
        elif kind in BUCKETS:
            fix = f"name the bucket: {kind}://BUCKET/.."
        elif kind.lower() in BUCKETS:
            fix = f"write {kind.lower()}://{rest}"
        raise ConfigError(
            f"{owner}: {f'{kind}://{rest}'!r} cannot be used; paths are those of this machine, gs://bucket/.. and "
            f"s3://bucket/..: {fix}."
        )


def check_words(argv: Sequence[str]) -> None:
    """`check_usable` for every word of a command line that may be a path; a word of several words is a question."""
    flag = ""
    for word in argv:
        is_flag = word.startswith("-")
        owner = word.partition("=")[0] if is_flag else flag
        is_text = owner.lstrip("-").rpartition(".")[2] in SENTENCES or not (owner or word.split() == [word])  # fmt: skip
        if not is_text:
            check_usable(owner or "command line", word)
        flag = word if is_flag and "=" not in word else ""


def check_settings(settings: Mapping[str, Any], owner: str = "config") -> None:
    """`check_usable` for every text of a config, however deep; a field is named as config.data.annotations."""
    for name, value in _texts(settings, owner):
        check_usable(name, value)


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
