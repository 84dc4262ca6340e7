"""From the encoder's width to the decoder's: LLaVA-1.5's "mlp2x_gelu", applied token by token."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vlm_jax.layers import ACTIVATIONS, Linear, RMSNorm, weight


class Projector(nn.Module):
    """`num_layers` linear maps C -> D -> D ... with exact GELU between; default initialisation of linear layers.

    Three parts in a row, because compressors may stand between them: `early`, `late`, `finish`. 0 layers: no maps.
    positions "grid": a learned vector per place (`num_places` of them) is added last, for decoders that start without
    knowing images.
    """

    width: int
    num_layers: int
    norm: str  # none | rms
    positions: str  # none | grid
    dtype: str
    num_places: int = 0  # rows of the positions; see compressors/__init__.py

    def setup(self):
        axes = (("vision", "mlp"), ("mlp", "vision"))
        self.dense = [
            Linear((self.width,), axes[i % 2], dtype=self.dtype) for i in range(self.num_layers)
        ]
        self.final_norm = RMSNorm(1e-6, self.dtype, name="norm") if self.norm == "rms" else None

    def __call__(self, x: Float[Array, "B M C"]) -> Float[Array, "B M D"]:
        return self.finish(self.late(self.early(x)))

    def early(self, x: Float[Array, "B M C"]) -> Float[Array, "B M _"]:
        """What enters the last linear map."""
        for linear in self.dense[:-1]:
            x = ACTIVATIONS["gelu"](linear(x))
        return x

    def late(self, x: Float[Array, "B M _"]) -> Float[Array, "B M D"]:
        """The last linear map, with which a mean over tokens commutes."""
        for linear in self.dense[-1:]:
            x = linear(x)
        return x

    @nn.compact
    def finish(
        self, x: Float[Array, "B M D"], places: Int[Array, "B M"] | None = None
    ) -> Float[Array, "B M D"]:
        """Norm and positions. places: where each token stands; None: the i-th at place i."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.positions == "grid":
            table = weight(
                self, "position", _grid_codes, (self.num_places, self.width), (None, None)
            )
            table = table.astype(x.dtype)
            x = x + (table[: x.shape[1]] if places is None else table[places])
        return x


def _grid_codes(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Random codes [places, D] of a square grid (zeros for what is left of it): per axis the sum of one code per half, per quarter, ... down to the row.

    Codes of different places are nearly orthogonal, so a decoder can tell neighbours apart at once, and blocks share a part.
    """
    side = math.isqrt(shape[0])
    place, axes = jnp.arange(side), []
    for axis_key in jax.random.split(key):
        code = jnp.zeros((side, shape[1]))
        size, count = side, 0
        while size > 1:
            size, count = (size + 1) // 2, count + 1
            code += jax.random.normal(jax.random.fold_in(axis_key, size), (side, shape[1]))[
                place // size
            ]
        axes.append(code / math.sqrt(2 * max(count, 1)))
    codes = (axes[0][:, None] + axes[1][None]).reshape(side**2, shape[1])
    return jnp.pad(codes, ((0, shape[0] - side**2), (0, 0)))
