"""Where a model that only answers lies: its mesh, on which prompts share devices and each device reads its part of the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from vlm_jax import sharding
from vlm_jax.costs import chips
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import weights

SHARE = 4  # a decode step reads all weights: a quarter of a v5e's memory takes 5 ms, a quarter of an H100's 6 ms


def mesh_for(
    model: VLMConfig, config: MeshConfig, devices: Sequence[Any] | None = None, rows: int = 1
) -> Mesh:
    """The mesh for `rows` prompts at a time: data * fsdp split the prompts, tensor splits the weights, nothing gathers them.

    A configured tensor size of 0 becomes the smallest that divides the model, with which data * fsdp divides the rows, and
    with which the weights take at most a quarter of a known chip's memory; if none does all three, the largest that does
    the first two. Raises ConfigError as `sharding.mesh_sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    heads = model.lm.num_kv_heads
    if config.tensor == 0:
        config = dataclasses.replace(config, tensor=_tensor(model, config, devices, rows))
    return sharding.make_mesh(config, devices, rows, heads)


def _tensor(model: VLMConfig, config: MeshConfig, devices: Sequence[Any], rows: int) -> int:
    if len(devices) == 1:
        return 1
    boxed = weights.answering_shapes(model)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(boxed))
    chip = chips.find(devices[0].device_kind)
    room = chip.hbm_bytes / SHARE if chip else math.inf
    best = 1
    for tensor in range(1, len(devices) // config.slices + 1):
        tried = dataclasses.replace(config, tensor=tensor)
        try:
            sizes = sharding.mesh_sizes(tried, len(devices), kv_heads=model.lm.num_kv_heads)
            mesh = AbstractMesh(sizes, sharding.AXES)
            sharding.check_batch(rows, mesh)
            sharding.shardings_of(boxed, mesh, sharding.ANSWERING)
        except ConfigError:
            continue
        best = tensor
        if size <= room * tensor:
            break
    return best
