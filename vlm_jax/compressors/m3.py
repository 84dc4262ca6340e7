"""M3, Matryoshka Multimodal Models (Cai et al. 2024, arXiv 2405.17430; mu-cai/matryoshka-mm): nested average pooling.

The projected patches are averaged over windows; one model is trained for all scales at once and shows any of them later.
A mean commutes with the projector's last linear map (not with the GELU before it), so the pooling stands in front of
that map: with 36 of 576 tokens the projector costs a fifth.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.compressors import pool
from vlm_jax.compressors.visual import VisualTokens
from vlm_jax.settings.model import CompressorConfig, valid_strides


class M3(nn.Module):
    """Differs from the release: a number of tokens that no stride gives is refused (there 100 of 576 silently becomes
    144). No parameters.
    """

    config: CompressorConfig
    grid: int

    def __call__(
        self,
        last: Float[Array, "B P C"],
        taps: Float[Array, "B P Z"],
        query: None = None,
        scores: None = None,
    ) -> VisualTokens:
        """last: what enters the projector's last map."""
        side = math.isqrt(num_tokens(self.config, self.grid))
        tokens = pool.mean(last, self.grid, self.grid // side)
        finest = math.isqrt(num_places(self.config, self.grid))
        places = centres(finest, max(finest // side, 1))  # finer than trained for: as if trained
        return VisualTokens(tokens, places=jnp.broadcast_to(places, tokens.shape[:2]))


def num_tokens(config: CompressorConfig, grid: int) -> int:
    return config.visual_tokens or grid**2


def num_places(config: CompressorConfig, grid: int) -> int:
    """Those of the finest scale trained for; a coarser token stands in the middle of its window."""
    return max(train_tokens(config, grid))


def centres(side: int, stride: int) -> Int[np.ndarray, "M"]:
    """The middle place of each stride x stride window of side x side places."""
    middle = np.arange(0, side, stride) + stride // 2
    return (middle[:, None] * side + middle).ravel().astype(np.int32)


def show(tokens: Float[Array, "B M C"], count: Int[Array, ""]) -> VisualTokens:
    """All tokens pooled to `count`, which must be the number that some stride gives (unchecked: it is not static)."""
    slots = tokens.shape[1]
    side = math.isqrt(slots)
    strides = valid_strides(side)

    def pooled(stride: int) -> tuple[Array, Array]:
        x, places = pool.mean(tokens, side, stride), jnp.asarray(centres(side, stride))
        empty = slots - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, empty), (0, 0))), jnp.pad(places, (0, empty))

    counts = jnp.array([(side // stride) ** 2 for stride in strides])
    branches = [lambda stride=stride: pooled(stride) for stride in strides]
    shown, places = jax.lax.switch(jnp.argmax(counts == count), branches)
    valid = jnp.broadcast_to(jnp.arange(slots) < count, shown.shape[:2])
    return VisualTokens(shown, valid, jnp.broadcast_to(places, shown.shape[:2]))


def train_tokens(config: CompressorConfig, grid: int) -> tuple[int, ...]:
    """The scales trained together; the paper's halve a side, then take the next prime: 24, 12, 6, 3, 1 patches."""
    if config.train_tokens:
        return config.train_tokens
    sides = [grid]
    while sides[-1] > 1:
        sides.append(sides[-1] // valid_strides(sides[-1])[1])
    return tuple(side**2 for side in sides)


def flops(config: CompressorConfig, grid: int, width: int, text_width: int) -> int:
    """Additions alone."""
    return 0
