"""softmax(q k^T / sqrt(H)) v by the kernel that suits the platform. All kernels return the same values.

xla      any causal mask, or none; see blocked.py
cudnn    flash attention on NVIDIA GPUs: in training for rows in which padding only follows the real tokens; in a prefill
         with the mask as a bias; in the image encoder
splash   flash attention on TPUs (Pallas): rows made of segments that do not attend to each other, and the image encoder
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers import on_shards
from vlm_jax.models.blocked import blocked_attention
from vlm_jax.settings.model import VLMConfig

log = logging.getLogger(__name__)


class AttentionMask(NamedTuple):
    """Which keys each query attends to: a dense causal mask, or segments for the flash kernels. Neither: all keys.

    allowed: True where query t attends to key s. It is causal, with its last column belonging to the last query: query t
    attends to no key after S - T + t. Keys beyond column S (unused slots of a cache) are ignored.
    segments: attention is causal within positions of equal number; -1 is padding.
    keys: the numbers of the keys, of which the last T are those of the queries; None: the queries' alone.
    """

    allowed: Bool[Array, "B T S"] | None = None
    segments: Int[Array, "B T"] | None = None
    keys: Int[Array, "B S"] | None = None

    @property
    def num_keys(self) -> int:
        """S, of a mask that is not empty."""
        mask = next(x for x in (self.allowed, self.keys, self.segments) if x is not None)
        return mask.shape[-1]


AMPERE = 8.0  # the first compute capability for which cuDNN has flash attention
FLASH = ("cudnn", "splash")


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B R K H"],
    v: Float[Array, "B R K H"],
    mask: AttentionMask = AttentionMask(),  # noqa: B008 (immutable)
    kernel: str = "xla",
) -> Float[Array, "B T N H"]:
    """Attention with N/K queries per key head; the softmax runs in float32.

    kernel: of a mask given as segments (then R = S; cudnn assumes that they are 0, then -1 to the end, and T = R), of no
    mask, and cudnn of a dense mask too where there are several queries; else xla.
    The outputs of padding (segment -1) differ between kernels.
    """
    if kernel == "cudnn" and not takes_cudnn(q.dtype, q.shape[-1]):
        kernel = "xla"
    if mask.segments is not None:
        return _causal_flash(q, k, v, mask, kernel)
    if mask.allowed is None:
        return _splash(q, k, v) if kernel == "splash" else _all_keys(q, k, v, kernel)
    length, keys = mask.allowed.shape[1:]
    k, v = k[:, :keys], v[:, :keys]
    if kernel == "cudnn" and length > 1:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask.allowed[:, None], implementation="cudnn"
        )
    return blocked_attention(q, k, v, mask.allowed)


def _all_keys(q: Array, k: Array, v: Array, kernel: str) -> Array:
    """Attention to every key, as an image encoder's."""
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return blocked_attention(q, k, v)


def takes_cudnn(dtype: Any, head_dim: int) -> bool:
    """Whether cuDNN's flash kernel computes in this dtype with heads of this width."""
    return jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128


def _causal_flash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    kernel: str,
) -> Float[Array, "B T N H"]:
    """Causal attention within segments, without materialised scores."""
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    assert mask.segments is not None
    return _splash(q, k, v, mask.segments, mask.segments if mask.keys is None else mask.keys)


def _splash(q: Array, k: Array, v: Array, *segments: Array) -> Array:
    """`splash_shard` over the mesh: the compiler cannot partition a Pallas kernel."""
    queries, keys = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    if q.shape[2] == k.shape[2]:  # an encoder's heads are split alike, whatever a decoder has
        keys = queries
    inputs = (queries, keys, keys, *(("batch", None) for _ in segments))
    return on_shards(splash_shard, inputs, (queries,))(q, k, v, *segments)[0]


LANES = 128  # the smallest block of positions that splash computes
BLOCK = 512  # the largest block used: 4 times fewer passes over the keys than with 128


def splash_shard(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None = None,
    keys: Array | None = None,
    interpret: bool = False,
) -> tuple[Array]:
    """Attention of one shard, padded to whole blocks. interpret: emulate the kernel without a TPU (slow).

    segments, keys: as in AttentionMask; neither: every query attends to every key.
    """
    (rows, length, heads, width), num_keys = q.shape, k.shape[1]
    (padded, block), (padded_keys, block_keys) = _blocks(length), _blocks(num_keys)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block_keys, block_kv_compute=block_keys, block_q_dkv=block, block_kv_dkv=block_keys,
        block_kv_dkv_compute=block_keys, use_fused_bwd_kernel=True,
    )  # fmt: skip
    shape = (padded, padded_keys)
    mask = splash.FullMask(shape)
    if segments is not None:
        mask = splash.CausalMask(shape, offset=num_keys - length)
        keys = segments if keys is None else keys
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
    )  # fmt: skip

    def pad(x: Array, to: int, value: int = 0) -> Array:
        wider = ((0, 0), (0, to - x.shape[1]), *((0, 0),) * (x.ndim - 2))
        return jnp.pad(x, wider, constant_values=value)

    of_queries = jnp.zeros((rows, length), jnp.int32) if segments is None else segments
    of_keys = jnp.zeros((rows, num_keys), jnp.int32) if keys is None else keys
    ids = splash.SegmentIds(pad(of_queries, padded, -1), pad(of_keys, padded_keys, -1))
    by_head = [
        pad(x, to).swapaxes(1, 2)
        for x, to in ((q * width**-0.5, padded), (k, padded_keys), (v, padded_keys))
    ]
    out: Any = jax.vmap(kernel)(*by_head, ids)
    return (out.swapaxes(1, 2)[:, :length],)


def _blocks(length: int) -> tuple[int, int]:
    """`length` padded to a whole number of blocks, and the largest block that divides it."""
    padded = length + -length % LANES
    return padded, max(size for size in range(LANES, BLOCK + 1, LANES) if padded % size == 0)


def flash_kernel(device: Any) -> str:
    """The flash kernel of a device; xla for CPUs, for NVIDIA GPUs older than Ampere and for GPUs of other makers."""
    if device.platform == "gpu":
        capability = str(device.compute_capability)  # "9.0"; AMD's are "gfx90a"
        return "cudnn" if capability[0].isdigit() and float(capability) >= AMPERE else "xla"
    return "splash" if device.platform == "tpu" else "xla"


def for_inference(model: VLMConfig, device: Any) -> VLMConfig:
    """The model of a saved run with the flash kernel of `device` where it has one; logs a line if the run's was another.

    The kernel depends on the machine, not on the model: all kernels return the same values. model.lm.attention "xla" stays.
    """
    asked, kernel, lm = model.lm.attention, flash_kernel(device), model.lm
    if asked == "xla":
        return model
    if asked not in ("auto", kernel):
        log.info(
            "the run was trained with model.lm.attention=%s, which this machine (%s) does not have: here it is %s",
            asked,
            device.platform,
            kernel,
        )
    if kernel == "cudnn" and not _compiles(lm.dtype, lm.num_heads, lm.num_kv_heads, lm.head_dim):
        kernel = "xla"
    return dataclasses.replace(model, lm=dataclasses.replace(lm, attention=kernel))


@functools.cache
def _compiles(dtype: str, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether this machine's cuDNN has its kernel for these heads; logs why not."""
    if not takes_cudnn(dtype, head_dim):
        return False
    q, k = (jax.ShapeDtypeStruct((1, 64, n, head_dim), dtype) for n in (heads, kv_heads))
    allowed: Any = jax.ShapeDtypeStruct((1, 64, 64), jnp.bool_)
    mask = AttentionMask(allowed)
    try:
        jax.jit(functools.partial(attend, kernel="cudnn")).lower(q, k, k, mask).compile()
    except (RuntimeError, ValueError) as error:
        log.warning("cuDNN's attention cannot be used, XLA's is: %s", str(error).splitlines()[0])
        return False
    return True
