"""frozen.json of a workdir: the parameters that its checkpoints leave out because they never change, and where they are.

    {"format": 1, "leaves": {path: {"source": DIR, "beside": DIR relative to the workdir, "sum": [dtype, checksum]}}}

A frozen 7B decoder would add 28 GB to every checkpoint. The source is the model directory, or the run whose own checkpoint
holds the parameter; it is read again when the run is loaded, and its checksum compared. Without the file (train.save_frozen,
or a run of an older version) checkpoints hold everything.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from vlm_jax import files
from vlm_jax.hf.directory import is_model
from vlm_jax.settings.addresses import scheme
from vlm_jax.settings.checks import ConfigError

FILE, FORMAT = "frozen.json", 1


class Leaf(NamedTuple):
    """Where one parameter is."""

    source: str
    beside: str
    sum: list[Any]  # dtype, checksum


def read(workdir: str | files.Path) -> dict[str, Leaf]:
    """Path -> where it is, for the parameters that the checkpoints of a run leave out. Raises ConfigError when damaged."""
    path = files.to_path(workdir) / FILE
    if not path.is_file():
        return {}
    content = files.read_json(path)
    try:
        if content["format"] != FORMAT:
            raise ConfigError(f"{path} has format {content['format']}, not {FORMAT}; use the version that wrote it.")  # fmt: skip
        return {name: Leaf(**leaf) for name, leaf in content["leaves"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}): it says where the run's frozen parameters are; take it "
            "from a copy of the run."
        ) from None


def record(
    workdir: files.Path, sources: Mapping[str, str], sums: Mapping[str, list[Any]], writes: bool
) -> set[str]:
    """Writes frozen.json for parameters that came from `sources` unchanged; returns their paths.

    sources: part -> run or model directory. sums: path -> [dtype, checksum]. writes: False in all processes but the first.
    """
    leaves: dict[str, dict[str, Any]] = {}
    place_of = functools.cache(_place)  # of a bucket each look is a request
    for part, source in sources.items():
        further = {} if is_model(source) else read(source)
        for name in (name for name in sums if name.split("/")[0] == part):
            # Not the run in between, which leaves it out as well.
            own = further.get(name)
            place = place_of(source, own.source, own.beside) if own else source
            place = str(files.to_path(place).absolute())
            leaves[name] = Leaf(place, _beside(place, workdir), sums[name])._asdict()
    if writes and leaves:
        content = {"format": FORMAT, "leaves": leaves}
        files.write_whole(workdir / FILE, json.dumps(content, indent=1) + "\n")
    return set(leaves)


def _beside(place: str, workdir: files.Path) -> str:
    """`place` relative to the workdir, so that both can be moved together; "" for another bucket or disk."""
    if scheme(place) != scheme(str(workdir)):
        return ""
    return os.path.relpath(place.partition("://")[2] or place, str(workdir).partition("://")[2] or str(workdir))  # fmt: skip


def _place(workdir: str, source: str, beside: str) -> str:
    """The directory of a source: where it was, or where it now is beside the workdir, "" if it is gone."""
    if files.is_dir(source):
        return source
    here = str(files.to_path(workdir).absolute())
    kind, mark, rest = here.rpartition("://")
    moved = kind + mark + os.path.normpath(os.path.join(rest, beside)) if beside else ""
    return moved if moved and files.is_dir(moved) else ""


def places(workdir: str, leaves: Mapping[str, Leaf]) -> dict[str, set[str]]:
    """Source -> the paths that it supplies. Raises ConfigError for a source that is gone."""
    found: dict[str, set[str]] = {}
    place_of = functools.cache(_place)
    for name, leaf in leaves.items():
        place = place_of(workdir, leaf.source, leaf.beside)
        if not place:
            raise ConfigError(
                f"{workdir!r} does not hold its frozen {name.split('/')[0]}, which came from {leaf.source!r}, and that is gone; "
                "put it back there (runs trained with --config.train.save_frozen=True hold everything)."
            )
        found.setdefault(place, set()).add(name)
    return found
