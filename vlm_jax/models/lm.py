"""The decoder: Llama/Vicuna, Mistral (window), Qwen1.5/2/2.5 (qkv bias), Qwen3 (qk-norm), Phi-3 (its fused weights split)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers import (
    GatedMLP,
    Linear,
    RMSNorm,
    apply_rope,
    constrain,
    rope_frequencies,
    scan_layers,
    weight,
)
from vlm_jax.models.attention import AttentionMask, attend
from vlm_jax.settings.model import LMConfig


class Cache(NamedTuple):
    """Keys and values of every layer, made for decoding: a step of 16 rows behind 600 tokens takes a ninth of the time on a CPU.

    The scan over layers carries the cache whole, and each layer writes its tokens in place: a scan over its slices would
    copy all of them at every step. Slots stand behind heads, as attention's products want them: the other way round each
    step would turn all keys and values.
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]

    @property
    def length(self) -> int:
        """Slots per row."""
        return self.k.shape[3]

    def write(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        layer: Int[Array, ""],
        slot: Int[Array, ""] | int,
    ) -> Cache:
        def put(old: Array, new: Array) -> Array:
            new = jnp.swapaxes(new, 1, 2)[None].astype(old.dtype)
            return jax.lax.dynamic_update_slice(old, new, (layer, 0, 0, slot, 0))

        return Cache(put(self.k, k), put(self.v, v))

    def of(self, layer: Int[Array, ""]) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of one layer."""

        def get(x: Array) -> Array:
            return jnp.swapaxes(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), 1, 2)

        return get(self.k), get(self.v)


def empty_cache(config: LMConfig, batch: int, length: int) -> Cache:
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return Cache(_split(jnp.zeros(shape, config.dtype)), _split(jnp.zeros(shape, config.dtype)))


def cache_behind(prefix: Cache, batch: int, length: int) -> Cache:
    """Room for `length` slots behind the one row of `prefix`, which every row of the batch begins with."""

    def grown(x: Float[Array, "L 1 K S H"]) -> Float[Array, "L B K R H"]:
        every = jnp.broadcast_to(x, (x.shape[0], batch, *x.shape[2:]))
        return _split(jnp.pad(every, ((0, 0), (0, 0), (0, 0), (0, length), (0, 0))))

    return Cache(grown(prefix.k), grown(prefix.v))


def _split(x: Float[Array, "L B K S H"]) -> Float[Array, "L B K S H"]:
    return constrain(x, None, "batch", "kv_heads", None, None)


def causal_mask(
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    first_slot: Int[Array, ""] | int = 0,
) -> Bool[Array, "B T S"]:
    """Which keys each query may see; query t sits at slot first_slot + t of the keys.

    Segments: -1 padding, 0 shared prefix (or a whole dialogue), n the n-th independent turn. Two turns of two tokens
    behind a prefix of two:

        prefix  1 . . . . .
                1 1 . . . .
        turn 1  1 1 1 . . .
                1 1 1 1 . .
        turn 2  1 1 . . 1 .
                1 1 . . 1 1
    """
    query_slots = first_slot + jnp.arange(query_segments.shape[1])
    causal = jnp.arange(key_segments.shape[1])[None, :] <= query_slots[:, None]
    keys, queries = key_segments[:, None, :], query_segments[:, :, None]
    return causal & (keys >= 0) & ((keys == 0) | (keys == queries))


def window_mask(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int
) -> Bool[Array, "B T S"]:
    """Which keys lie in each query's sliding window: the query's own position and the window - 1 before it."""
    return query_positions[:, :, None] - key_positions[:, None, :] < window


class Attention(nn.Module):
    config: LMConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: AttentionMask,
        cache: Cache | None,
        slot: Int[Array, ""] | int,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        cfg = self.config
        init = nn.initializers.normal(0.02)

        def project(name: str, heads: int, axis: str) -> Array:
            y = Linear(
                (heads, cfg.head_dim), ("embed", axis, None), use_bias=cfg.qkv_bias, kernel_init=init,
                bias_init=nn.initializers.zeros, dtype=cfg.dtype, adapter=cfg.adapter(f"layers/attn/{name}"), name=name,
            )(x)  # fmt: skip
            return constrain(y, "batch", "length", axis, None)

        q = project("q", cfg.num_heads, "heads")
        k = project("k", cfg.num_kv_heads, "kv_heads")
        v = project("v", cfg.num_kv_heads, "kv_heads")
        if cfg.qk_norm:
            q = RMSNorm(cfg.norm_eps, cfg.dtype, name="q_norm")(q)
            k = RMSNorm(cfg.norm_eps, cfg.dtype, name="k_norm")(k)
        freqs = rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        q, k = apply_rope(q, positions, freqs), apply_rope(k, positions, freqs)
        if cache is not None:
            cache = cache.write(k, v, layer, slot)
            k, v = cache.of(layer)
        out = Linear(
            (cfg.width,), ("heads", None, "embed"), in_axes=2, use_bias=cfg.o_bias, kernel_init=init,
            bias_init=nn.initializers.zeros, dtype=cfg.dtype, adapter=cfg.adapter("layers/attn/o"), name="o",
        )(attend(q, k, v, mask, cfg.attention))  # fmt: skip
        return out, cache


class Block(nn.Module):
    config: LMConfig

    @nn.compact
    def __call__(self, carry, positions, mask, slot, layer):
        (x, cache), cfg = carry, self.config
        normed = RMSNorm(cfg.norm_eps, cfg.dtype, name="attn_norm")(x)
        attended, cache = Attention(cfg, name="attn")(normed, positions, mask, cache, slot, layer)
        x = x + attended
        gate, up, down = (cfg.adapter(f"layers/mlp/{name}") for name in ("gate", "up", "down"))
        x = x + GatedMLP(cfg.mlp_width, cfg.dtype, (gate, up, down), cfg.mlp_bias, name="mlp")(
            RMSNorm(cfg.norm_eps, cfg.dtype, name="mlp_norm")(x)
        )
        return (constrain(x, "batch", "length", "embed_activation"), cache), None


class LM(nn.Module):
    """Token embedding, scanned layers, final norm, head: separate methods, so that images can enter between them."""

    config: LMConfig

    def setup(self):
        cfg = self.config
        init = nn.initializers.normal(0.02)
        shape = (cfg.vocab_size, cfg.width)
        self.table = weight(self, "embed", init, shape, ("vocab", "embed"))
        self.layers = self._scanned(cfg.num_layers)(cfg)
        self.final_norm = RMSNorm(cfg.norm_eps, cfg.dtype)
        if not cfg.tied_embeddings:
            self.head = weight(self, "head", init, shape[::-1], ("embed", "vocab"))

    def _scanned(self, num_layers: int) -> type[nn.Module]:
        broadcast = nn.broadcast
        axes = (broadcast, broadcast, broadcast, 0)
        return scan_layers(Block, num_layers, self.config.remat, in_axes=axes)

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        return self.table.astype(self.config.dtype)[tokens]

    def hidden(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: AttentionMask,
        num_layers: int | None = None,
    ) -> Float[Array, "B T D"]:
        """Final-norm hidden states, after all layers or the first `num_layers`."""
        x = constrain(x, "batch", "length", "embed_activation")
        if num_layers is None or self.is_initializing():
            layers, count = self.layers, self.config.num_layers
        else:
            first = jax.tree.map(lambda p: p[:num_layers], self.layers.variables["params"])
            layers = self._scanned(num_layers)(self.config, parent=None).bind({"params": first})
            count = num_layers
        ((x, _), _) = layers((x, None), positions, mask, 0, jnp.arange(count))
        return self.final_norm(x)

    def cached_hidden(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: AttentionMask,
        cache: Cache,
        slot: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The same over the keys of a cache of length S, after writing this call's from `slot` on."""
        x = constrain(x, "batch", "length", "embed_activation")
        order = jnp.arange(self.config.num_layers)
        ((x, cache), _) = self.layers((x, cache), positions, mask, slot, order)
        return self.final_norm(x), cache

    def output(self) -> Float[Array, "D V"]:
        """The head: the columns that hidden states are multiplied with."""
        return self.table.T if self.config.tied_embeddings else self.head

    def logits(self, hidden: Float[Array, "*B T D"]) -> Float[Array, "*B T V"]:
        return _logits(hidden.astype(self.config.dtype), self.output().astype(self.config.dtype))


@jax.custom_vjp
def _logits(hidden: Float[Array, "*B T D"], head: Float[Array, "D V"]) -> Float[Array, "*B T V"]:
    """hidden @ head, summed and kept in float32 whatever the inputs are.

    The gradient of the logits is rounded to the inputs' dtype before it is multiplied with them, as in the chunked loss:
    jax's own rule would multiply float32 with bfloat16.
    """
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def _logits_forward(hidden: Array, head: Array) -> tuple[Array, tuple[Array, Array]]:
    return _logits(hidden, head), (hidden, head)


def _logits_backward(kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    hidden, head = kept
    grad = grad.astype(head.dtype)
    d_hidden = jnp.einsum("...v,dv->...d", grad, head)
    d_head = jnp.einsum("...d,...v->dv", hidden, grad, preferred_element_type=jnp.float32)
    return d_hidden, d_head.astype(head.dtype)


_logits.defvjp(_logits_forward, _logits_backward)
