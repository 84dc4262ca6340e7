"""From the encoder's width to the decoder's: LLaVA-1.5's "mlp2x_gelu", applied token by token after the compressor."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from vlm_jax.layers import ACTIVATIONS, Linear, RMSNorm


class Projector(nn.Module):
    """`num_layers` linear maps C -> D -> D ... with exact GELU between; default initialisation of linear layers."""

    width: int
    num_layers: int
    norm: str  # none | rms
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B M C"]) -> Float[Array, "B M D"]:
        for i in range(self.num_layers):
            names = ("vision", "mlp") if i % 2 == 0 else ("mlp", "vision")
            x = Linear((self.width,), names, dtype=self.dtype, name=f"dense_{i}")(
                ACTIVATIONS["gelu"](x) if i else x
            )
        if self.norm == "rms":
            x = RMSNorm(1e-6, self.dtype, name="norm")(x)
        return x
