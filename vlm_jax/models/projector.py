"""From the encoder's width to the decoder's: LLaVA-1.5's "mlp2x_gelu", applied token by token."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vlm_jax.layers import ACTIVATIONS, Linear, RMSNorm, weight


class Projector(nn.Module):
    """`num_layers` linear maps C -> D -> D ... with exact GELU in between, initialised as PyTorch's linear layers.

    It is called in three parts, because a compressor may run between them: `early`, `late`, `finish`. With 0 layers only
    `finish` does anything. positions "grid" adds a learned vector for each of `num_places` places at the end, for decoders
    that have never been trained on images.
    """

    width: int
    num_layers: int
    norm: str  # none | rms
    positions: str  # none | grid
    dtype: str
    num_places: int = 0  # rows of the table of positions; see compressors/__init__.py

    def setup(self):
        axes = (("vision", "mlp"), ("mlp", "vision"))
        self.dense = [
            Linear((self.width,), axes[i % 2], dtype=self.dtype) for i in range(self.num_layers)
        ]
        self.final_norm = RMSNorm(1e-6, self.dtype, name="norm") if self.norm == "rms" else None

    def __call__(self, x: Float[Array, "B M C"]) -> Float[Array, "B M D"]:
        return self.finish(self.late(self.early(x)))

    def early(self, x: Float[Array, "B M C"]) -> Float[Array, "B M _"]:
        """All linear maps but the last, each followed by GELU."""
        for linear in self.dense[:-1]:
            x = ACTIVATIONS["gelu"](linear(x))
        return x

    def late(self, x: Float[Array, "B M _"]) -> Float[Array, "B M D"]:
        """The last linear map. It commutes with a mean over tokens."""
        for linear in self.dense[-1:]:
            x = linear(x)
        return x

    @nn.compact
    def finish(
        self, x: Float[Array, "B M D"], places: Int[Array, "B M"] | None = None
    ) -> Float[Array, "B M D"]:
        """Norm and positions. places: the row of the position table for each token; None: row i for token i."""
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
    """Random codes [places, D] for the places of a square grid, zeros for the remaining places.

    Along each axis a place's code is the sum of one random vector per half, quarter, ... and row that contains it. Codes of
    different places are nearly orthogonal, so that a decoder distinguishes neighbours from the start, and nearby places share
    a part of their codes.
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
