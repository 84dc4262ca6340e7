"""The decoder's low-rank adapters (LoRA, arXiv 2106.09685) as parameters: which they are, and the decoder with them merged.

`layers.Linear` computes with them: y = x W + scale (x A) B. Beside each adapted `kernel` stand `lora_a` [in.., rank] and
`lora_b` [rank, out..], stacked over the layers as the kernel is, and float32 whatever the kernel is stored in.
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
    """`params` without adapters, and without what then is empty."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {path: leaf for path, leaf in flat.items() if not path.endswith(LORA)}, sep="/"
    )


def check_trainable(params: Tree, trainable: Tree) -> None:
    """Raises ConfigError when a kernel is to be trained beside its own adapter."""
    everything = flatten_dict(params, sep="/")
    for path in flatten_dict(trainable, sep="/"):
        if path.endswith("/kernel") and path.removesuffix("kernel") + "lora_a" in everything:
            raise ConfigError(
                f"optim: trainable takes {path}, which has an adapter; use 'lora_|^(compressor|projector)/', or set "
                "model.lm.lora_rank to 0."
            )


def merged(lm: Tree, config: LMConfig, dtype: str) -> Tree:
    """The decoder's parameters with each kernel W + scale A B, computed in float32 and kept in `dtype`, and no adapters."""
    flat = flatten_dict(lm, sep="/")
    for path in LM_LINEARS:
        adapter = config.adapter(path)
        if adapter is not None:
            a, b = flat.pop(f"{path}/lora_a"), flat.pop(f"{path}/lora_b")
            flat[f"{path}/kernel"] = _merge(flat[f"{path}/kernel"], a, b, adapter.scale, dtype)
    return unflatten_dict(flat, sep="/")


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def _merge(
    kernel: Float[Array, "L ..."], a: Float[Array, "L ..."], b: Float[Array, "L ..."], scale: float, dtype: str
) -> Float[Array, "L ..."]:  # fmt: skip
    """Layer by layer, so that one alone stands in float32."""

    def layer(pieces: tuple[Array, Array, Array]) -> Array:
        kernel, a, b = pieces
        product = jnp.tensordot(a, b, axes=1, precision="highest")
        return (kernel.astype(jnp.float32) + scale * product).astype(dtype)

    return jax.lax.map(layer, (kernel, a, b))
