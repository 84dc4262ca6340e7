"""MQT, Matryoshka Query Transformer (Hu et al. 2024, arXiv 2405.19315; gordonhu608/MQT-LLaVA): learned queries, of which
the first m are shown.

    queries + positions -> LN -> q [M C]  ------------+
    positions, resized to the patch grid -> LN -> k   +-> attention -> [B M C] -> linear -> [B M D]
    last -> LN -> v [B P C]  -------------------------+

As released, keys hold positions without image content: attention weights are the same for every image, and are computed
once for a batch. Each query attends by itself, so m tokens are the first m of all.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.modules import windows
from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.compressors.mqt import MQTConfig
from vlm_jax.layers import LayerNorm, Linear, resize_matrix, sincos_positions, weight


class MQT(nn.Module):
    """Takes the projector's place: its tokens are as wide as the decoder.

    Differs from the release: heads, query grid and patch grid are free (there 16, 16 and 24), and a number of tokens
    outside 1 .. queries is refused. Sows the attention weights [1 or B, N, M, P] as intermediates/weights.
    """

    config: MQTConfig
    grid: int
    text_width: int

    @nn.compact
    def __call__(
        self,
        last: Float[Array, "B P C"],
        taps: Float[Array, "B P Z"],
        query: None = None,
        scores: None = None,
    ) -> VisualTokens:
        cfg, width, count = self.config, last.shape[-1], self.config.num_tokens(self.grid)

        def normed(name: str, x: Array) -> Array:
            x = LayerNorm(cfg.norm_eps, cfg.dtype, name=f"{name}_norm")(x)
            return windows.head_map(width, cfg.num_heads, cfg.dtype, name)(x)

        shape = (cfg.query_grid**2, width)
        learned = weight(self, "query", nn.initializers.normal(0.02), shape, (None, "vision"))
        positions = query_positions(cfg.query_grid, width)
        places = resized(positions, cfg.query_grid, self.grid)[None]
        q = normed("q", learned[:count] + positions[:count])
        k = normed("k", KEYS[cfg.key_source](places, last))
        v = normed("v", last)
        scores_ = jnp.einsum("mnh,bpnh->bnmp", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores_ / math.sqrt(q.shape[-1]), axis=-1)
        self.sow("intermediates", "weights", weights)
        weights = jnp.broadcast_to(weights, (len(v), *weights.shape[1:])).astype(v.dtype)
        mixed = jnp.einsum("bnmp,bpnh->bmnh", weights, v)
        init = nn.initializers.normal(0.02)  # the reference truncates at 100 standard deviations
        out = Linear(
            (width,), (None, None, "vision"), in_axes=2, kernel_init=init, bias_init=nn.initializers.zeros,
            dtype=cfg.dtype, name="out",
        )(mixed)  # fmt: skip
        init = nn.initializers.normal(self.text_width**-0.5)
        project = Linear(
            (self.text_width,), ("vision", "embed"), use_bias=False, kernel_init=init, dtype=cfg.dtype, name="project",
        )  # fmt: skip
        return VisualTokens(project(out))

    @staticmethod
    def show(visual: VisualTokens, count: Int[Array, ""]) -> VisualTokens:
        """The first `count` tokens."""
        tokens = visual.tokens
        valid = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < count, tokens.shape[:2])
        return VisualTokens(tokens, valid)


KEYS = {
    "positions": lambda places, last: places,
    # Differs from MQT-LLaVA@main: the resampler that it descends from looks at the image too.
    "image": lambda places, last: places + last.astype(jnp.float32),
}


def query_positions(side: int, width: int) -> np.ndarray:
    """Sine positions [side * side, width] as the reference stores them: rounded to float16."""
    return sincos_positions(side, width).astype(np.float16).astype(np.float32)


def resized(positions: np.ndarray, side: int, grid: int) -> Float[Array, "P C"]:
    """Positions of side x side places at grid x grid ones, bicubic."""
    matrix = resize_matrix(grid, side)
    square = rearrange(positions, "(y x) c -> y x c", y=side)
    placed = jnp.einsum("Yy,Xx,yxc->YXc", matrix, matrix, square, precision="highest")
    return rearrange(placed, "y x c -> (y x) c")
