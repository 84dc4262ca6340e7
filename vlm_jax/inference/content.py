"""What answers were made from, as short texts that change with the content: a run's weights and prompts, a question.

Names and times do not count: a copied or moved run is the same one. Equal texts mean equal contents, but for files above
WHOLE bytes, of which the size and SAMPLES blocks are looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax import files
from vlm_jax.data import records
from vlm_jax.data.rows import Features
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment

WHOLE = 16 * 2**20  # bytes up to which a file is read to its end: every picture, small weights
# Of a larger file: evenly spaced blocks, the first and the last among them.
SAMPLES, BLOCK = 16, 2**16
PATHS = ("annotations", "image_roots", "tokenizer", "features_dir")  # of data: names, not contents
PARTS = {"weights", "prompts"}  # what `of_run` gives
TOKENIZER = ("tokenizer*", "special_tokens*", "added_tokens*", "vocab.json", "merges.txt")


def of_run(workdir: str) -> dict[str, str]:
    """{"weights": .., "prompts": ..} of the newest checkpoint of a training workdir, and of how the run words a prompt.

    Orbax names the files of each save by random numbers, so that a run that was trained anew differs even where the
    sampled blocks do not. Raises ConfigError for a run that is damaged.
    """
    folder = Path(workdir)
    state = folder / "checkpoints" / str(experiment.last_step(workdir)) / "state"
    saved = sorted(path for path in state.rglob("*") if path.is_file())
    if not saved:
        raise ConfigError(f"{str(state)!r} holds no file; the checkpoint is damaged.")
    settings = files.read_json(folder / "config.json")
    worded = {name: value for name, value in settings["data"].items() if name not in PATHS}
    place = Path(settings["data"]["tokenizer"])
    words = sorted({path for pattern in TOKENIZER for path in place.glob(pattern)})
    weights = (part for path in saved for part in (str(path.relative_to(state)), _file(path)))
    prompts = (part for path in words for part in (path.name, _file(path)))
    return {
        "weights": _digest(weights),
        "prompts": _digest([repr(settings["model"]), repr(worded), *prompts]),
    }


def of_question(
    row: Mapping[str, Any],
    image_root: str,
    features: Features | None,
    replies: Sequence[str] | None,
    ignored: Collection[str] = (),
) -> str:
    """Of what a model sees of a row: words, pictures (or their cached features), replies to choose from. Gold is no part.

    ignored: fields of the row that count as absent. Raises BadRecord for a row that cannot be asked.
    """
    record = records.parse(dict(row), "questions", image_root, row["id"], True, ignored)
    words = dataclasses.replace(record, file="", root="", images=())
    shown = (_picture(image, record.root, features) for image in record.images)
    return _digest([repr(words), repr(replies and tuple(replies)), *shown])


def _picture(image: records.Image, root: str, features: Features | None) -> str:
    if features is not None:
        row = features.rows.get(image) if isinstance(image, str) else None
        return "absent" if row is None else _features(features, row)
    if isinstance(image, str):
        path = Path(root, image)
        try:
            stat = path.stat()
            return _seen(path, stat.st_mtime_ns, stat.st_size)
        except (OSError, ValueError):  # a folder, or a name that no file can have
            return "absent"
    return _digest([image if isinstance(image, bytes) else image()])


def _features(features: Features, row: int) -> str:
    levels = [level for level in (features.last, features.taps) if level is not None]
    return _digest(part for level in levels for part in (repr(level.dtype), level[row].tobytes()))


@functools.lru_cache(4096)  # several questions are about one picture
def _seen(path: Path, changed: int, size: int) -> str:
    del changed, size  # a file that was written anew is read again
    return _file(path)


def _file(path: Path) -> str:
    return _digest([str(path.stat().st_size), *_blocks(path)])


def _blocks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(2**20):
                yield block
            return
        for i in range(SAMPLES):
            yield os.pread(file.fileno(), BLOCK, (size - BLOCK) * i // (SAMPLES - 1))


def _digest(parts: Iterable[str | bytes]) -> str:
    """32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()
