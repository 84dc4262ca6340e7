"""softmax(q k^T / sqrt(H)) v, by the kernel that suits the platform; the same values from each.

xla      any causal mask, in blocks of queries; the scores of a block exist in memory
cudnn    NVIDIA GPUs: flash attention; rows whose every token is real or stands behind all real ones
splash   TPUs: flash attention (Pallas); rows cut into segments that do not see each other
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers import on_shards
from vlm_jax.settings.model import VLMConfig

log = logging.getLogger(__name__)


class Visible(NamedTuple):
    """Which keys a query may see: a mask; or, for flash kernels, which never see one, causality within equal segments.

    The mask ends with the last key that the last query may see: query t sees none behind key S - T + t, and keys that the
    mask does not reach (room in a cache) are seen by none.
    """

    mask: Bool[Array, "B T S"] | None = None
    segments: Int[Array, "B T"] | None = None


AMPERE = 8.0  # compute capability from which NVIDIA's GPUs have a flash kernel
ALL = Visible()


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Visible = ALL,
    kernel: str = "xla",
) -> Float[Array, "B T N H"]:
    """Attention with N/K queries per key head; the softmax runs in float32.

    kernel: xla takes a mask or nothing (all keys are seen); cudnn and splash take segments (T = S), and what a query of
    padding (segment -1) returns differs between the kernels. cudnn assumes that segments are 0, then -1 to the end.
    """
    if visible.segments is None and visible.mask is None:
        return jax.nn.dot_product_attention(q, k, v)
    if visible.mask is not None:
        return _masked(q, k, v, visible.mask)
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    # All mesh axes are named, a sequence axis of size 1 too: a Pallas kernel cannot be cut by the compiler.
    rows = ("batch", "length")
    queries, keys = (*rows, "heads", None), (*rows, "kv_heads", None)
    inputs = (queries, keys, keys, rows)
    return on_shards(splash_shard, inputs, (queries,))(q, k, v, visible.segments)[0]


QUERIES = 128  # per block at least: fewer make the products too small, more leave more scores to write and read
BLOCKS = 8  # at most, for the sake of compile time


def _masked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B R K H"],
    v: Float[Array, "B R K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Blocks of queries, each over the keys up to its last one: nearly half of the scores are never made.

    On a CPU with 664 tokens: half the time forward, 0.42 of it with gradients (16 rows, 8 heads of 32).
    """
    length, keys = mask.shape[1:]
    size = max(QUERIES, -(-length // BLOCKS))
    outputs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        seen = keys - length + end
        here = mask[:, None, start:end, :seen]
        out = jax.nn.dot_product_attention(q[:, start:end], k[:, :seen], v[:, :seen], mask=here)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


LANES = 128  # splash works on blocks of so many positions and more
BLOCK = 512  # the largest block: 4 times fewer passes over the keys than with 128


def splash_shard(
    q: Array, k: Array, v: Array, segments: Array, interpret: bool = False
) -> tuple[Array]:
    """One shard's attention; positions up to a whole block are padding. interpret: without a TPU, slowly."""
    length = q.shape[1]
    beyond = -length % LANES
    padded = length + beyond
    block = max(size for size in range(LANES, BLOCK + 1, LANES) if padded % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    heads = q.shape[2]
    mask = splash.MultiHeadMask([splash.CausalMask((padded, padded))] * heads)
    kernel = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def pad(x: Array, value: int = 0) -> Array:
        return jnp.pad(x, ((0, 0), (0, beyond), *((0, 0),) * (x.ndim - 2)), constant_values=value)

    ids = pad(segments, -1)
    scale = q.shape[-1] ** -0.5
    by_head = [pad(x).swapaxes(1, 2) for x in (q * scale, k, v)]
    out: Any = jax.vmap(kernel)(*by_head, splash.SegmentIds(ids, ids))
    return (out.swapaxes(1, 2)[:, :length],)


def flash_kernel(device: Any) -> str:
    """The flash kernel of a device; xla where there is none: CPUs, GPUs before Ampere or not NVIDIA's."""
    if device.platform == "gpu":
        capability = str(device.compute_capability)  # "9.0"; AMD's are "gfx90a"
        return "cudnn" if capability[0].isdigit() and float(capability) >= AMPERE else "xla"
    return "splash" if device.platform == "tpu" else "xla"


def for_inference(model: VLMConfig, device: Any) -> VLMConfig:
    """The model of a saved run with an attention kernel that `device` has; a line in the log says when it is another one.

    Which kernel computes attention is a matter of the machine, not of the model: the values are the same.
    """
    asked = model.lm.attention
    if asked in ("auto", "xla", flash_kernel(device)):
        return model
    log.info(
        "the run was trained with model.lm.attention=%s, which this machine (%s) does not have: here it is auto",
        asked,
        device.platform,
    )
    return dataclasses.replace(model, lm=dataclasses.replace(model.lm, attention="auto"))
