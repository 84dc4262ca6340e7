"""softmax(q k^T / sqrt(H)) v by the kernel that suits the platform. All kernels return the same values.

xla      any causal mask, computed in blocks of queries; the scores of one block are materialised
cudnn    flash attention on NVIDIA GPUs, for rows in which padding only follows the real tokens
splash   flash attention on TPUs (Pallas), for rows made of segments that do not attend to each other
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


class AttentionMask(NamedTuple):
    """Which keys each query attends to: a dense causal mask, or segments for the flash kernels. Neither: all keys.

    allowed: True where query t attends to key s. It is causal, with its last column belonging to the last query: query t
    attends to no key after S - T + t. Keys beyond column S (unused slots of a cache) are ignored.
    segments: attention is causal within positions of equal number; -1 is padding.
    """

    allowed: Bool[Array, "B T S"] | None = None
    segments: Int[Array, "B T"] | None = None


AMPERE = 8.0  # the first compute capability for which cuDNN has flash attention
# Per block: smaller products are inefficient, larger blocks write more scores to memory.
MIN_QUERIES = 128
MAX_BLOCKS = 8  # bounds the compile time


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B R K H"],
    v: Float[Array, "B R K H"],
    mask: AttentionMask = AttentionMask(),  # noqa: B008 (immutable)
    kernel: str = "xla",
) -> Float[Array, "B T N H"]:
    """Attention with N/K queries per key head; the softmax runs in float32.

    kernel: cudnn or splash for a mask given as segments (then T = R); cudnn assumes that they are 0, then -1 to the end.
    The outputs of padding (segment -1) differ between kernels.

    A dense mask is computed in blocks of queries, each over the keys up to its last query, which skips nearly half of the
    scores. On a CPU with 664 tokens this takes 0.5 of the time forward and 0.42 with gradients (16 rows, 8 heads of 32).
    """
    if mask.segments is not None:
        return _flash(q, k, v, mask.segments, kernel)
    if mask.allowed is None:
        return jax.nn.dot_product_attention(q, k, v)
    length, keys = mask.allowed.shape[1:]
    size = max(MIN_QUERIES, -(-length // MAX_BLOCKS))
    outputs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        reach = keys - length + end  # no query of the block attends to a key from here on
        allowed = mask.allowed[:, None, start:end, :reach]
        out = jax.nn.dot_product_attention(
            q[:, start:end], k[:, :reach], v[:, :reach], mask=allowed
        )
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _flash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    kernel: str,
) -> Float[Array, "B T N H"]:
    """Causal attention within segments, without materialised scores."""
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    rows = ("batch", None)
    queries, keys = (*rows, "heads", None), (*rows, "kv_heads", None)
    inputs = (queries, keys, keys, rows)
    return on_shards(splash_shard, inputs, (queries,))(q, k, v, segments)[0]


LANES = 128  # the smallest block of positions that splash computes
BLOCK = 512  # the largest block used: 4 times fewer passes over the keys than with 128


def splash_shard(
    q: Array, k: Array, v: Array, segments: Array, interpret: bool = False
) -> tuple[Array]:
    """Attention of one shard, padded to a whole number of blocks. interpret: emulate the kernel without a TPU (slow)."""
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
    """The flash kernel of a device; xla for CPUs, for NVIDIA GPUs older than Ampere and for GPUs of other makers."""
    if device.platform == "gpu":
        capability = str(device.compute_capability)  # "9.0"; AMD's are "gfx90a"
        return "cudnn" if capability[0].isdigit() and float(capability) >= AMPERE else "xla"
    return "splash" if device.platform == "tpu" else "xla"


def for_inference(model: VLMConfig, device: Any) -> VLMConfig:
    """The model of a saved run with an attention kernel that `device` has; logs a line if it differs from the run's.

    The kernel depends on the machine, not on the model: all kernels return the same values.
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
