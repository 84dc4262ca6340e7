"""The whole flow, in order: image -> encoder -> compressor (query) -> projector -> image slots -> decoder -> logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from vlm_jax.compressors import get as get_compressor
from vlm_jax.compressors.visual import Visual
from vlm_jax.config import LORA, VLMConfig
from vlm_jax.layers import constrain
from vlm_jax.models.attention import Visible
from vlm_jax.models.lm import LM, Cache, empty_cache, near, visible
from vlm_jax.models.projector import Projector
from vlm_jax.models.vit import Features, ViT


class Inputs(NamedTuple):
    """One batch as the data pipeline makes it (see data/pipeline.py); images and cached features exclude each other."""

    tokens: Int[Array, "B T"]
    visual_index: Int[Array, "B T"]  # -1: text; i * M + m: visual token m of the sample's image i
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]  # see models.lm.visible
    images: UInt8[Array, "B I H W 3"] | None = None
    feature_last: Float[Array, "B I P C"] | None = None
    feature_taps: Float[Array, "B I P Z"] | None = None
    query_tokens: Int[Array, "B I Q"] | None = None
    query_mask: Bool[Array, "B I Q"] | None = None
    count: Int[Array, ""] | None = None  # how many tokens an elastic compressor shows; None: all M
    samples: Int[Array, "B T"] | None = None  # packed rows: which sample of the row a slot is of

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> Inputs:
        return cls(**{name: batch[name] for name in cls._fields if name in batch})


class Layout(NamedTuple):
    """Where the slots of each row stand once it is known which visual slots are filled."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    samples: Int[Array, "B T"] | None = None


def _per_image(x: Array) -> Array:
    return rearrange(x, "b i ... -> (b i) ...")


class VLM(nn.Module):
    config: VLMConfig

    def setup(self):
        cfg = self.config
        compressor = get_compressor(cfg.compressor.name)
        taps = cfg.compressor.taps if compressor.uses_taps else ()
        self.vit = ViT(cfg.vit, taps, compressor.uses_scores)
        width = (cfg.lm.width,) if compressor.place == "instead" else ()
        self.compressor = compressor.module(cfg.compressor, cfg.vit.grid, *width)
        self.projector = Projector(
            cfg.lm.width,
            0 if compressor.place == "instead" else cfg.projector_layers,
            cfg.projector_norm,
            cfg.projector_positions,
            cfg.lm.dtype,
            compressor.num_places(cfg.compressor, cfg.vit.grid),
        )
        self.lm = LM(cfg.lm)

    def __call__(self, inputs: Inputs) -> Float[Array, "B T V"]:
        """Logits of every position, as in training."""
        return self.read(inputs, self.see(inputs))

    def read(self, inputs: Inputs, visual: Visual | None) -> Float[Array, "B T V"]:
        """Logits of every position, of images that were seen before."""
        return self.lm.logits(self.states(inputs, visual)[0])

    def states(
        self, inputs: Inputs, visual: Visual | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """Final-norm states of every position, and the head that makes their logits."""
        x, layout = self.place(inputs, visual)
        return self.lm.hidden(x, layout.positions, self._sees(layout)), self.lm.output()

    def prefill(
        self, inputs: Inputs, cache: Cache, shared: int = 0
    ) -> tuple[Float[Array, "B V"], Cache, Layout]:
        """Logits of the last position of left-padded prompts, whose keys and values fill the cache's next T slots.

        shared: slots of the cache that hold what comes before every prompt already (see `shared_prefix`). The layout is
        that of all slots so far, which later tokens continue.
        """
        hidden, cache, layout = self.cached_states(inputs, cache, shared)
        return self.lm.logits(hidden[:, -1:])[:, 0], cache, layout

    def cached_states(
        self, inputs: Inputs, cache: Cache, shared: int = 0
    ) -> tuple[Float[Array, "B T D"], Cache, Layout]:
        """Final-norm states of the prompts' slots, behind `shared` slots that the cache holds already."""
        x, here = self.place(inputs, self.see(inputs))
        before = jnp.arange(shared, dtype=here.positions.dtype)
        before = jnp.broadcast_to(before, (len(x), shared))
        layout = Layout(
            jnp.concatenate([before, here.positions], axis=1),
            jnp.pad(here.segments, ((0, 0), (shared, 0))),
        )
        seen = Visible(self._mask(here, layout, shared))
        hidden, cache = self.lm.cached_hidden(x, here.positions, seen, cache, shared)
        return hidden, cache, layout

    def shared_prefix(self, tokens: Int[Array, "1 T"]) -> Cache:
        """Keys and values of the text that every prompt begins with."""
        here = Layout(jnp.arange(tokens.shape[1])[None], jnp.zeros_like(tokens))
        seen = Visible(self._mask(here, here))
        cache = empty_cache(self.config.lm, *tokens.shape)
        return self.lm.cached_hidden(self.lm.embed(tokens), here.positions, seen, cache, 0)[1]

    def replies(
        self, inputs: Inputs, slots: int, cache: Cache, shared: int = 0
    ) -> Float[Array, "B {slots}"]:
        """Log-probability of each token in the last `slots` columns, given the prompt and the same reply's tokens before it.

        inputs: as data/prompts.py lays them out; column T - slots - 1 is the prompt's last one. Padding: any value.
        """
        hidden = self.cached_states(inputs, cache, shared)[0]
        length = inputs.tokens.shape[1]
        column = jnp.arange(length - slots, length)
        begins = inputs.segments[:, -slots:] != inputs.segments[:, -slots - 1 : -1]
        before = jnp.where(begins, length - slots - 1, column - 1)  # the column that predicts it
        logits = self.lm.logits(jnp.take_along_axis(hidden, before[..., None], axis=1))
        said = inputs.tokens[:, -slots:, None]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), said, axis=2)[..., 0]

    def decode(
        self,
        tokens: Int[Array, "B"],
        slot: Int[Array, ""],
        keys: Layout,
        cache: Cache,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """One token per row, written at `slot`. keys: of the cache's slots; later ones are hidden by causality."""
        positions = jnp.take(keys.positions, slot, axis=1)
        here = Layout(positions[:, None], jnp.zeros_like(positions)[:, None])
        seen = Visible(self._mask(here, keys, slot))
        hidden, cache = self.lm.cached_hidden(
            self.lm.embed(tokens[:, None]), positions[:, None], seen, cache, slot
        )
        return self.lm.logits(hidden)[:, 0], cache

    def _sees(self, rows: Layout) -> Visible:
        """Which slots each slot of whole rows may see, as the attention kernel wants to be told."""
        if self.config.lm.attention in ("auto", "xla"):
            return Visible(self._mask(rows, rows))
        samples = 0 if rows.samples is None else rows.samples
        return Visible(segments=jnp.where(rows.segments < 0, -1, samples))

    def _mask(
        self, queries: Layout, keys: Layout, first_slot: Int[Array, ""] | int = 0
    ) -> Bool[Array, "B T S"]:
        """Which keys each query may see, a sliding window included."""
        mask = visible(queries.segments, keys.segments, first_slot)
        window = self.config.lm.sliding_window
        if window:
            mask &= near(queries.positions, keys.positions, window)
        if queries.samples is not None and keys.samples is not None:
            mask &= queries.samples[:, :, None] == keys.samples[:, None, :]
        return mask

    def see(self, inputs: Inputs) -> Visual | None:
        """Visual tokens [B*I M D] of every image, up to the projector's norm; None for text-only batches."""
        features = self.features(inputs)
        if features is None:
            return None
        entry = get_compressor(self.config.compressor.name)
        with jax.named_scope("compress"):
            last = self.projector.early(features.last) if entry.place == "inside" else features.last
            visual = self.compressor(last, features.taps, self.query(inputs), features.scores)
            tokens = visual.tokens
            if entry.place == "before":
                tokens = self.projector.early(tokens)
            visual = visual._replace(tokens=self.projector.late(tokens))
        if inputs.count is None:
            return visual
        if entry.elastic is None:
            raise ValueError(f"{self.config.compressor.name} cannot show a part of its tokens")
        return entry.elastic.show(visual.tokens, inputs.count)

    def place(self, inputs: Inputs, visual: Visual | None) -> tuple[Float[Array, "B T D"], Layout]:
        """Token embeddings with the visual tokens put at their slots.

        Slots without a visual token are hidden from every other, and positions close the gap. Each image's tokens stand at
        the end of its slots: the text behind an image is predicted from the slot before it, which must be a filled one.

            slots      <s> - - v v What  is      -: hidden
            positions    0 1 1 1 2    3   4
        """
        text = self.lm.embed(inputs.tokens)
        layout = Layout(inputs.positions, inputs.segments, inputs.samples)
        if visual is None:
            return text, layout
        tokens, index = self.projector.finish(visual.tokens, visual.places), inputs.visual_index
        if visual.valid is not None:
            order = jnp.argsort(visual.valid, axis=1, stable=True)
            tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
            valid = jnp.take_along_axis(visual.valid, order, axis=1)
            valid = rearrange(valid, "(b i) m -> b (i m)", b=text.shape[0])
            hidden = (index >= 0) & ~jnp.take_along_axis(valid, jnp.maximum(index, 0), axis=1)
            layout = layout._replace(
                # A later sample of a packed row moves as a whole: rotary positions only count by their differences.
                positions=layout.positions - jnp.cumsum(hidden, axis=1, dtype=jnp.int32),
                segments=jnp.where(hidden, -1, layout.segments),
            )
        tokens = rearrange(tokens, "(b i) m d -> b (i m) d", b=text.shape[0])
        index = index[..., None]
        placed = jnp.take_along_axis(tokens.astype(text.dtype), jnp.maximum(index, 0), axis=1)
        x = constrain(jnp.where(index >= 0, placed, text), "batch", "length", "embed_activation")
        return x, layout

    def features(self, inputs: Inputs) -> Features | None:
        """Features of every image [B*I P C]: cached ones, or encoded now; None for text-only batches."""
        if inputs.feature_last is not None:
            last = _per_image(inputs.feature_last)
            return Features(
                last, last if inputs.feature_taps is None else _per_image(inputs.feature_taps)
            )
        if inputs.images is None:
            return None
        return self.encode_images(_per_image(inputs.images))

    def encode_images(self, images: UInt8[Array, "B H W 3"]) -> Features:
        mean, std = jnp.array(self.config.vit.mean), jnp.array(self.config.vit.std)
        with jax.named_scope("encode_images"):
            return self.vit((images.astype(jnp.float32) / 255 - mean) / std)

    def query(self, inputs: Inputs) -> Float[Array, "B D"] | None:
        """The decoder's final-norm state at each query's last token, without gradient; None if nobody looks at it.

        The question alone, without image or chat template (QueCC as released; spec of the paper's section 4). A question
        of no tokens (Q = 0) is zeros, which QueCC's text projection turns into a learned vector. With `query_layers` k the
        decoder stops after k layers; after none a token knows no other, so the mean over the question stands for it.
        """
        cfg = self.config.compressor
        if not get_compressor(cfg.name).uses_query:
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
            hidden = self.lm.hidden(x, positions, self._sees(here), layers)
        last = jnp.maximum(valid.sum(axis=1) - 1, 0)
        return jax.lax.stop_gradient(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def dummy_inputs(config: VLMConfig) -> Inputs:
    """The smallest batch that touches every parameter."""
    one = jnp.zeros((1, 1), jnp.int32)
    px = config.vit.image_px
    return Inputs(
        tokens=one, visual_index=one, positions=one, segments=one, images=jnp.zeros((1, 1, px, px, 3), jnp.uint8),
        query_tokens=one[None], query_mask=jnp.ones((1, 1, 1), bool),
    )  # fmt: skip


def init_params(config: VLMConfig, rng: PRNGKeyArray) -> dict[str, Any]:
    """Random parameters, boxed with their logical axes; call it under jit with out_shardings to have them born sharded."""
    # Parameters do not depend on the attention kernel, which this machine may lack (cuDNN's is looked for when it is traced).
    plain = dataclasses.replace(config, lm=dataclasses.replace(config.lm, attention="xla"))
    variables = VLM(plain).init(rng, dummy_inputs(config))
    params = cast(dict[str, Any], variables["params"])  # flax's stub still allows a FrozenDict
    for part, settings in (("vit", config.vit), ("lm", config.lm)):
        params[part] = _stored_as(settings.param_dtype, params[part])
    return params


def _stored_as(dtype: str, params: dict[str, Any]) -> dict[str, Any]:
    """Boxed parameters in their dtype; adapters stay float32, because they are there to learn."""
    flat = flatten_dict(params, sep="/")
    for path in flat:
        if not path.endswith(LORA):
            flat[path] = jax.tree.map(lambda x: x.astype(dtype), flat[path])
    return unflatten_dict(flat, sep="/")


def shapes(config: VLMConfig) -> dict[str, Any]:
    """Shapes and dtypes of a model's parameters, boxed with their logical axes."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
