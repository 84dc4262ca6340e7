"""Tensors of a model directory to sharded parameters, one at a time, and parameters back to tensors.

Strict both ways: every stored tensor of a part is used once or known to be unneeded, and every parameter is set once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import EinopsError, rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.hf.directory import Directory, Names, listed
from vlm_jax.hf.maps import Rule, unneeded
from vlm_jax.settings.checks import ConfigError

log = logging.getLogger(__name__)

Tree = dict[str, Any]
# path -> rule and the tensors' names in the files, layer by layer
Sources = dict[str, tuple[Rule, list[str]]]


def match(part: str, names: Names, rules: Sequence[Rule]) -> Sources:
    """The source of every parameter of `rules`. names: the tensors of a part, as `directory.sort` gives them.

    Raises ConfigError that lists the tensors that are missing, and those that no parameter is made from.
    """
    used = {name for rule in rules for name in rule.names}
    missing = used - set(names)
    extra = {name for name in set(names) - used if not unneeded(name, rules)}
    if missing or extra:
        reasons = [f"missing {listed(missing)}"] * bool(missing)
        reasons += [f"no parameter takes {listed(names[n] for n in extra)}"] * bool(extra)
        raise ConfigError(f"{part}: config.json and the weights do not fit: {'; '.join(reasons)}.")
    return {rule.path: (rule, [names[name] for name in rule.names]) for rule in rules}


def load(directory: Directory, sources: Sources, abstract: Tree) -> Tree:
    """Parameters in the shapes, dtypes and shardings of `abstract`, a tree of ShapeDtypeStructs on a mesh.

    Each tensor goes from its file to the devices before the next is read. Raises ConfigError for a wrong shape (before
    anything is read) and for parameters without a source; warns of NaN and infinite values.
    """
    leaves: dict[str, Any] = dict(flatten_dict(abstract, sep="/"))
    unset = sorted(set(leaves) ^ set(sources))
    if unset:
        raise ConfigError(f"parameters without a tensor, or the reverse: {listed(unset)}.")
    for path, leaf in leaves.items():
        _check_shapes(directory, *sources[path], tuple(leaf.shape))
    loaded, finite = {}, {}
    for path, leaf in leaves.items():
        loaded[path], finite[path] = _put(directory, *sources[path], leaf)
    bad = [path for path, flags in finite.items() if not all(map(bool, flags))]
    if bad:
        log.warning("%s: NaN or infinite values in %s", directory.path, listed(bad))
    return unflatten_dict(loaded, sep="/")


def _check_shapes(
    directory: Directory, rule: Rule, names: Sequence[str], wanted: tuple[int, ...]
) -> None:
    if rule.layers and rule.layers != wanted[0]:
        raise ConfigError(f"{rule.path}: {rule.layers} layers are stored, {wanted[0]} wanted.")
    wanted = wanted[1:] if rule.layers else wanted
    for name in names:
        stored = directory.tensors[name].shape
        first, last, total = rule.rows or (0, *stored[:1], *stored[:1])
        try:
            rows = jax.ShapeDtypeStruct((last - first, *stored[1:]), jnp.float32)
            shape = jax.eval_shape(rule.load, rows).shape
        except EinopsError:
            shape = None
        if shape != wanted or stored[0] != total:
            raise ConfigError(
                f"{str(directory.tensors[name].file)!r}: {name} has shape {list(stored)}, which does not make {rule.path} "
                f"{list(wanted)}; config.json and the weights disagree."
            )


def _put(
    directory: Directory, rule: Rule, names: Sequence[str], leaf: Any
) -> tuple[jax.Array, list[jax.Array]]:
    """One parameter, and for each of its tensors whether all values are finite. The host holds one tensor at a time."""
    sharding = leaf.sharding
    convert, write_layer = _writers(rule.layout, rule.sizes, sharding, leaf.dtype)
    if not rule.layers:
        parameter, flag = convert(_place(directory, rule, names[0], sharding))
        return jax.block_until_ready(parameter), [flag]
    stack, flags = jnp.zeros(leaf.shape, leaf.dtype, device=sharding), []
    for i, name in enumerate(names):
        x = _place(directory, rule, name, _one_layer(sharding))
        stack, flag = write_layer(stack, jnp.int32(i), x)
        flags.append(flag)
        jax.block_until_ready(stack)  # before the next tensor is read into host memory
    return stack, flags


@functools.lru_cache(maxsize=64)
def _writers(layout: str, sizes: tuple, sharding: NamedSharding, dtype: Any) -> tuple[Any, Any]:
    """Jitted: a tensor to a parameter, a tensor to one layer of a (donated) stack; each says whether it is finite.

    The axes are rearranged on the devices, because NumPy transposes only a quarter of a gigabyte per second.
    """

    def convert(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rearrange(x, layout, **dict(sizes)).astype(dtype), jnp.isfinite(x).all()

    def write_layer(
        stack: jax.Array, layer: jax.Array, x: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        x, finite = convert(x)
        return jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0), finite

    out = (sharding, NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.jit(convert, out_shardings=out), jax.jit(
        write_layer, donate_argnums=0, out_shardings=out
    )


def _place(directory: Directory, rule: Rule, name: str, sharding: NamedSharding) -> jax.Array:
    """A tensor in its stored layout, sharded so that each device holds what its shard of the parameter is made from."""
    whole = directory.tensors[name].shape
    first, last = rule.rows[:2] if rule.rows else (0, whole[0] if whole else 1)
    spec = PartitionSpec(*rule.stored_axes(tuple(sharding.spec)))
    stored = NamedSharding(sharding.mesh, spec)
    shape = (last - first, *whole[1:]) if whole else ()
    if not shape:
        tensor = directory.read(name)
        return jax.make_array_from_callback(shape, stored, lambda index: tensor[index])
    # This process's devices hold these rows; the others are not read.
    parts = stored.addressable_devices_indices_map(shape).values()
    held = [index[0].indices(shape[0])[:2] for index in parts if index is not None]
    low, high = min(a for a, _ in held), max(b for _, b in held)
    tensor = directory.read(name, (first + low, first + high))

    def part(index: Any) -> np.ndarray:  # a slice per axis
        start, end, _ = index[0].indices(shape[0])
        return tensor[(slice(start - low, end - low), *index[1:])]

    return jax.make_array_from_callback(shape, stored, part)


def _one_layer(sharding: NamedSharding) -> NamedSharding:
    """The sharding of one layer of a stacked parameter."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def tensor(params: Tree, rules: Sequence[Rule], name: str) -> np.ndarray:
    """The stored tensor `name`, made of the parameters of `rules` (several if it is fused), in their dtype.

    The inverse of `match` and `load`, bit for bit where no dtype changed.
    """
    pieces = []
    for rule in sorted(rules, key=lambda rule: rule.rows or (0, 0, 0)):
        leaf: Any = functools.reduce(lambda node, key: node[key], rule.path.split("/"), params)
        layer = leaf[rule.names.index(name)] if rule.layers else leaf
        pieces.append(rule.store(np.asarray(layer)))
    return np.ascontiguousarray(np.concatenate(pieces))


def tensors(params: Tree, rules: Sequence[Rule]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of every tensor that the rules store, in the order of the rules."""
    for name, pieces in by_tensor(rules).items():
        yield name, tensor(params, pieces, name)


def by_tensor(rules: Sequence[Rule]) -> dict[str, list[Rule]]:
    """The rules of each stored tensor: several where it is fused."""
    pieces: dict[str, list[Rule]] = {}
    for rule in rules:
        for name in rule.names:
            pieces.setdefault(name, []).append(rule)
    return pieces
