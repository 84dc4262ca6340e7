"""No compression: every patch becomes a visual token (the LLaVA-1.5 baseline once the projector follows)."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.settings.model import CompressorConfig


class Identity(nn.Module):
    """Hands the feature layer on; has no parameters."""

    config: CompressorConfig
    grid: int

    def __call__(
        self,
        last: Float[Array, "B P C"],
        taps: Float[Array, "B P Z"],
        query: None = None,
        scores: None = None,
    ) -> VisualTokens:
        return VisualTokens(last)
