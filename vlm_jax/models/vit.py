"""The image encoder: SigLIP, SigLIP 2 (fixed resolution) or CLIP, by config.

Hidden states are numbered 0 (patch + position embeddings, after CLIP's pre-norm) to num_layers, as in Hugging Face.
Only the layers up to the feature layer exist: LLaVA's feature is state 23 of 24.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vlm_jax.layers import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    Scores,
    constrain,
    resize_matrix,
    scan_layers,
    sincos_positions,
    weight,
)
from vlm_jax.models.attention import attend
from vlm_jax.settings.model import ViTConfig


class Features(NamedTuple):
    """What a compressor may look at, class token dropped, patches row by row."""

    last: Float[Array, "B P C"]  # the feature layer
    taps: Float[Array, "B P Z"]  # the tapped hidden states side by side; `last` when none is tapped
    scores: Scores | None = None  # only when it is asked for


class Carry(NamedTuple):
    """What goes from layer to layer; each layer replaces `scores` by its own."""

    x: Float[Array, "B R C"]  # R rows: the patches, after the class token if there is one
    tapped: Float[Array, "taps B R C"]
    scores: Scores | None


class Block(nn.Module):
    """Pre-norm transformer layer; also files its output away when it is a tapped state."""

    config: ViTConfig
    taps: tuple[int, ...]

    @nn.compact
    def __call__(self, carry: Carry, state: Int[Array, ""]) -> tuple[Carry, None]:
        x, tapped, scores = carry
        cfg = self.config
        norm = lambda name: LayerNorm(cfg.norm_eps, cfg.dtype, name=name)  # noqa: E731
        attention, normed = SelfAttention(cfg, name="attn"), norm("norm1")(x)
        if scores is not None:
            scores = attention.scores(normed)
        x = x + attention(normed)
        x = x + MLP(cfg, name="mlp")(norm("norm2")(x))
        x = constrain(x, "batch", "patches", "vision")
        if self.taps:
            is_tap = (state == jnp.array(self.taps))[:, None, None, None]
            tapped = jnp.where(is_tap, x, tapped)
        return Carry(x, tapped, scores), None


class NextLayer(nn.Module):
    """The first norm and the query and key maps of the layer after the feature; nothing else of it exists."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B R C"]) -> Scores:
        cfg = self.config
        normed = LayerNorm(cfg.norm_eps, cfg.dtype, name="norm1")(x)
        return SelfAttention(cfg, name="attn").scores(normed)


def _linear(
    cfg: ViTConfig, out: tuple[int, ...], names: tuple, name: str | None = None, in_axes: int = 1
) -> Linear:
    return Linear(
        out, names, in_axes, kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.zeros,
        dtype=cfg.dtype, name=name,
    )  # fmt: skip


class SelfAttention(nn.Module):
    """A map that no called method uses has no parameters."""

    config: ViTConfig

    def setup(self):
        cfg = self.config
        heads = (cfg.num_heads, cfg.width // cfg.num_heads)
        self.q, self.k, self.v = (
            _linear(cfg, heads, (cfg.weight_axis, "heads", None)) for _ in "qkv"
        )
        self.out = _linear(cfg, (cfg.width,), ("heads", None, cfg.weight_axis), in_axes=2)

    def __call__(self, x: Float[Array, "B R C"]) -> Float[Array, "B R C"]:
        return self.out(attend(self.q(x), self.k(x), self.v(x)))

    def scores(self, x: Float[Array, "B R C"]) -> Scores:
        """Queries and keys with their biases, unscaled, heads side by side.

        Without a class token the mean of all patches' queries asks: its product with a key is the mean, over the patches, of
        the (unscaled) logit with which they look at that key. Both are linear, so only one row is mapped.
        """
        first = int(self.config.cls_token)
        asking = x[:, 0] if first else x.mean(axis=1, dtype=jnp.float32).astype(x.dtype)
        query = rearrange(self.q(asking), "b n h -> b (n h)")
        keys = rearrange(self.k(x), "b r n h -> b r (n h)")
        return Scores(query, keys[:, first:], keys[:, 0] if first else None)


class MLP(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B P C"]) -> Float[Array, "B P C"]:
        cfg = self.config
        x = _linear(cfg, (cfg.mlp_width,), (cfg.weight_axis, "mlp"), "fc1")(x)
        return _linear(cfg, (cfg.width,), ("mlp", cfg.weight_axis), "fc2")(
            ACTIVATIONS[cfg.activation](x)
        )


class ViT(nn.Module):
    """`taps` are the numbers of the hidden states to hand out beside the feature.

    scores: also hand out the queries and keys of the layer after the feature, of which only these exist ("next_layer"); of
    the last layer, which computes them anyway, when the feature is its output.
    """

    config: ViTConfig
    taps: tuple[int, ...] = ()
    scores: bool = False

    @nn.compact
    def __call__(self, pixels: Float[Array, "B height width 3"]) -> Features:
        """pixels: RGB, resized to image_px, minus mean over std."""
        cfg = self.config
        x = self._embed(pixels)
        tapped = jnp.stack([x] * len(self.taps)) if self.taps else x[None]
        layers = scan_layers(Block, cfg.feature_state, cfg.remat, in_axes=(0,))(
            cfg, self.taps, name="layers"
        )
        own = self.scores and cfg.feature_layer == -1
        start = Carry(x, tapped, self._no_scores(x) if own else None)
        (x, tapped, scores), _ = layers(start, jnp.arange(1, cfg.feature_state + 1))
        if self.scores and not own:
            scores = NextLayer(cfg, name="next_layer")(x)
        if cfg.post_norm and cfg.feature_layer == -1:
            x = LayerNorm(cfg.norm_eps, cfg.dtype, name="post_norm")(x)
        first = int(cfg.cls_token)
        last = x[:, first:]
        if not self.taps:
            return Features(last, last, scores)
        return Features(last, rearrange(tapped[:, :, first:], "n b p c -> b p (n c)"), scores)

    def _no_scores(self, x: Float[Array, "B R C"]) -> Scores:
        """Zeros of the shapes that every layer hands on."""
        first = int(self.config.cls_token)
        zeros = jnp.zeros(x.shape, self.config.dtype)
        return Scores(zeros[:, 0], zeros[:, first:], zeros[:, 0] if first else None)

    def _embed(self, pixels: Float[Array, "B height width 3"]) -> Float[Array, "B _ C"]:
        cfg = self.config
        side = cfg.grid * cfg.patch_px
        patches = rearrange(
            pixels[:, :side, :side],
            "b (gy y) (gx x) c -> b (gy gx) (y x c)",
            y=cfg.patch_px,
            x=cfg.patch_px,
        )
        x = Linear(
            (cfg.width,), (None, cfg.weight_axis), use_bias=cfg.patch_bias, kernel_init=nn.initializers.lecun_normal(),
            bias_init=nn.initializers.zeros, dtype=cfg.dtype, name="patch_embed",
        )(patches)  # fmt: skip
        source = cfg.position_grid or cfg.grid
        shape = (source**2 + cfg.cls_token, cfg.width)

        def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
            """2-D sines: neighbours and quadrants are told apart before anything is learned; a class token at zero."""
            patches = sincos_positions(source, cfg.width)
            return jnp.concatenate([jnp.zeros((shape[0] - len(patches), cfg.width)), patches])

        table = weight(self, "position", init, shape, (None, cfg.weight_axis))
        positions = table[int(cfg.cls_token) :]
        if source != cfg.grid:
            resize = resize_matrix(cfg.grid, source)
            square = rearrange(positions, "(y x) c -> y x c", y=source)
            positions = rearrange(
                jnp.einsum("Yy,Xx,yxc->YXc", resize, resize, square), "y x c -> (y x) c"
            )
        x = x + positions.astype(cfg.dtype)
        if cfg.cls_token:
            cls = weight(
                self, "cls", nn.initializers.normal(0.02), (cfg.width,), (cfg.weight_axis,)
            )
            row = jnp.broadcast_to((cls + table[0]).astype(cfg.dtype), (x.shape[0], 1, cfg.width))
            x = jnp.concatenate([row, x], axis=1)
        if cfg.pre_norm:
            x = LayerNorm(cfg.norm_eps, cfg.dtype, name="pre_norm")(x)
        return x
