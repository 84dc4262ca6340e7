"""The mesh, and the table that maps logical axes of parameters and activations to mesh axes.

data     data parallelism: the rows of a batch are split, the model is replicated
fsdp     rows are split as well; parameters and optimiser state are sharded and gathered layer by layer
tensor   tensor parallelism (Megatron): heads, MLP and vocabulary are split
group    what is left of `mesh.tensor` where it exceeds the key/value heads: it splits the queries of a head, MLP and
         vocabulary further, and copies keys and values
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

AXES = ("data", "fsdp", "tensor", "group")
BATCH_AXES = ("data", "fsdp")
TENSOR_AXES = ("tensor", "group")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
RULES: Rules = (
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("mlp", TENSOR_AXES),
    ("heads", TENSOR_AXES),
    ("kv_heads", "tensor"),
    ("vocab", TENSOR_AXES),
    ("vision", None),  # encoder and compressor widths: small compared to the decoder, so replicated
    ("embed_activation", None),
    ("layers", None),
)
# Weights that only answer: a decode step has a token per row to hide a gather behind, so each device reads its part alone.
ANSWERING: Rules = tuple((name, None if name == "embed" else axes) for name, axes in RULES)


VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start_processes(timeout: int = 100) -> None:
    """Joins the other processes of a run; without others, keeps compiled programs on disk. Call it before any JAX operation.

    JAX finds them by itself on TPU machines (Compute Engine's metadata, GKE), under SLURM and Open MPI, and in Kubernetes jobs
    (package kubernetes); elsewhere, or against what it finds, set VARIABLES: host:port, number and index. A cluster of one
    process is none. timeout: seconds without a heartbeat, or waiting for a process at shutdown, after which that process
    counts as dead and all others end.

    Raises ConfigError for incomplete variables, and for a cluster that does not say who takes part.
    """
    if not jax.distributed.is_initialized():
        _join(timeout)
    if not jax.distributed.is_initialized():
        keep_programs()


def _join(timeout: int) -> None:
    limits: Any = {"heartbeat_timeout_seconds": timeout, "shutdown_timeout_seconds": timeout}
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


def keep_programs() -> str:
    """Programs of this process are kept on disk from now on; returns the folder.

    It is JAX_COMPILATION_CACHE_DIR, else $XDG_CACHE_HOME/vlm_jax/programs (~/.cache/vlm_jax/programs). Programs that compile
    in less than half a second are not kept.
    """
    folder = jax.config.jax_compilation_cache_dir  # pyrefly: ignore[missing-attribute]
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = os.path.join(home, "vlm_jax", "programs")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


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


def mesh_sizes(
    config: MeshConfig, count: int, rows: int = 0, kv_heads: int = 0
) -> tuple[int, int, int, int]:
    """(data, fsdp, tensor, group) of a mesh of `count` devices; data holds all slices.

    rows: of a batch, or of a micro-batch. A configured tensor size of 0 becomes the smallest for which data * fsdp divides
    the rows, or 1 without rows or if there is none. kv_heads: of the decoder; a tensor size that is a multiple of them is
    split into tensor = kv_heads and group. Raises ConfigError when the product of the sizes is not `count`.
    """
    if count % config.slices:
        raise ConfigError(
            f"mesh: {count} devices are not {config.slices} equal slices; set mesh.slices to a divisor of them."
        )
    slices, own = config.slices, count // config.slices
    given = (config.data, config.fsdp, config.tensor or 1)
    if not config.tensor:
        every = (_filled((*given[:2], tensor), own) for tensor in range(1, own + 1))
        fit = (s for s in every if math.prod(s) == own and rows % (s[0] * s[1] * slices) == 0)
        given = next(fit, given)
    sizes = _filled(given, own)
    if math.prod(sizes) != own:
        text = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, given, strict=False))
        each = f" of a slice ({slices} slices, {count} devices)" if slices > 1 else ""
        raise ConfigError(
            f"mesh: {text} does not make {own} devices{each}; choose sizes whose product is {own}, "
            "or set one of them to -1."
        )
    data, fsdp, tensor = sizes
    group = tensor // kv_heads if kv_heads and tensor % kv_heads == 0 else 1
    return data * slices, fsdp, tensor // group, group


def _filled(sizes: tuple[int, int, int], count: int) -> tuple[int, int, int]:
    """The sizes with -1 replaced by the number of devices left for that axis."""
    known = math.prod(size for size in sizes if size != -1)
    data, fsdp, tensor = (count // known if size == -1 else size for size in sizes)
    return data, fsdp, tensor


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    rows: int = 0,
    kv_heads: int = 0,
) -> Mesh:
    """A (data, fsdp, tensor, group) mesh over all `devices` (default: every device of every process).

    rows, kv_heads, and errors: as in `mesh_sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    laid = _laid(mesh_sizes(config, len(devices), rows, kv_heads), config.slices, devices)
    # Auto: the compiler propagates shardings. Explicit axes reject the gather from a sharded embedding.
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _laid(sizes: tuple[int, int, int, int], slices: int, devices: list[jax.Device]) -> np.ndarray:
    """The devices in the shape of a mesh, whose data axis alone crosses from one slice to another.

    TPUs say which slice they belong to. Other devices are cut into equal parts in their order, which is that of processes.
    """
    if devices[0].platform == "tpu" and slices != (there := len(slices_of(devices))):
        raise ConfigError(
            f"mesh: slices {slices}, but these {len(devices)} TPU devices are {there}; set mesh.slices={there}."
        )
    inner = (sizes[0] // slices, *sizes[1:])
    # allow_split_physical_axes: on a TPU, one side of the torus may be split between two mesh axes.
    if devices[0].platform == "tpu" and slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    size = len(devices) // slices
    parts = [devices[start : start + size] for start in range(0, len(devices), size)]
    return np.concatenate(
        [
            mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
            for part in parts
        ]
    )


def slices_of(devices: Sequence[jax.Device]) -> set[int]:
    """The numbers of the slices that devices belong to; {0} where they do not say."""
    return {getattr(device, "slice_index", 0) for device in devices}


def mesh_of(exp: Experiment, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a training run; errors as in `mesh_sizes`."""
    rows = exp.data.batch_size // exp.train.micro_batches
    return make_mesh(exp.mesh, devices, rows, exp.model.lm.num_kv_heads)


@contextlib.contextmanager
def use(mesh: Mesh) -> Generator[None, None, None]:
    """A context in which `layers.constrain` shards activations over `mesh` by RULES. Initialise parameters outside of it."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def shardings_of(boxed: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Any:
    """The NamedSharding of each leaf of a tree boxed with logical axes (leaves that are not boxed are replicated).

    The result has the structure of the unboxed tree. Abstract leaves (`jax.eval_shape`) suffice. Raises ConfigError, naming
    the parameter, when a mesh axis does not divide the dimension that it splits.
    """
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        nn.logical_to_mesh(nn.get_partition_spec(boxed), rules),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    flat, _ = jax.tree_util.tree_flatten_with_path(nn.unbox(boxed))
    specs = [sharding.spec for sharding in jax.tree.leaves(shardings)]
    for (path, leaf), spec in zip(flat, specs, strict=True):
        for dim, axes in enumerate(spec):
            names = (axes,) if isinstance(axes, str) else axes or ()
            names = [name for name in names if mesh.shape[name] > 1]
            size = math.prod(mesh.shape[name] for name in names)
            if leaf.shape[dim] % size:
                raise ConfigError(
                    f"mesh: parameter {path_name(path)} has shape {leaf.shape}, whose axis {dim} ({leaf.shape[dim]}) is "
                    f"not divisible by mesh axis {'*'.join(names)} ({size}); make {'*'.join(names)} a divisor of it."
                )
    return shardings


def sharded_shapes(boxed: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Boxed shapes as ShapeDtypeStructs with their shardings on `mesh`; errors as in `shardings_of`."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        nn.unbox(boxed),
        shardings_of(boxed, mesh, rules),
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
