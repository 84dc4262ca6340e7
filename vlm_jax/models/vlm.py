"""The whole flow, in order: image -> encoder -> compressor (query) -> projector -> image slots -> decoder -> logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.layers import constrain
from vlm_jax.models.attention import FLASH, AttentionMask
from vlm_jax.models.lm import LM, AnyCache, Cache, Slot, causal_mask, empty_cache, window_mask
from vlm_jax.models.projector import Projector
from vlm_jax.models.vit import Features, ViT
from vlm_jax.settings.model import LORA, VLMConfig


class Inputs(NamedTuple):
    """One batch as data/pipeline.py makes it. It has images or cached features, never both, or neither (text only)."""

    tokens: Int[Array, "B T"]
    visual_index: Int[Array, "B T"]  # -1: text; i * M + m: visual token m of the sample's image i
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]  # see models.lm.causal_mask
    images: UInt8[Array, "B I H W 3"] | None = None
    feature_last: Float[Array, "B I P C"] | None = None
    feature_taps: Float[Array, "B I P Z"] | None = None
    query_tokens: Int[Array, "B I Q"] | None = None
    query_mask: Bool[Array, "B I Q"] | None = None
    count: Int[Array, ""] | None = None  # tokens that an elastic compressor keeps; None: all M
    samples: Int[Array, "B T"] | None = None  # packed rows: the sample that each slot belongs to

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> Inputs:
        return cls(**{name: batch[name] for name in cls._fields if name in batch})


class Layout(NamedTuple):
    """Positions and segments of the slots of each row, after the compressor has decided which visual slots are filled."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    samples: Int[Array, "B T"] | None = None


def _per_image(x: Array) -> Array:
    """[B I ..] as [B*I ..]."""
    return rearrange(x, "b i ... -> (b i) ...")


class VLM(nn.Module):
    """Encoder, compressor, projector and decoder. B rows of T slots; I images per row, M visual tokens per image."""

    config: VLMConfig

    def setup(self):
        cfg = self.config
        compressor = cfg.compressor
        kernel = cfg.lm.attention if cfg.lm.attention in FLASH else "xla"
        self.vit = ViT(cfg.vit, compressor.taps, compressor.uses_scores, kernel)
        width = (cfg.lm.width,) if compressor.place == "instead" else ()
        self.compressor = compressor.module(cfg.vit.grid, *width)
        self.projector = Projector(
            cfg.lm.width,
            0 if compressor.place == "instead" else cfg.projector_layers,
            cfg.projector_norm,
            cfg.projector_positions,
            cfg.lm.dtype,
            compressor.num_places(cfg.vit.grid),
        )
        self.lm = LM(cfg.lm)

    def __call__(self, inputs: Inputs) -> Float[Array, "B T V"]:
        """Logits of every position, as in training."""
        return self.logits(inputs, self.encode_images(inputs))

    def logits(self, inputs: Inputs, visual: VisualTokens | None) -> Float[Array, "B T V"]:
        """Logits of every position, given the visual tokens of `encode_images`."""
        x, layout = self.insert_visual_tokens(inputs, visual)
        return self.lm.logits(self.lm.hidden(x, layout.positions, self.attention_mask(layout)))

    def states(
        self, inputs: Inputs, visual: VisualTokens | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """Final-norm states of every position and the head: `states @ head` are the logits."""
        x, layout = self.insert_visual_tokens(inputs, visual)
        return self.lm.hidden(x, layout.positions, self.attention_mask(layout)), self.lm.output()

    def prefill(
        self, inputs: Inputs, cache: Cache, shared: int = 0
    ) -> tuple[Float[Array, "B V"], Cache, Layout]:
        """Logits of the last position of left-padded prompts; writes their keys and values to slots [shared, shared + T).

        shared: the number of cache slots that already hold the prefix of every prompt (see `shared_prefix`). The returned
        layout covers the shared + T slots written so far.
        """
        hidden, cache, layout = self._cached_states(inputs, cache, shared, self._prompt_mask)
        return self.lm.logits(hidden[:, -1:])[:, 0], cache, layout

    def _cached_states(
        self,
        inputs: Inputs,
        cache: Cache,
        shared: int,
        mask: Callable[[Layout, Layout, int], AttentionMask],
    ) -> tuple[Float[Array, "B T D"], Cache, Layout]:
        """Final-norm states of the prompts, written to the cache after its first `shared` slots; see `prefill`."""
        x, here = self.insert_visual_tokens(inputs, self.encode_images(inputs))
        before = jnp.arange(shared, dtype=here.positions.dtype)
        before = jnp.broadcast_to(before, (len(x), shared))
        layout = Layout(
            jnp.concatenate([before, here.positions], axis=1),
            jnp.pad(here.segments, ((0, 0), (shared, 0))),
        )
        allowed = mask(here, layout, shared)
        hidden, cache = self.lm.cached_hidden(x, here.positions, allowed, cache, shared)
        return hidden, cache, layout

    def shared_prefix(self, tokens: Int[Array, "1 T"]) -> Cache:
        """A cache that holds the keys and values of the text with which every prompt begins."""
        here = Layout(jnp.arange(tokens.shape[1])[None], jnp.zeros_like(tokens))
        mask = self._dense_mask(here, here)
        cache = empty_cache(self.config.lm, *tokens.shape)
        return self.lm.cached_hidden(self.lm.embed(tokens), here.positions, mask, cache, 0)[1]

    def replies(
        self, inputs: Inputs, slots: int, cache: Cache, shared: int = 0
    ) -> Float[Array, "B {slots}"]:
        """Log-probability of each token in the last `slots` columns, given the prompt and the preceding tokens of its reply.

        inputs: prompt and replies side by side, as data/eval_batches.py makes them; column T - slots - 1 is the last of the
        prompt. The values of padding columns are meaningless.
        """
        hidden = self._cached_states(inputs, cache, shared, self._dense_mask)[0]
        length = inputs.tokens.shape[1]
        column = jnp.arange(length - slots, length)
        begins = inputs.segments[:, -slots:] != inputs.segments[:, -slots - 1 : -1]
        before = jnp.where(
            begins, length - slots - 1, column - 1
        )  # the column whose logits predict it
        logits = self.lm.logits(jnp.take_along_axis(hidden, before[..., None], axis=1))
        said = inputs.tokens[:, -slots:, None]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), said, axis=2)[..., 0]

    def decode(
        self,
        tokens: Int[Array, "B"],
        slot: Int[Array, ""],
        keys: Layout,
        cache: AnyCache,
    ) -> tuple[Float[Array, "B V"], AnyCache]:
        """Logits after one more token per row, which is written to the cache at `slot`.

        keys: the layout of the cache's slots. Slots after `slot` are masked by causality.
        """
        positions = jnp.take(keys.positions, slot, axis=1)
        here = Layout(positions[:, None], jnp.zeros_like(positions)[:, None])
        mask = self._dense_mask(here, keys, slot)
        hidden, cache = self.lm.cached_hidden(
            self.lm.embed(tokens[:, None]), positions[:, None], mask, cache, slot
        )
        return self.lm.logits(hidden)[:, 0], cache

    def extend(
        self, inputs: Inputs, slots: Int[Array, "B"], keys: Layout, cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache, Layout]:
        """Logits of the last position of tokens that follow what the first B rows of a cache hold.

        inputs: left-padded; row b is written to slots [slots[b], slots[b] + T), T = 1 for a step of decoding. keys: the
        layout of the first S slots, which alone are read; it is returned with the new tokens in it.
        """
        x, here = self.insert_visual_tokens(inputs, self.encode_images(inputs))

        def put(old: Int[Array, "B S"], new: Int[Array, "B T"]) -> Int[Array, "B S"]:
            return jax.vmap(jax.lax.dynamic_update_slice)(old, new, slots[:, None])

        keys = Layout(put(keys.positions, here.positions), put(keys.segments, here.segments))
        mask = self._dense_mask(here, keys, slots)
        hidden, cache = self.lm.cached_hidden(x, here.positions, mask, cache, slots)
        return self.lm.logits(hidden[:, -1:])[:, 0], cache, keys

    def attention_mask(self, rows: Layout) -> AttentionMask:
        """The mask of whole rows (queries are keys), in the form that the configured attention kernel takes."""
        if self.config.lm.attention not in FLASH:
            return self._dense_mask(rows, rows)
        samples = 0 if rows.samples is None else rows.samples
        return AttentionMask(segments=jnp.where(rows.segments < 0, -1, samples))

    def _prompt_mask(self, queries: Layout, keys: Layout, first_slot: int) -> AttentionMask:
        """The mask of prompts, whose slots are padding or one dialogue, behind keys that each of them attends to."""
        length, window = keys.segments.shape[1], self.config.lm.sliding_window
        if self.config.lm.attention != "splash" or 0 < window < length:
            return self._dense_mask(queries, keys, first_slot)
        return AttentionMask(segments=queries.segments, keys=keys.segments)

    def _dense_mask(self, queries: Layout, keys: Layout, first_slot: Slot = 0) -> AttentionMask:
        return AttentionMask(self._mask(queries, keys, first_slot))

    def _mask(self, queries: Layout, keys: Layout, first_slot: Slot = 0) -> Bool[Array, "B T S"]:
        """Causal mask over segments, restricted to the sliding window and to the query's own sample of a packed row."""
        mask = causal_mask(queries.segments, keys.segments, first_slot)
        window = self.config.lm.sliding_window
        if window:
            mask &= window_mask(queries.positions, keys.positions, window)
        if queries.samples is not None and keys.samples is not None:
            mask &= queries.samples[:, :, None] == keys.samples[:, None, :]
        return mask

    def encode_images(self, inputs: Inputs) -> VisualTokens | None:
        """Visual tokens [B*I M D] of every image; None for text-only batches.

        The projector's norm and positions are still missing: `insert_visual_tokens` applies them.
        """
        features = self.features(inputs)
        if features is None:
            return None
        place = self.config.compressor.place
        with jax.named_scope("compress"):
            last = self.projector.early(features.last) if place == "inside" else features.last
            visual = self.compressor(last, features.taps, self.query(inputs), features.scores)
            tokens = visual.tokens
            if place == "before":
                tokens = self.projector.early(tokens)
            visual = visual._replace(tokens=self.projector.late(tokens))
        if inputs.count is None:
            return visual
        if not self.config.compressor.elastic:
            raise ValueError(f"{self.config.compressor.name} cannot show a part of its tokens")
        return self.compressor.show(visual, inputs.count)

    def insert_visual_tokens(
        self, inputs: Inputs, visual: VisualTokens | None
    ) -> tuple[Float[Array, "B T D"], Layout]:
        """Token embeddings, with the visual tokens in their slots.

        A compressor may fill fewer than M slots. Empty slots are masked and positions do not count them. The tokens of an
        image are moved to the end of its slots, because the first text token after the image is predicted from its last slot.

            slots      <s> - - v v What  is      -: empty
            positions    0 1 1 1 2    3   4
        """
        text = self.lm.embed(inputs.tokens)
        layout = Layout(inputs.positions, inputs.segments, inputs.samples)
        if visual is None:
            return text, layout
        tokens, index = self.projector.finish(visual.tokens, visual.places), inputs.visual_index
        if visual.valid is not None:
            order = jnp.argsort(visual.valid, axis=1, stable=True)  # empty slots first
            tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
            valid = jnp.take_along_axis(visual.valid, order, axis=1)
            valid = rearrange(valid, "(b i) m -> b (i m)", b=text.shape[0])
            hidden = (index >= 0) & ~jnp.take_along_axis(valid, jnp.maximum(index, 0), axis=1)
            layout = layout._replace(
                # In a packed row this shifts later samples as a whole, which changes nothing: RoPE depends on differences.
                positions=layout.positions - jnp.cumsum(hidden, axis=1, dtype=jnp.int32),
                segments=jnp.where(hidden, -1, layout.segments),
            )
        tokens = rearrange(tokens, "(b i) m d -> b (i m) d", b=text.shape[0])
        index = index[..., None]
        placed = jnp.take_along_axis(tokens.astype(text.dtype), jnp.maximum(index, 0), axis=1)
        x = constrain(jnp.where(index >= 0, placed, text), "batch", None, "embed_activation")
        return x, layout

    def features(self, inputs: Inputs) -> Features | None:
        """Features of every image [B*I P C], cached or computed now; None for text-only batches."""
        if inputs.feature_last is not None:
            last = _per_image(inputs.feature_last)
            return Features(
                last, last if inputs.feature_taps is None else _per_image(inputs.feature_taps)
            )
        if inputs.images is None:
            return None
        return self.image_features(_per_image(inputs.images))

    def image_features(self, images: UInt8[Array, "B H W 3"]) -> Features:
        """Features of images already resized to the encoder's resolution."""
        mean, std = jnp.array(self.config.vit.mean), jnp.array(self.config.vit.std)
        with jax.named_scope("encode_images"):
            return self.vit((images.astype(jnp.float32) / 255 - mean) / std)

    def query(self, inputs: Inputs) -> Float[Array, "B D"] | None:
        """The question as the compressor's query: the decoder's final-norm state at its last token, without gradient.

        None if the compressor does not use a query. The decoder reads the question alone, without image or chat template
        (QueCC as released; section 4 of its paper). A question without tokens (Q = 0) gives zeros, which QueCC's text
        projection turns into a learned vector. `query_layers` limits the number of layers; with 0 layers no attention mixes
        the tokens, so the query is the normalised mean of the question's embeddings.
        """
        cfg = self.config.compressor
        if not cfg.uses_query:
            return None
        if inputs.query_tokens is None or inputs.query_mask is None:
            raise ValueError(f"{cfg.name} needs query_tokens and query_mask beside the images")
        tokens, valid = _per_image(inputs.query_tokens), _per_image(inputs.query_mask)
        x = self.lm.embed(tokens)
        if not tokens.shape[1]:
            return jnp.zeros((len(x), x.shape[-1]), x.dtype)
        if cfg.query_layers == 0:
            count = jnp.maximum(valid.sum(axis=1), 1)
            mean = jnp.where(valid[..., None], x, 0).sum(axis=1) / count[:, None]
            return jax.lax.stop_gradient(self.lm.final_norm(mean.astype(x.dtype)))
        segments = jnp.where(valid, 0, -1)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        layers = None if cfg.query_layers == -1 else cfg.query_layers
        with jax.named_scope("query"):
            here = Layout(positions, segments)
            hidden = self.lm.hidden(x, positions, self.attention_mask(here), layers)
        last = jnp.maximum(valid.sum(axis=1) - 1, 0)
        return jax.lax.stop_gradient(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def dummy_inputs(config: VLMConfig) -> Inputs:
    """The smallest batch whose forward pass uses every parameter."""
    one = jnp.zeros((1, 1), jnp.int32)
    px = config.vit.image_px
    return Inputs(
        tokens=one, visual_index=one, positions=one, segments=one, images=jnp.zeros((1, 1, px, px, 3), jnp.uint8),
        query_tokens=one[None], query_mask=jnp.ones((1, 1, 1), bool),
    )  # fmt: skip


def init_params(config: VLMConfig, rng: PRNGKeyArray) -> dict[str, Any]:
    """Random parameters, boxed with their logical axes. Under jit with out_shardings they are created sharded."""
    # Parameters do not depend on the attention kernel, and tracing cuDNN's fails on a machine without it.
    plain = dataclasses.replace(config, lm=dataclasses.replace(config.lm, attention="xla"))
    variables = VLM(plain).init(rng, dummy_inputs(config))
    params = cast(dict[str, Any], variables["params"])  # flax's stub still allows a FrozenDict
    for part, settings in (("vit", config.vit), ("lm", config.lm)):
        params[part] = _stored_as(settings.param_dtype, params[part])
    return params


def _stored_as(dtype: str, params: dict[str, Any]) -> dict[str, Any]:
    """Boxed parameters cast to `dtype`, except adapters: they are trained, so they stay float32."""
    flat = flatten_dict(params, sep="/")
    for path in flat:
        if not path.endswith(LORA):
            flat[path] = jax.tree.map(lambda x: x.astype(dtype), flat[path])
    return unflatten_dict(flat, sep="/")


def shapes(config: VLMConfig) -> dict[str, Any]:
    """Shapes and dtypes of a model's parameters, boxed with their logical axes."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
