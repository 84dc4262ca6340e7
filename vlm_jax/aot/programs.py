"""The three programs of a run (train step, prefill, decode step), lowered from shapes without computing anything."""

from __future__ import annotations

import importlib.util
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as DeviceLayout
from jax.sharding import Mesh

from vlm_jax import sharding
from vlm_jax.inference import placement
from vlm_jax.models.attention import for_inference
from vlm_jax.models.lm import empty_cache
from vlm_jax.models.vlm import VLM, Inputs, Layout
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import Experiment, MeshConfig
from vlm_jax.storage import weights
from vlm_jax.training.step import TrainPlan, make_step, plan

TOPOLOGY = re.compile(r"(v4|v5e|v5p|v6e):(\d+(?:x\d+){1,2})$")
SCHEDULE_STEPS = (
    1000  # of the learning rate if the config counts epochs; shapes do not depend on it
)

Shapes = dict[str, jax.ShapeDtypeStruct]


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of `slices` TPU topologies such as "v5e:16x16", which need not exist, or those of this machine ("local").

    Raises ConfigError when libtpu is missing or knows no such topology.
    """
    if topology == "local":
        return jax.devices()
    match = TOPOLOGY.match(topology)
    if match is None:
        raise ConfigError(
            f"--topology: {topology!r} is not known; give v4, v5e, v5p or v6e and the chips along each side, such as "
            "v5e:16x16, v6e:4x4 or v5p:4x4x4, or local for this machine's devices."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--topology: the TPU compiler is not installed; pip install libtpu, or use --topology=local."
        )
    sides = [int(side) for side in match[2].split("x")]
    # By default a host has 2x2 chips; a smaller slice needs a smaller host.
    small = math.prod(sides) < 4
    bounds = {"chips_per_host_bounds": [*sides, 1, 1][:3]} if small else {}
    try:
        more = {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(topology, "tpu", **bounds, **more).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--topology: {topology!r} cannot be built ({reason}); use even sides, such as v5e:2x2, v6e:4x8 or v5p:2x2x2."
        ) from error


def rows_of(mesh: Mesh, wanted: int) -> int:
    """The smallest batch >= `wanted` that splits evenly over the mesh."""
    ways = sharding.batch_ways(mesh)
    return -(-wanted // ways) * ways


def batch(exp: Experiment, mesh: Mesh, rows: int, training: bool) -> Shapes:
    """Shapes, dtypes and shardings of a batch of data/pipeline.py with `rows` samples of max_tokens tokens."""
    data, vit = exp.data, exp.model.vit
    length = (rows, data.max_tokens)
    images = data.image_slots if training else data.max_images
    found: dict[str, tuple[tuple[int, ...], Any]] = {
        name: (length, jnp.int32) for name in ("tokens", "visual_index", "positions", "segments")
    }
    if training:
        found["loss_mask"] = (length, jnp.bool_)
    if training and data.packing:
        found["samples"] = (length, jnp.int32)
    if images:
        asked = (rows, images, 0 if data.query == "none" else data.max_query_tokens)
        found |= {"query_tokens": (asked, jnp.int32), "query_mask": (asked, jnp.bool_)}
        if data.features_dir:
            compressor = exp.model.compressor
            wide = vit.width * (len(compressor.taps) if compressor.uses_taps else 1)
            for name, width in (("feature_last", vit.width), ("feature_taps", wide or vit.width)):
                shape = (rows, images, vit.num_patches, width)
                found[name] = (shape, vit.dtype)
        else:
            found["images"] = ((rows, images, vit.image_px, vit.image_px, 3), jnp.uint8)
    where = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for name, (shape, dtype) in found.items()
    }


def train_plan(exp: Experiment, mesh: Mesh) -> TrainPlan:
    """The plan of step.py. Raises ConfigError when a parameter or the batch does not split evenly over the mesh."""
    return plan(exp, mesh, exp.train.num_steps or SCHEDULE_STEPS)


def train(p: TrainPlan) -> jax.stages.Lowered:
    """The step of step.make_step, lowered."""
    rows = p.experiment.data.batch_size
    with sharding.use(p.mesh):
        return make_step(p).lower(p.state, batch(p.experiment, p.mesh, rows, training=True))


def _answering(exp: Experiment, mesh: Mesh) -> tuple[VLM, Any]:
    """The model and the shapes of its parameters as inference.answer has them."""
    config = for_inference(exp.model, mesh.devices.flat[0])
    return VLM(config), weights.answering(config, mesh)


def answer_mesh(exp: Experiment, devices: list[Any], prompts: int) -> Mesh:
    """The mesh on which `prompts` are answered: mesh.tensor as configured where it is more than 1, else as few as hold the model."""
    tensor = exp.mesh.tensor if exp.mesh.tensor > 1 else 0
    return placement.mesh_for(exp.model, MeshConfig(tensor=tensor), devices, prompts)


def prefill(exp: Experiment, mesh: Mesh, rows: int, new_tokens: int) -> jax.stages.Lowered:
    """The prefill of generate.py: prompts of max_tokens tokens, in a cache with `new_tokens` more slots."""
    model, params = _answering(exp, mesh)

    def run(params: Any, inputs: Inputs) -> Any:
        cache = empty_cache(exp.model.lm, rows, exp.data.max_tokens + new_tokens)
        return model.apply({"params": params}, inputs, cache, method="prefill")

    inputs = Inputs.from_batch(batch(exp, mesh, rows, training=False))
    with sharding.use(mesh):
        return jax.jit(run).lower(params, inputs)


def decode(
    exp: Experiment,
    mesh: Mesh,
    rows: int,
    new_tokens: int,
    prefilled: jax.stages.Compiled,
    params: Any = None,
) -> jax.stages.Lowered:
    """One iteration of generate.py's loop: the cache has the sharding that `prefilled` returns and is updated in place, in the
    layout that the compiler likes, as the carry of that loop is.

    params: the shapes of the parameters, where they are not those of inference.answer.
    """
    model, own = _answering(exp, mesh)
    params = params or own
    slots = exp.data.max_tokens + new_tokens
    cache = jax.eval_shape(lambda: empty_cache(exp.model.lm, rows, slots))
    _, where, _ = prefilled.output_shardings
    cache = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), cache, where
    )
    by_row = sharding.batch_sharding(mesh)
    layout: Any = jax.ShapeDtypeStruct((rows, slots), jnp.int32, sharding=by_row)
    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=by_row)
    slot = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))

    def run(params: Any, tokens: Any, slot: Any, keys: Layout, cache: Any) -> Any:
        logits, cache = model.apply({"params": params}, tokens, slot, keys, cache, method="decode")
        return logits, cache

    with sharding.use(mesh):
        free = jax.tree.map(lambda x: Format(DeviceLayout.AUTO, x.sharding), cache)
        jitted = jax.jit(
            run,
            donate_argnames="cache",
            in_shardings=(None, None, None, None, free),
            out_shardings=(None, free),
        )
        return jitted.lower(params, tokens, slot, Layout(layout, layout), cache)
