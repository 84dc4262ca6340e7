"""The image encoder: SigLIP, SigLIP 2 (fixed resolution) or CLIP, by config.

Hidden states are numbered as in Hugging Face: 0 is the patch and position embeddings (after CLIP's pre-norm), n the output
of layer n. Layers after the feature layer are not built; LLaVA's feature is state 23 of 24.

Axes: B images, P patches (R rows with the class token, if there is one), C width, N heads, H head width.
"""

from __future__ import annotations

import math
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
    """The compressor's input: patches in row-major order, without the class token."""

    last: Float[Array, "B P C"]  # the output of the feature layer
    taps: Float[Array, "B P Z"]  # the tapped hidden states, concatenated; `last` if there are none
    scores: Scores | None = None  # only for compressors with `uses_scores`


class Carry(NamedTuple):
    """The carry of the scan over layers. Each layer replaces `scores` with its own."""

    x: Float[Array, "B R C"]
    tapped: Float[Array, "taps B R C"]
    scores: Scores | None


class Block(nn.Module):
    """Pre-norm transformer layer, which stores its output in `tapped` when `state` is a tapped one."""

    config: ViTConfig
    taps: tuple[int, ...]
    kernel: str

    @nn.compact
    def __call__(self, carry: Carry, state: Int[Array, ""]) -> tuple[Carry, None]:
        x, tapped, scores = carry
        cfg = self.config
        attention = SelfAttention(cfg, self.kernel, name="attn")
        y = LayerNorm(cfg.norm_eps, cfg.dtype, name="norm1")(x)
        if scores is not None:
            scores = attention.scores(y)
        x = x + attention(y)
        y = LayerNorm(cfg.norm_eps, cfg.dtype, name="norm2")(x)
        x = x + MLP(cfg, name="mlp")(y)
        x = constrain(x, "batch", "patches", "vision")
        if self.taps:
            is_tap = (state == jnp.array(self.taps))[:, None, None, None]
            tapped = jnp.where(is_tap, x, tapped)
        return Carry(x, tapped, scores), None


class NextLayer(nn.Module):
    """The scores of the layer after the feature: only its first norm and its query and key maps are built."""

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
    """Multi-head attention without a mask. Linen creates parameters on use: `scores` alone builds no `v` and no `out`."""

    config: ViTConfig
    kernel: str = "xla"

    def setup(self):
        cfg = self.config
        heads = (cfg.num_heads, cfg.width // cfg.num_heads)
        self.q, self.k, self.v = (
            _linear(cfg, heads, (cfg.weight_axis, "heads", None)) for _ in "qkv"
        )
        self.out = _linear(cfg, (cfg.width,), ("heads", None, cfg.weight_axis), in_axes=2)

    def __call__(self, x: Float[Array, "B R C"]) -> Float[Array, "B R C"]:
        return self.out(attend(self.q(x), self.k(x), self.v(x), kernel=self.kernel))

    def scores(self, x: Float[Array, "B R C"]) -> Scores:
        """Unscaled queries and keys with their biases, heads concatenated.

        The query is that of the class token. An encoder without one uses the mean query of all patches, whose product with a
        key is the mean attention logit of that key. The query map is linear, so it is applied once, to the mean input.
        """
        first = int(self.config.cls_token)
        source = x[:, 0] if first else x.mean(axis=1, dtype=jnp.float32).astype(x.dtype)
        query = rearrange(self.q(source), "b n h -> b (n h)")
        keys = rearrange(self.k(x), "b r n h -> b r (n h)")
        return Scores(query, keys[:, first:], keys[:, 0] if first else None)


class MLP(nn.Module):
    """Two linear maps with an activation between them."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B P C"]) -> Float[Array, "B P C"]:
        cfg = self.config
        x = _linear(cfg, (cfg.mlp_width,), (cfg.weight_axis, "mlp"), "fc1")(x)
        x = ACTIVATIONS[cfg.activation](x)
        return _linear(cfg, (cfg.width,), ("mlp", cfg.weight_axis), "fc2")(x)


class ViT(nn.Module):
    """Returns the output of the feature layer, and the hidden states and scores that the compressor needs.

    taps: the numbers of the hidden states to return as well.
    scores: also return the queries and keys of the layer after the feature ("next_layer", built for this only), or of the
    last layer if the feature is its output.
    kernel: of models.attention.
    """

    config: ViTConfig
    taps: tuple[int, ...] = ()
    scores: bool = False
    kernel: str = "xla"

    @nn.compact
    def __call__(self, pixels: Float[Array, "B height width 3"]) -> Features:
        """pixels: RGB, resized to image_px and standardised with the encoder's mean and std."""
        cfg = self.config
        x = self._embed(pixels)
        tapped = jnp.stack([x] * len(self.taps)) if self.taps else x[None]
        layers = scan_layers(Block, cfg.feature_state, cfg.remat, in_axes=(0,))(
            cfg, self.taps, self.kernel, name="layers"
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
        """Zeros with the shapes that every layer returns: a scan needs a carry of fixed structure."""
        first = int(self.config.cls_token)
        zeros = jnp.zeros(x.shape, self.config.dtype)
        return Scores(zeros[:, 0], zeros[:, first:], zeros[:, 0] if first else None)

    def _embed(self, pixels: Float[Array, "B height width 3"]) -> Float[Array, "B _ C"]:
        """Hidden state 0: patch embeddings plus positions, after the class token and the pre-norm if there are any."""
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
        table = weight(self, "position", _sincos_table, shape, (None, cfg.weight_axis))
        positions = table[int(cfg.cls_token) :]
        if source != cfg.grid:
            positions = _resize_positions(positions, source, cfg.grid)
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


def _sincos_table(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """2-D sine-cosine positions, so that patches are distinguishable before training; zeros for a class token."""
    patches = sincos_positions(math.isqrt(shape[0]), shape[1])
    return jnp.concatenate([jnp.zeros((shape[0] - len(patches), shape[1])), patches])


def _resize_positions(
    positions: Float[Array, "_ C"], source: int, grid: int
) -> Float[Array, "P C"]:
    """Positions of a source x source grid, interpolated for a grid x grid one."""
    resize = resize_matrix(grid, source)
    square = rearrange(positions, "(y x) c -> y x c", y=source)
    resized = jnp.einsum("Yy,Xx,yxc->YXc", resize, resize, square)
    return rearrange(resized, "y x c -> (y x) c")
