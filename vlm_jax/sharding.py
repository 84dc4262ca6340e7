"""The mesh, and the table that maps logical axes of parameters and activations to mesh axes.

data     data parallelism: the rows of a batch are split, the model is replicated
fsdp     rows are split as well; parameters and optimiser state are sharded and gathered layer by layer
tensor   tensor parallelism (Megatron): heads, MLP and vocabulary are split
sequence positions of a row are split, for rows too long for one device; each layer gathers keys and values
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import Experiment, MeshConfig

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("vision", None),  # encoder and compressor widths: small compared to the decoder, so replicated
    ("embed_activation", None),
    ("length", "sequence"),
    ("layers", None),
)


VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start_processes(timeout: int = 100) -> None:
    """Joins the other processes of a run, where there are others. Call it before any JAX operation.

    JAX finds them by itself on TPU machines (Compute Engine's metadata, GKE), under SLURM and Open MPI, and in Kubernetes jobs
    (package kubernetes); elsewhere, or against what it finds, set VARIABLES: host:port, number and index. A cluster of one
    process is none. timeout: seconds without a heartbeat, or waiting for a process at shutdown, after which that process
    counts as dead and all others end.

    Raises ConfigError for incomplete variables, and for a cluster that does not say who takes part.
    """
    limits = {"heartbeat_timeout_seconds": timeout, "shutdown_timeout_seconds": timeout}
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given.get("JAX_NUM_PROCESSES") == "1":
        return
    if given:
        address, count, index = (given.get(name, "") for name in VARIABLES)
        if not (address and count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            told = ", ".join(f"{name}={given.get(name, '')!r}" for name in VARIABLES)
            raise ConfigError(
                f"environment: {told}; set all three: host:port of process 0, the number of processes, and this one's index "
                "from 0."
            )
        jax.distributed.initialize(address, int(count), int(index), **limits)
    elif num_processes() > 1:
        jax.distributed.initialize(**limits)


def num_processes() -> int:
    """The number of processes of the cluster that JAX finds this process in; 1 without one. Raises ConfigError.

    What jax.distributed.initialize asks as well; it has no public name.
    """
    for cluster in ClusterEnv._cluster_types:
        try:
            if not cluster.opt_in_only_method and cluster.is_env_present():
                return cluster.get_process_count()
        except Exception as error:  # the network's, the job system's or a parser's
            raise ConfigError(
                f"environment: {cluster.__name__} does not say which processes take part "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); set {', '.join(VARIABLES)} "
                "(JAX_NUM_PROCESSES=1 alone: this process alone)."
            ) from error
    return 1


def mesh_sizes(config: MeshConfig, count: int, rows: int = 0) -> tuple[int, ...]:
    """(data, fsdp, tensor, sequence) of a mesh of `count` devices.

    rows: of a batch, or of a micro-batch. A configured tensor size of 0 becomes the smallest for which data * fsdp divides
    the rows, or 1 without rows or if there is none. Raises ConfigError when the product of the sizes is not `count`.
    """
    given = (config.data, config.fsdp, config.tensor or 1, config.sequence)
    if not config.tensor:
        every = (_filled((*given[:2], tensor, given[3]), count) for tensor in range(1, count + 1))
        fit = (s for s in every if math.prod(s) == count and rows % (s[0] * s[1]) == 0)
        given = next(fit, given)
    sizes = _filled(given, count)
    if math.prod(sizes) != count:
        text = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, given, strict=True))
        raise ConfigError(
            f"mesh: {text} does not make {count} devices; choose sizes whose product is {count}, "
            "or set one of them to -1."
        )
    return sizes


def _filled(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The sizes with -1 replaced by the number of devices left for that axis."""
    known = math.prod(size for size in sizes if size != -1)
    return tuple(count // known if size == -1 else size for size in sizes)


def make_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None, rows: int = 0
) -> Mesh:
    """A (data, fsdp, tensor, sequence) mesh over all `devices` (default: every device of every process).

    rows, and errors: as in `mesh_sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices), rows)
    # allow_split_physical_axes: on a TPU, one side of the torus may be split between two mesh axes.
    laid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto: the compiler propagates shardings. Explicit axes reject the gather from a sharded embedding.
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(exp: Experiment, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a training run; errors as in `mesh_sizes`."""
    return make_mesh(exp.mesh, devices, exp.data.batch_size // exp.train.micro_batches)


@contextlib.contextmanager
def use(mesh: Mesh) -> Generator[None, None, None]:
    """A context in which `layers.constrain` shards activations over `mesh` by RULES. Initialise parameters outside of it."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def shardings_of(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The NamedSharding of each leaf of a tree boxed with logical axes (leaves that are not boxed are replicated).

    The result has the structure of the unboxed tree. Abstract leaves (`jax.eval_shape`) suffice. Raises ConfigError, naming
    the parameter, when a mesh axis does not divide the dimension that it splits.
    """
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    flat, _ = jax.tree_util.tree_flatten_with_path(nn.unbox(boxed))
    specs = [sharding.spec for sharding in jax.tree.leaves(shardings)]
    for (path, leaf), spec in zip(flat, specs, strict=True):
        for dim, axes in enumerate(spec):
            names = (axes,) if isinstance(axes, str) else axes or ()
            size = math.prod(mesh.shape[name] for name in names)
            if leaf.shape[dim] % size:
                raise ConfigError(
                    f"mesh: parameter {path_name(path)} has shape {leaf.shape}, whose axis {dim} ({leaf.shape[dim]}) is "
                    f"not divisible by mesh axis {'*'.join(names)} ({size}); make {'*'.join(names)} a divisor of it."
                )
    return shardings


def sharded_shapes(boxed: Any, mesh: Mesh) -> Any:
    """Boxed shapes as ShapeDtypeStructs with their shardings on `mesh`; errors as in `shardings_of`."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        nn.unbox(boxed),
        shardings_of(boxed, mesh),
    )


def shardings_like(tree: Any, params: Any, mesh: Mesh) -> Any:
    """The shardings of an optimiser state. params: the parameters, or ShapeDtypeStructs with shardings.

    A leaf whose path ends in a parameter's path, with that parameter's shape, is sharded like it; others are replicated.
    """
    by_path = {
        path_keys(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    longest = max((len(keys) for keys in by_path), default=0)

    def find(path: tuple, leaf: Any) -> NamedSharding:
        keys = path_keys(path)
        for length in range(min(longest, len(keys)), 0, -1):
            param = by_path.get(keys[-length:])
            if param is not None and param.shape == leaf.shape:
                return param.sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over data and fsdp; other axes are not split."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """The number of equal parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, mesh: Mesh | AbstractMesh, micro_batches: int = 1) -> None:
    """Raises ConfigError when the rows of the global batch do not split evenly over the mesh and the micro-batches."""
    ways = batch_ways(mesh)
    if batch_size % (ways * micro_batches):
        parts = f" * train.micro_batches {micro_batches}" if micro_batches > 1 else ""
        raise ConfigError(
            f"data: batch_size {batch_size} is not divisible by mesh data*fsdp = {ways}{parts}; "
            f"use a multiple of {ways * micro_batches}."
        )


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the devices of this process hold share `index` of `count` equal shares of a batch's rows.

    Processes that differ only along an axis that does not split rows (tensor) hold, and must load, the same share.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    held: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((ways,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(len(rows) for rows in shares) != ways or len({len(rows) for rows in shares}) > 1:
        raise ConfigError(
            f"mesh: the processes' devices share rows unevenly ({held}); make data*fsdp or tensor fill whole processes."
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def put(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch [B ...] made of every process's local rows. Entries that are not arrays (record ids) are dropped."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
        if isinstance(value, np.ndarray)
    }


def path_keys(path: tuple) -> tuple[str, ...]:
    """The names along a key path; list indices become strings."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def path_name(path: tuple) -> str:
    """A key path as "lm/layers/attn/q/kernel"."""
    return "/".join(path_keys(path))
