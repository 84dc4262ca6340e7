"""Average pooling: each visual token is the mean of its stride x stride window. The baseline without parameters."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from vlm_jax.compressors.modules import windows
from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.compressors.windowed import WindowedConfig


class Pool(nn.Module):
    config: WindowedConfig
    grid: int

    def __call__(
        self,
        last: Float[Array, "B P C"],
        taps: Float[Array, "B P Z"],
        query: None = None,
        scores: None = None,
    ) -> VisualTokens:
        return VisualTokens(mean(last, self.grid, self.config.stride))


def mean(x: Float[Array, "B P C"], grid: int, stride: int) -> Float[Array, "B M C"]:
    """The mean of each window; jax adds half-precision numbers up in float32."""
    return windows.split(x, grid, stride).mean(axis=(2, 3))
