"""From the encoder's width to the decoder's: LLaVA-1.5's "mlp2x_gelu", applied token by token after the compressor."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlm_jax.layers import ACTIVATIONS, Linear, RMSNorm, sincos_positions, weight


class Projector(nn.Module):
    """`num_layers` linear maps C -> D -> D ... with exact GELU between; default initialisation of linear layers.

    positions "grid": a learned vector per visual token is added last, for decoders that start without knowing images.
    """

    width: int
    num_layers: int
    norm: str  # none | rms
    positions: str  # none | grid
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
        if self.positions == "grid":
            table = weight(self, "position", _sines, (x.shape[1], self.width), (None, None))
            x = x + table.astype(x.dtype)
        return x


def _sines(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """2-D sines of a square grid of visual tokens, row by row: where learning starts from."""
    return jnp.asarray(sincos_positions(math.isqrt(shape[0]), shape[1]))
