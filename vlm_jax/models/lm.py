"""The decoder: Llama/Vicuna, Mistral (window), Qwen1.5/2/2.5 (qkv bias), Qwen3 (qk-norm), Phi-3 (its fused weights split).

Axes: B batch, T queries, S slots of keys, D width, N query heads, K key heads, H head width, L layers, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar, cast

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

# The first slot of a cache that a call writes to: one for all rows, or one per row.
Slot = Int[Array, ""] | Int[Array, "B"] | int


class Cache(NamedTuple):
    """Keys and values in S slots per row, of every layer, or of one layer without the axis L.

    Two choices make a decode step of 16 rows after 600 tokens nine times faster on a CPU. The scan over layers carries the
    whole cache and each layer updates its part in place, where a scan over slices would copy the cache at every step. The
    slot axis comes after the head axis, the order of attention's products, so that no step transposes the cache.
    """

    k: Float[Array, "*L B K S H"]
    v: Float[Array, "*L B K S H"]

    @property
    def length(self) -> int:
        """Slots per row."""
        return self.k.shape[-2]

    def layers(self) -> tuple[Cache, ...]:
        """The cache of each layer."""
        return tuple(Cache(k, v) for k, v in zip(self.k, self.v, strict=True))

    def write(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        slot: Slot,
        layer: Int[Array, ""] | None,
    ) -> Cache:
        """The cache with T tokens of one layer written at slots [slot, slot + T) of its first rows."""
        outer = () if layer is None else (layer,)

        def put(old: Array, new: Array) -> Array:
            new = jnp.swapaxes(new, 1, 2).astype(old.dtype)
            new = new if layer is None else new[None]
            if jnp.ndim(slot) == 0:
                return jax.lax.dynamic_update_slice(old, new, (*outer, 0, 0, slot, 0))
            for row in range(len(k)):  # one update in place per row; a scatter copies
                at = (*outer, row, 0, jnp.asarray(slot)[row], 0)
                own = new[..., row : row + 1, :, :, :]
                old = jax.lax.dynamic_update_slice(old, own, at)
            return old

        return Cache(put(self.k, k), put(self.v, v))

    def read(
        self, rows: int, slots: int, layer: Int[Array, ""] | None
    ) -> tuple[Float[Array, "{rows} {slots} K H"], Float[Array, "{rows} {slots} K H"]]:
        """Keys and values of one layer, in the first `slots` slots of the first `rows` rows."""

        def get(x: Array) -> Array:
            if layer is not None:
                sizes = (1, rows, x.shape[2], slots, x.shape[4])
                x = jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), sizes)[0]
            return jnp.swapaxes(x[:rows, :, :slots], 1, 2)

        return get(self.k), get(self.v)


EACH_LAYER = "each_layer"  # parameters of an LM that has its layers one by one too


# Of all layers together, or one per layer.
AnyCache = TypeVar("AnyCache", bound=Cache | tuple[Cache, ...])


def empty_cache(config: LMConfig, batch: int, length: int) -> Cache:
    """Zeros, with `length` slots for each row of the batch."""
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return Cache(_split(jnp.zeros(shape, config.dtype)), _split(jnp.zeros(shape, config.dtype)))


def cache_behind(prefix: Cache, batch: int, length: int) -> Cache:
    """A cache of `batch` rows: each is a copy of the one row of `prefix`, followed by `length` empty slots."""

    def grown(x: Float[Array, "L 1 K S H"]) -> Float[Array, "L B K R H"]:
        layers, _, heads, slots, width = x.shape
        room = jnp.zeros((layers, batch, heads, slots + length, width), x.dtype)
        every = jnp.broadcast_to(x, (layers, batch, heads, slots, width))
        return _split(jax.lax.dynamic_update_slice(room, every, (0, 0, 0, 0, 0)))

    return Cache(grown(prefix.k), grown(prefix.v))


def _split(x: Float[Array, "L B K S H"]) -> Float[Array, "L B K S H"]:
    return constrain(x, None, "batch", "kv_heads", None, None)


def causal_mask(
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    first_slot: Slot = 0,
) -> Bool[Array, "B T S"]:
    """True where a query attends to a key: no later than itself, and in the prefix or in its own segment.

    Query t is at slot first_slot + t of the keys. Segments: -1 padding, 0 the shared prefix (or a whole dialogue), n the
    n-th independent turn. A prefix of two tokens, followed by two turns of two tokens:

        prefix  1 . . . . .
                1 1 . . . .
        turn 1  1 1 1 . . .
                1 1 1 1 . .
        turn 2  1 1 . . 1 .
                1 1 . . 1 1
    """
    query_slots = jnp.asarray(first_slot)[..., None] + jnp.arange(query_segments.shape[1])
    causal = jnp.arange(key_segments.shape[1]) <= query_slots[..., None]
    keys, queries = key_segments[:, None, :], query_segments[:, :, None]
    return causal & (keys >= 0) & ((keys == 0) | (keys == queries))


def window_mask(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int
) -> Bool[Array, "B T S"]:
    """True where a key lies in the query's sliding window: at its own position or one of the window - 1 before it."""
    return query_positions[:, :, None] - key_positions[:, None, :] < window


class Attention(nn.Module):
    """Causal attention with rotary positions over the keys of this call, or over the cache after writing them to it.

    layer: which layer of the cache this is; None where the cache is of this layer alone.
    """

    config: LMConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: AttentionMask,
        cache: Cache | None,
        slot: Slot,
        layer: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        cfg = self.config
        init = nn.initializers.normal(0.02)

        def project(name: str, heads: int, axis: str) -> Array:
            y = Linear(
                (heads, cfg.head_dim), ("embed", axis, None), use_bias=cfg.qkv_bias, kernel_init=init,
                bias_init=nn.initializers.zeros, dtype=cfg.dtype, adapter=cfg.adapter(f"layers/attn/{name}"), name=name,
            )(x)  # fmt: skip
            return constrain(y, "batch", None, axis, None)

        q = project("q", cfg.num_heads, "heads")
        k = project("k", cfg.num_kv_heads, "kv_heads")
        v = project("v", cfg.num_kv_heads, "kv_heads")
        if cfg.qk_norm:
            q = RMSNorm(cfg.norm_eps, cfg.dtype, name="q_norm")(q)
            k = RMSNorm(cfg.norm_eps, cfg.dtype, name="k_norm")(k)
        freqs = rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        q, k = apply_rope(q, positions, freqs), apply_rope(k, positions, freqs)
        if cache is not None:
            cache = cache.write(k, v, slot, layer)
            if mask.segments is None or mask.num_keys != x.shape[1]:
                k, v = cache.read(x.shape[0], mask.num_keys, layer)
        out = Linear(
            (cfg.width,), ("heads", None, "embed"), in_axes=2, use_bias=cfg.o_bias, kernel_init=init,
            bias_init=nn.initializers.zeros, dtype=cfg.dtype, adapter=cfg.adapter("layers/attn/o"), name="o",
        )(attend(q, k, v, mask, cfg.attention))  # fmt: skip
        return out, cache


class Block(nn.Module):
    """Pre-norm layer. The carry of the scan over layers is (x, cache); every other argument is as in Attention."""

    config: LMConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B T D"], Cache | None],
        positions: Int[Array, "B T"],
        mask: AttentionMask,
        slot: Slot,
        layer: Int[Array, ""] | None,
    ) -> tuple[tuple[Float[Array, "B T D"], Cache | None], None]:
        (x, cache), cfg = carry, self.config
        y = RMSNorm(cfg.norm_eps, cfg.dtype, name="attn_norm")(x)
        y, cache = Attention(cfg, name="attn")(y, positions, mask, cache, slot, layer)
        x = x + y
        y = RMSNorm(cfg.norm_eps, cfg.dtype, name="mlp_norm")(x)
        gate, up, down = (cfg.adapter(f"layers/mlp/{name}") for name in ("gate", "up", "down"))
        mlp = GatedMLP(cfg.mlp_width, cfg.dtype, (gate, up, down), cfg.mlp_bias, name="mlp")
        x = x + mlp(y)
        return (constrain(x, "batch", None, "embed_activation"), cache), None


class LM(nn.Module):
    """Token embedding, scanned layers, final norm, head. They are separate methods, so that visual tokens can be inserted
    between the embedding and the layers.
    """

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
        """Final-norm hidden states after all layers, or after the first `num_layers`."""
        x = constrain(x, "batch", None, "embed_activation")
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
        cache: AnyCache,
        slot: Slot,
    ) -> tuple[Float[Array, "B T D"], AnyCache]:
        """As `hidden`, attending to the cache, after writing the keys and values of x to slots [slot, slot + T).

        One cache per layer goes with the parameters EACH_LAYER/0/.. beside those of the scan: every layer is compiled.
        """
        x = constrain(x, "batch", None, "embed_activation")
        if isinstance(cache, Cache):
            order = jnp.arange(self.config.num_layers)
            ((x, whole), _) = self.layers((x, cache), positions, mask, slot, order)
            return self.final_norm(x), whole
        block, written = Block(self.config, parent=None), list[Cache]()
        for i, own in enumerate(cache):
            weights = {"params": self.variables["params"][EACH_LAYER][str(i)]}
            ((x, own), _) = block.apply(weights, (x, own), positions, mask, slot, None)
            written.append(own)
        return self.final_norm(x), cast(AnyCache, tuple(written))

    def output(self) -> Float[Array, "D V"]:
        """The output head: `hidden @ output` are the logits."""
        return self.table.T if self.config.tied_embeddings else self.head

    def logits(self, hidden: Float[Array, "*B T D"]) -> Float[Array, "*B T V"]:
        return _logits(hidden.astype(self.config.dtype), self.output().astype(self.config.dtype))


@jax.custom_vjp
def _logits(hidden: Float[Array, "*B T D"], head: Float[Array, "D V"]) -> Float[Array, "*B T V"]:
    """hidden @ head, accumulated and returned in float32 whatever the dtype of the inputs.

    The backward pass casts the gradient of the logits to the inputs' dtype first, as the chunked loss does. JAX's own rule
    would multiply float32 with bfloat16.
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
