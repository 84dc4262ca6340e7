"""Checksums of arrays, saved with a checkpoint and compared when it is read. Orbax stores none.

The checksum is the sum of an array's words modulo 2^32. It does not depend on the sharding and is computed on the devices
that hold the array. It detects every change of one word, and all but 1 in 2^32 of the other changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.sharding import path_name

# Bytes of an element -> the word that they are summed as.
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def of(tree: Any) -> dict[str, list]:
    """{path: [dtype, sum]} of all arrays of a tree, the same on every process. Takes 0.1 s for 1 GB on a CPU."""
    flat = {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
    arrays = {name: x for name, x in flat.items() if isinstance(x, jax.Array)}
    here = all(
        x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())
        for x in arrays.values()
    )
    sums = (
        map(_on_host, arrays.values()) if here else np.asarray(_on_devices(list(arrays.values())))
    )
    return {
        name: [str(x.dtype), int(total)]
        for (name, x), total in zip(arrays.items(), sums, strict=True)
    }


def check(saved: Mapping[str, list], tree: Any) -> None:
    """Raises ValueError for the first array whose checksum differs. An array that is restored in another dtype is not compared."""
    for name, found in of(tree).items():
        if name in saved and saved[name][0] == found[0] and saved[name] != found:
            raise ValueError(f"{name} is not what was saved: its checksum is another")


def _on_host(x: jax.Array) -> int:
    """The checksum of an array in this process's memory, with NumPy, which needs no compilation."""
    shards = [np.asarray(s.data) for s in x.addressable_shards if s.replica_id == 0]
    return sum(int(_words(a).sum(dtype=np.uint32)) for a in shards) % 2**32


def _words(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(WORDS[array.dtype.itemsize])


@jax.jit
def _on_devices(arrays: list[jax.Array]) -> jax.Array:
    words = [x.view(WORDS[x.dtype.itemsize]) for x in arrays]
    return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in words])
