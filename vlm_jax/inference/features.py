"""A frozen encoder's features of a data set, computed once and memory-mapped by every later run (data/feature_cache.py)."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, UInt8
from numpy.lib.format import open_memmap

from vlm_jax import files, sharding
from vlm_jax.data import feature_cache, feature_images
from vlm_jax.files import Path, to_path
from vlm_jax.models.vit import Features
from vlm_jax.models.vlm import VLM
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig
from vlm_jax.settings.run import Experiment, MeshConfig
from vlm_jax.storage import weights

log = logging.getLogger(__name__)

BATCH = 256  # images per encoder call
TELL_EVERY = 30  # seconds between lines of the log


@functools.partial(jax.jit, static_argnames="config")
def encode(params: Any, images: UInt8[Array, "B H W 3"], config: VLMConfig) -> Features:
    """What the encoder of a model makes of pixels. params: an argument, so that the program does not hold a copy of them."""
    found: Any = VLM(config).apply({"params": params}, images, method=VLM.image_features)
    return found


def cache(exp: Experiment, folder: Path) -> None:
    """Encodes every image that `exp.data` names with the encoder of `exp.init`, on all devices of all processes.

    Each process reads its share of the images, and the first one writes. The folder appears only when it is complete. Raises
    ConfigError for a checkpoint that does not fit the model, for images whose relative paths are not distinct, for a compressor
    that needs more than features, and when `folder` holds the features of another encoder (of this one: nothing is done).
    """
    feature_cache.check_cacheable(exp.model)
    sharding.start_processes()
    mesh = sharding.make_mesh(MeshConfig())
    wanted = weights.abstract(exp.model, mesh)["vit"]
    params = weights.load(exp.init.sources["vit"], exp.model, {"vit": wanted})
    if (folder / feature_cache.MADE).is_file():
        weights.check_cached(str(folder), exp.model, params["vit"])
        log.info("%s is finished", folder)
        return
    paths = feature_images.list_images(exp.data)
    if not paths:
        raise ConfigError("features: the records of data.annotations name no image.")
    taps, found = weights.taps_of(exp.model), weights.fingerprint(params["vit"])
    batches = _encoded(exp, params, paths, mesh)
    if jax.process_index():
        for _ in batches:
            pass
        multihost_utils.sync_global_devices("features")  # the first one has written them
        return
    with files.whole_folder(folder) as partial:
        rows = _write_tables(batches, len(paths), partial)
        files.write_whole(partial / "index.json", json.dumps(rows))
        source = str(to_path(exp.init.sources["vit"]).absolute())
        feature_cache.write_made(partial, exp.model, exp.data, taps, found, source)
    multihost_utils.sync_global_devices("features")


Levels = dict[str, np.ndarray]


def _encoded(
    exp: Experiment, params: Any, paths: Sequence[tuple[str, str]], mesh: Mesh
) -> Iterator[tuple[list[str], Levels]]:
    """(relative paths [n], features [n ..] by level) of all processes' images, batch by batch."""
    numbers = {path: number for number, (path, _) in enumerate(paths)}
    size = -(-min(BATCH, len(paths)) // mesh.size) * mesh.size
    share = sharding.data_shard(mesh)
    taps = bool(weights.taps_of(exp.model))
    for names, images in feature_images.image_batches(paths, exp.data, exp.model.vit, size, *share):
        here = np.full(len(images), -1, np.int32)  # which image each row is; -1: none
        here[: len(names)] = [numbers[name] for name in names]
        placed = sharding.put({"images": images, "numbers": here}, mesh)
        with sharding.use(mesh):
            found = encode(params, placed["images"], exp.model)
        levels = {"last": found.last} | ({"taps": found.taps} if taps else {})
        rows, values = _of_all(placed["numbers"]), {name: _of_all(x) for name, x in levels.items()}
        kept = rows >= 0
        yield [paths[n][0] for n in rows[kept]], {name: x[kept] for name, x in values.items()}


def _of_all(rows: jax.Array) -> np.ndarray:
    """The rows of every process, in the order of the batch."""
    if jax.process_count() == 1:
        return np.asarray(rows)
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def _write_tables(
    batches: Iterator[tuple[list[str], Levels]], count: int, folder: Path
) -> dict[str, int]:
    """Writes last.npy (and taps.npy) batch by batch. Returns the row of each image."""
    arrays: dict[str, Any] = {}
    rows: dict[str, int] = {}
    told = time.monotonic()
    for names, levels in batches:
        for level, features in levels.items():
            values = feature_cache.stored(features)
            if level not in arrays:
                shape = (count, *values.shape[1:])
                arrays[level] = open_memmap(folder / f"{level}.npy", "w+", values.dtype, shape)
            arrays[level][len(rows) : len(rows) + len(names)] = values
        rows |= {name: len(rows) + i for i, name in enumerate(names)}
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            log.info("%d of %d images encoded", len(rows), count)
    for array in arrays.values():
        array.flush()
    return rows
