"""The decoder's low-rank adapters (LoRA, arXiv 2106.09685): finding them among the parameters and merging them.

`layers.Linear` applies them: y = x W + scale (x A) B. Next to each adapted `kernel` the parameters have `lora_a` [in.., rank]
and `lora_b` [rank, out..], stacked over layers like the kernel and always stored in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LM_LINEARS, LORA, LMConfig

Tree = dict[str, Any]


def without(params: Tree) -> Tree:
    """`params` without adapters; subtrees that become empty are dropped."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {path: leaf for path, leaf in flat.items() if not path.endswith(LORA)}, sep="/"
    )


def check_trainable(params: Tree, trainable: Tree) -> None:
    """Raises ConfigError when both a kernel and its own adapter are trainable."""
    everything = flatten_dict(params, sep="/")
    for path in flatten_dict(trainable, sep="/"):
        if path.endswith("/kernel") and path.removesuffix("kernel") + "lora_a" in everything:
            raise ConfigError(
                f"optim: trainable takes {path}, which has an adapter; use 'lora_|^(compressor|projector)/', or set "
                "model.lm.lora_rank to 0."
            )


def merged(lm: Tree, config: LMConfig, dtype: str) -> Tree:
    """The decoder's parameters without adapters: each adapted kernel is W + scale A B, computed in float32, cast to `dtype`.

    lm: all of them, or kernels with their adapters.
    """
    flat = flatten_dict(lm, sep="/")
    for path in LM_LINEARS:
        adapter = config.adapter(path)
        if adapter is not None and f"{path}/lora_a" in flat:
            a, b = flat.pop(f"{path}/lora_a"), flat.pop(f"{path}/lora_b")
            flat[f"{path}/kernel"] = _merge(flat[f"{path}/kernel"], a, b, adapter.scale, dtype)
    return unflatten_dict(flat, sep="/")


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def _merge(
    kernel: Float[Array, "L ..."], a: Float[Array, "L ..."], b: Float[Array, "L ..."], scale: float, dtype: str
) -> Float[Array, "L ..."]:  # fmt: skip
    """Merges one layer at a time, so that only one layer is held in float32."""

    def layer(pieces: tuple[Array, Array, Array]) -> Array:
        kernel, a, b = pieces
        product = jnp.tensordot(a, b, axes=1, precision="highest")
        return (kernel.astype(jnp.float32) + scale * product).astype(dtype)

    return jax.lax.map(layer, (kernel, a, b))
