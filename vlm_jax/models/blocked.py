"""Attention for platforms without a flash kernel: in blocks of queries, and without the weights that a backward pass would keep.

A softmax that is written out passes four times over the scores: mask and maximum, exponential and sum, division, cast. Here the
division is of the outputs, which are smaller, and the backward pass computes a block's weights again from the scores'
log-sum-exp, as FlashAttention does (Dao et al. 2022, arXiv 2205.14135). Measured in docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

# Per block of queries: smaller products are inefficient, larger blocks write more scores to memory.
MIN_QUERIES = 128
MAX_BLOCKS = 8  # bounds the compile time
MASKED = -0.7 * float(
    jnp.finfo(jnp.float32).max
)  # finite: a row without keys has equal weights, not NaN


def blocked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    allowed: Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention with N/K queries per key head; scores and softmax are in float32.

    allowed: True where a query attends to a key; causal as AttentionMask says, so that a block of queries leaves out the keys
    behind its last one, nearly half of all scores. None: every query attends to every key.
    """
    (length, heads), (keys, kv_heads) = q.shape[1:3], k.shape[1:3]
    group = heads // kv_heads
    q = rearrange(q, "b t (k g) h -> b k g t h", k=kv_heads)
    k, v = rearrange(k, "b s k h -> b k h s"), rearrange(v, "b s k h -> b k s h")
    size = max(MIN_QUERIES, -(-length // MAX_BLOCKS))
    outputs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        # One axis for all queries of a key head: products that sum over two axes are copied first.
        queries = rearrange(q[..., start:end, :], "b k g t h -> b k (g t) h")
        reach, part = keys, None
        if allowed is not None:
            reach = keys - length + end  # no query of the block attends to a key from here on
            part = jnp.tile(allowed[:, None, start:end, :reach], (1, 1, group, 1))
        out = _block(queries, k[..., :reach], v[:, :, :reach], part)
        outputs.append(rearrange(out, "b k (g t) h -> b t (k g) h", g=group))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


@jax.custom_vjp
def _block(q: Array, k: Array, v: Array, allowed: Array | None) -> Array:
    return _forward(q, k, v, allowed)[0]


def _forward(q: Array, k: Array, v: Array, allowed: Array | None) -> tuple[Array, tuple]:
    scores = _scores(q, k, allowed)
    largest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = _product("bkts,bksh->bkth", weights.astype(v.dtype), v) / total
    out = out.astype(q.dtype)
    return out, (q, k, v, allowed, out, largest + jnp.log(total))


def _backward(kept: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, allowed, out, log_total = kept
    weights = jnp.exp(_scores(q, k, allowed) - log_total)
    d_v = _product("bkts,bkth->bksh", weights.astype(v.dtype), d_out)
    mean = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
    d_scores = weights * (_product("bkth,bksh->bkts", d_out, v) - mean)
    d_scores = d_scores.astype(q.dtype)
    scale = q.shape[-1] ** -0.5
    d_q = scale * _product("bkts,bkhs->bkth", d_scores, k)
    d_k = scale * _product("bkts,bkth->bkhs", d_scores, q)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_block.defvjp(_forward, _backward)


def _scores(q: Array, k: Array, allowed: Array | None) -> Array:
    scores = q.shape[-1] ** -0.5 * _product("bkth,bkhs->bkts", q, k)
    # A sum, not a choice: XLA's CPU backend fuses it with the product and the maximum.
    return scores if allowed is None else scores + jnp.where(allowed, 0.0, MASKED)


def _product(axes: str, *arrays: Array) -> Any:
    return jnp.einsum(axes, *arrays, preferred_element_type=jnp.float32)
