"""Parameters from the newest checkpoint of another training run, or from a Hugging Face model directory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, UInt32

from vlm_jax import sharding
from vlm_jax.data import feature_cache
from vlm_jax.hf import directory
from vlm_jax.hf.parts import load_parts
from vlm_jax.models import adapters
from vlm_jax.models.vlm import shapes
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LORA, VLMConfig
from vlm_jax.storage import checksums, frozen
from vlm_jax.storage import run as experiment
from vlm_jax.storage.checkpoint import load_params, saved_names

Tree = dict[str, Any]


def abstract(config: VLMConfig, mesh: Mesh) -> Tree:
    """Shapes, dtypes and shardings of a model's parameters on a mesh, as ShapeDtypeStructs."""
    return sharding.sharded_shapes(shapes(config), mesh)


# Parameters that are read in the dtype of the computation: the matrices, and not what norms and positions compute in float32.
COMPUTED = ("kernel", "embed", "head", *LORA)


def answering_shapes(config: VLMConfig, keep_vit: bool = False) -> Tree:
    """Boxed shapes of a model that only answers: matrices in the dtype in which they are multiplied, which changes no number.

    keep_vit: the encoder as it is stored, for a comparison with the one that cached features were made by.
    """
    boxed = dict(shapes(config))
    for part, dtype in (("lm", config.lm.dtype), ("vit", config.vit.dtype)):
        if part == "lm" or not keep_vit:
            flat = flatten_dict(boxed[part], sep="/")
            for path, box in flat.items():
                if path.rpartition("/")[2] in COMPUTED:
                    flat[path] = jax.tree.map(functools.partial(_narrowed, dtype=dtype), box)
            boxed[part] = unflatten_dict(flat, sep="/")
    return boxed


def _narrowed(leaf: Any, dtype: str) -> jax.ShapeDtypeStruct:
    wanted = jnp.dtype(dtype)
    return jax.ShapeDtypeStruct(
        leaf.shape, wanted if wanted.itemsize < leaf.dtype.itemsize else leaf.dtype
    )


def answering(config: VLMConfig, mesh: Mesh, keep_vit: bool = False) -> Tree:
    """As `abstract`, of `answering_shapes`, split so that no device needs another's part of a weight."""
    return sharding.sharded_shapes(answering_shapes(config, keep_vit), mesh, sharding.ANSWERING)


def load(source: str, config: VLMConfig, wanted: Tree) -> Tree:
    """The parameters of `wanted`, each created directly in its sharding.

    wanted: some top-level parts of what `abstract` gives. Raises ConfigError when `source` has none of that name and shape.
    """
    if directory.is_model(source):
        return load_parts(source, config, wanted)
    elsewhere = frozen.read(source)
    leaves = flatten_dict(wanted, sep="/")
    left_out = {name: leaf for name, leaf in elsewhere.items() if name in leaves}
    if left_out:  # unless the checkpoint holds them all the same, as after train.save_frozen
        held = saved_names(source)
        left_out = {name: leaf for name, leaf in left_out.items() if name not in held}
    own = {name: leaf for name, leaf in leaves.items() if name not in left_out}
    loaded = load_params(source, unflatten_dict(own, sep="/")) if own or not left_out else {}
    others = load_frozen(source, config, wanted, left_out)
    both = flatten_dict(loaded, sep="/") | flatten_dict(others, sep="/")
    return unflatten_dict(both, sep="/")


def load_frozen(
    workdir: str, config: VLMConfig, wanted: Tree, left_out: Mapping[str, frozen.Leaf]
) -> Tree:
    """The parameters of `wanted` that the checkpoints of a run leave out, from where they are.

    Raises ConfigError when a source is gone or holds other parameters now.
    """
    leaves: dict[str, Any] = dict(flatten_dict(wanted, sep="/"))
    found: Tree = {}
    for source, names in frozen.places(workdir, left_out).items():
        asked = unflatten_dict({name: leaves[name] for name in names}, sep="/")
        if directory.is_model(source):
            loaded = load_parts(source, config, asked, some=True)
        else:
            loaded = load(source, config, asked)
        found |= flatten_dict(loaded, sep="/")
    tree = unflatten_dict(found, sep="/")
    try:
        checksums.check({name: leaf.sum for name, leaf in left_out.items()}, tree)
    except ValueError as error:
        name = str(error).split(" ", 1)[0]
        raise ConfigError(
            f"{workdir!r} was trained with another {name.split('/')[0]} than {left_out[name].source!r} holds now ({error}); "
            "put back what was there."
        ) from None
    return tree


def load_by_part(sources: Mapping[str, str], config: VLMConfig, wanted: Tree) -> Tree:
    """The parts of `wanted` that have a source.

    sources: part -> workdir or model directory, "" for none. The decoder's adapters are loaded from a run that has the same
    ones, and left out otherwise. Raises ConfigError when the run has other adapters.
    """
    parts: dict[str, list[str]] = {}
    for part, source in sources.items():
        if source and part not in wanted:
            raise ConfigError(f"init: this model has no part {part!r}; set init.{part} to ''.")
        if source:
            parts.setdefault(source, []).append(part)
    loaded: Tree = {}
    for source, names in parts.items():
        own = {name: wanted[name] for name in names}
        if "lm" in own and (
            directory.is_model(source) or not experiment.has_adapters(source, config.lm)
        ):
            own["lm"] = adapters.without(own["lm"])
        loaded |= load(source, config, own)
    return loaded


def check_cached(directory: str, model: VLMConfig, vit: Any) -> None:
    """Raises ConfigError when the features of `directory` are not those that this model's encoder gives.

    vit: the encoder's parameters. Their settings are compared by `feature_cache.check`.
    """
    made = feature_cache.read_made(directory)
    if model.compressor.uses_taps and tuple(made["taps"]) != taps_of(model):
        raise ConfigError(
            f"features_dir: {directory!r} was made with model.compressor.taps = {tuple(made['taps'])}, this run has "
            f"{taps_of(model)}; {feature_cache.AGAIN}."
        )
    now = fingerprint(vit)
    if now != made["encoder"]:
        raise ConfigError(
            f"features_dir: {directory!r} holds the features of another encoder ({made['source']}, fingerprint "
            f"{made['encoder'][:12]}; this run's is {now[:12]}); set init.vit to the same one, or {feature_cache.AGAIN}."
        )


def taps_of(model: VLMConfig) -> tuple[int, ...]:
    """The hidden states that the compressor looks at beside the feature."""
    return model.compressor.taps


def fingerprint(params: Any) -> str:
    """A hash of the paths, shapes, dtypes and bits of parameters, the same on every platform, mesh and number of processes."""
    sums = jax.device_get(_checksums(params))
    digest = hashlib.sha256()
    for (path, leaf), total in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(sums), strict=True
    ):
        name = f"{sharding.path_name(path)} {leaf.shape} {leaf.dtype} "
        digest.update(name.encode() + np.asarray(total, "<u4").tobytes())
    return digest.hexdigest()


@jax.jit
def _checksums(params: Any) -> Any:
    """Four numbers per leaf, computed on its devices. They are sums modulo 2^32, which do not depend on the sharding."""
    return jax.tree.map(_checksum, params)


def _checksum(leaf: Array) -> UInt32[Array, "4"]:
    width = 8 * leaf.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{width}").astype(jnp.uint32)
    sizes = [jnp.uint32(size) for size in leaf.shape]
    indices = [jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) for axis in range(leaf.ndim)]
    flat_index = functools.reduce(
        lambda at, x: at * x[0] + x[1], zip(sizes, indices, strict=True), 0
    )

    def mixed(odd: Array) -> Array:
        x = (bits ^ (flat_index * odd)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 15)) * jnp.uint32(0xC2B2AE35)
        return (x ^ (x >> 13)).sum(dtype=jnp.uint32)

    odds = jnp.array([0x9E3779B1, 0x7FEB352D, 0x846CA68B, 0x2545F491], jnp.uint32)
    return jax.vmap(mixed)(odds)  # not four times in turn: that takes four times as long to compile
