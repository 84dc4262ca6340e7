"""TokenPacker (Li et al. 2024, arXiv 2407.02392; CircleRadon/TokenPacker): coarse queries collect their window's detail.

last -> bilinear down-sampling -> linear -> LN -> q [B M C]  --+
taps -> MLP -> LN -> windows                   -> k, v       --+-> attention -> [B M C]
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.compressors.modules import windows
from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.compressors.tokenpacker import TokenPackerConfig
from vlm_jax.layers import LayerNorm, Linear

# The reference truncates at +-2, which is 100 standard deviations: a plain normal.
KERNEL_INIT = nn.initializers.normal(0.02)


class TokenPacker(nn.Module):
    """Differs from the release: width of the taps, heads and grid are free (there 4096, 8 and 24), and the projector that
    follows keeps its own initialisation (there also normal, 0.02).
    """

    config: TokenPackerConfig
    grid: int

    @nn.compact
    def __call__(
        self,
        last: Float[Array, "B P C"],
        taps: Float[Array, "B P Z"],
        query: None = None,
        scores: None = None,
    ) -> VisualTokens:
        """The question is not looked at."""
        cfg, width = self.config, last.shape[-1]

        def mlp(name: str) -> windows.NormedMLP:
            return windows.NormedMLP(
                width, cfg.norm_eps, cfg.dtype, KERNEL_INIT, nn.initializers.zeros, name=name
            )

        coarse = bilinear(windows.split(last, self.grid, cfg.stride)).astype(cfg.dtype)
        q = Linear(
            (width,), ("vision", None), use_bias=False, kernel_init=KERNEL_INIT, dtype=cfg.dtype, name="query",
        )(coarse)  # fmt: skip
        q = LayerNorm(cfg.norm_eps, cfg.dtype, name="query_norm")(q)
        k = windows.split(mlp("key_mlp")(taps), self.grid, cfg.stride)
        v = windows.split(mlp("value_mlp")(taps), self.grid, cfg.stride)
        attention = windows.WindowAttention(cfg.num_heads, cfg.dtype, KERNEL_INIT, name="attention")
        return VisualTokens(attention(q, k, v))


def bilinear(x: Float[Array, "B M s s C"]) -> Float[Array, "B M C"]:
    """Bilinear down-sampling without anti-aliasing, half-pixel centres, in float32: it reads only the middle of a window.

    An odd stride takes the centre patch, an even one the mean of the central 2x2 (so it is a window's mean for 2 only):

        . . .        . . . .
        . 1 .        . ¼ ¼ .
        . . .        . ¼ ¼ .
                     . . . .
    """
    stride = x.shape[-2]
    middle = slice((stride - 1) // 2, stride // 2 + 1)
    return x[:, :, middle, middle].astype(jnp.float32).mean(axis=(2, 3))
