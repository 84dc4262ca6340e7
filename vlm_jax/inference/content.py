"""Fingerprints of what answers were made from: the weights and the prompt format of a run, and the content of a question.

File names and times do not count, so a copied or moved run keeps its fingerprint. Of files above WHOLE bytes only the size
and SAMPLES blocks are hashed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlm_jax import files
from vlm_jax.data import records
from vlm_jax.data.rows import CachedFeatures
from vlm_jax.files import Path, to_path
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import frozen
from vlm_jax.storage import run as experiment

WHOLE = 16 * 2**20  # bytes up to which a file is hashed completely: every image, small weights
# Of a larger file, evenly spaced blocks are hashed, including the first and the last.
SAMPLES, BLOCK = 16, 2**16
PATHS = (
    "annotations",
    "image_roots",
    "tokenizer",
    "features_dir",
)  # fields of data that only say where files are
PARTS = {"weights", "prompts"}  # the keys of what `of_run` returns
TOKENIZER = ("tokenizer*", "special_tokens*", "added_tokens*", "vocab.json", "merges.txt")


def of_run(workdir: str) -> dict[str, str]:
    """{"weights": .., "prompts": ..}: of the newest checkpoint of a training workdir, and of its prompt format.

    Orbax gives the files of each save random names, which are hashed too: a run that was trained again differs even if
    all sampled blocks are equal. Raises ConfigError for a damaged run.
    """
    folder = to_path(workdir)
    state = experiment.checkpoint_folder(workdir) / str(experiment.last_step(workdir)) / "state"
    saved = sorted(path for path in state.rglob("*") if path.is_file())
    if not saved:
        raise ConfigError(f"{str(state)!r} holds no file; the checkpoint is damaged.")
    settings = files.read_json(folder / "config.json")
    worded = {name: value for name, value in settings["data"].items() if name not in PATHS}
    place = to_path(settings["data"]["tokenizer"])
    words = sorted({path for pattern in TOKENIZER for path in place.glob(pattern)})
    weights = [part for path in saved for part in (str(path.relative_to(state)), _file(path))]
    # What the checkpoint leaves out, by its content.
    weights += [repr((name, leaf.sum)) for name, leaf in sorted(frozen.read(workdir).items())]
    prompts = (part for path in words for part in (path.name, _file(path)))
    return {
        "weights": _digest(weights),
        "prompts": _digest([repr(settings["model"]), repr(worded), *prompts]),
    }


def of_question(
    row: Mapping[str, Any],
    file: str,
    image_root: str,
    features: CachedFeatures | None,
    replies: Sequence[str] | None,
    ignored: Collection[str] = (),
) -> str:
    """The fingerprint of the model's input for a row: text, images (or their cached features) and the replies to choose from.

    The gold answer is not part of it. file: where the row comes from, for error messages. ignored: fields of the row that
    are treated as absent. Raises BadRecord for a row that is not a valid question.
    """
    record = records.parse(dict(row), file, image_root, row["id"], True, ignored)
    words = dataclasses.replace(record, file="", root="", images=())
    shown = (_picture(image, record.root, features) for image in record.images)
    return _digest([repr(words), repr(replies and tuple(replies)), *shown])


def _picture(image: records.ImageSource, root: str, features: CachedFeatures | None) -> str:
    if features is not None:
        row = features.rows.get(image) if isinstance(image, str) else None
        return "absent" if row is None else _features(features, row)
    if isinstance(image, str):
        path = to_path(os.path.join(root, image))
        try:
            return _image_file(path, *files.stamp(path))
        except (OSError, ValueError):  # missing, a folder, or not a valid file name
            return "absent"
    return _digest([image if isinstance(image, bytes) else image()])


def _features(features: CachedFeatures, row: int) -> str:
    levels = [level for level in (features.last, features.taps) if level is not None]
    return _digest(part for level in levels for part in (repr(level.dtype), level[row].tobytes()))


@functools.lru_cache(4096)  # several questions share one image
def _image_file(path: Path, changed: str | int, size: int) -> str:
    del changed, size  # part of the cache key: a file that was rewritten is read again
    return _file(path)


def _file(path: Path) -> str:
    size = files.stamp(path)[1]
    return _digest([str(size), *_blocks(path, size)])


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    if size <= WHOLE:
        data = files.read_bytes(path)
        yield from (data[start : start + 2**20] for start in range(0, len(data), 2**20))
        return
    for i in range(SAMPLES):
        start = (size - BLOCK) * i // (SAMPLES - 1)
        yield files.read_span(path, start, start + BLOCK)


def _digest(parts: Iterable[str | bytes]) -> str:
    """32 hexadecimal digits. Each part is hashed with its length, so that parts cannot run together."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()
