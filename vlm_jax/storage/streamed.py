"""A run's parameters read one at a time, for an export that holds one of them, and never a whole model."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vlm_jax import files, sharding
from vlm_jax.models import adapters
from vlm_jax.settings.model import LORA, VLMConfig
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import weights

Tree = dict[str, Any]


class Leaf:
    """A parameter that is read when it is asked for: whole (`numpy.asarray`), or by layer."""

    def __init__(self, path: str, read: Callable[[str], np.ndarray]):
        self.path, self._read = path, read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._read(self.path), dtype)

    def __getitem__(self, layer: int) -> np.ndarray:
        return self._read(self.path)[layer]


def params(
    workdir: str | files.Path, config: VLMConfig, parts: Collection[str], dtype: str, keep: int = 1
) -> Tree:
    """The parts of the newest checkpoint of a run as Leaf objects; adapters are merged into the decoder's kernels, cast to `dtype`.

    keep: parameters in memory at most. Each is read onto a CPU where the backend has one, because accelerators are smaller
    than hosts. Errors, of `weights.load`, come when a leaf is read.
    """
    whole = weights.abstract(config, sharding.make_mesh(MeshConfig(), _host()))
    flat = flatten_dict({part: whole[part] for part in parts if part in whole}, sep="/")
    held: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

    def read(path: str) -> np.ndarray:
        if path not in held:
            while len(held) >= keep:
                held.popitem(last=False)
            held[path] = np.asarray(_loaded(path))
        return held[path]

    def _loaded(path: str) -> Any:
        stem = path.removesuffix("kernel")
        own = [path, *(f"{stem}{name}" for name in LORA if f"{stem}{name}" in flat)]
        tree = unflatten_dict({name: flat[name] for name in own}, sep="/")
        found = weights.load(str(workdir), config, tree)
        if len(own) > 1:
            found["lm"] = adapters.merged(found["lm"], config.lm, dtype)
        return flatten_dict(found, sep="/")[path]

    leaves = {path: Leaf(path, read) for path in flat if not path.endswith(LORA)}
    return unflatten_dict(leaves, sep="/")


def _host() -> list[jax.Device]:
    """A CPU of this process; its first device where JAX was told to use accelerators alone."""
    try:
        return jax.local_devices(backend="cpu")[:1]
    except RuntimeError:
        return jax.local_devices()[:1]
