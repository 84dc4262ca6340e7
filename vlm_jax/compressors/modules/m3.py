"""M3, Matryoshka Multimodal Models (Cai et al. 2024, arXiv 2405.17430; mu-cai/matryoshka-mm): nested average pooling.

The projected patches are averaged over windows; one model is trained for all scales at once and shows any of them later.
A mean commutes with the projector's last linear map (not with the GELU before it), so the pooling stands in front of
that map: with 36 of 576 tokens the projector costs a fifth.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.m3 import M3Config
from vlm_jax.compressors.modules import pool
from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.settings.model import valid_strides


class M3(nn.Module):
    """Differs from the release: a number of tokens that no stride gives is refused (there 100 of 576 silently becomes
    144). No parameters.
    """

    config: M3Config
    grid: int

    def __call__(
        self,
        last: Float[Array, "B P C"],
        taps: Float[Array, "B P Z"],
        query: None = None,
        scores: None = None,
    ) -> VisualTokens:
        """last: what enters the projector's last map."""
        side = math.isqrt(self.config.num_tokens(self.grid))
        tokens = pool.mean(last, self.grid, self.grid // side)
        finest = math.isqrt(self.config.num_places(self.grid))
        places = centres(finest, max(finest // side, 1))  # finer than trained for: as if trained
        return VisualTokens(tokens, places=jnp.broadcast_to(places, tokens.shape[:2]))

    @staticmethod
    def show(visual: VisualTokens, count: Int[Array, ""]) -> VisualTokens:
        """All tokens pooled to `count`, which must be the number that some stride gives (unchecked: it is not static)."""
        side = math.isqrt(visual.tokens.shape[1])
        return at_scale(visual.tokens, count, lambda x, stride: pool.mean(x, side, stride))


def at_scale(
    tokens: Float[Array, "B M C"], count: Int[Array, ""], pooled: Callable[[Array, int], Array]
) -> VisualTokens:
    """M slots, of which the first `count` hold the tokens of the stride that gives so many.

    pooled: (tokens, stride) -> the tokens of that stride's windows.
    """
    slots = tokens.shape[1]
    side = math.isqrt(slots)
    strides = valid_strides(side)

    def shown(stride: int) -> tuple[Array, Array]:
        x, places = pooled(tokens, stride), jnp.asarray(centres(side, stride))
        empty = slots - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, empty), (0, 0))), jnp.pad(places, (0, empty))

    counts = jnp.array([(side // stride) ** 2 for stride in strides])
    branches = [lambda stride=stride: shown(stride) for stride in strides]
    x, places = jax.lax.switch(jnp.argmax(counts == count), branches)
    valid = jnp.broadcast_to(jnp.arange(slots) < count, x.shape[:2])
    return VisualTokens(x, valid, jnp.broadcast_to(places, x.shape[:2]))


def centres(side: int, stride: int) -> Int[np.ndarray, "M"]:
    """The middle place of each stride x stride window of side x side places."""
    middle = np.arange(0, side, stride) + stride // 2
    return (middle[:, None] * side + middle).ravel().astype(np.int32)
