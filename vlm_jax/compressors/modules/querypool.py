"""Question-weighted pooling at nested scales (ours): M3's windows, but a patch counts as much as the question asks for it.

    taps + sine positions -> MLP -> LN -> k [B P C] --+
    question -> linear -> LN -> q [B C]             --+-> q k / sqrt(C) -> weights [B P] -> softmax inside each window
    what enters the projector's last map [B P D] --------------------------------------------> weighted sum [B M D]

No parameter depends on the number of windows. A softmax over a large window is that of the small windows' log-sum-exps, so
tokens pooled from finer tokens equal those pooled from patches, and a weighted sum commutes with the projector's last map.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.modules import m3, windows
from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.compressors.querypool import QueryPoolConfig
from vlm_jax.layers import LayerNorm, Linear, sincos_positions


class QueryPool(nn.Module):
    """One model for every number of tokens, which looks at the question."""

    config: QueryPoolConfig
    grid: int

    @nn.compact
    def __call__(
        self,
        last: Float[Array, "B P D"],
        taps: Float[Array, "B P Z"],
        query: Float[Array, "B T"],
        scores: None = None,
    ) -> VisualTokens:
        """last: what enters the projector's last map. query: the decoder's state of the question (see `VLM.query`)."""
        cfg = self.config
        places = sincos_positions(self.grid, taps.shape[-1])
        width = taps.shape[-1] // max(1, len(cfg.taps))
        k = windows.NormedMLP(width, cfg.norm_eps, cfg.dtype, name="key_mlp")(taps + places)
        q = Linear((width,), ("embed", "vision"), dtype=cfg.dtype, name="text")(query)
        q = LayerNorm(cfg.norm_eps, cfg.dtype, name="text_norm")(q)
        logits = jnp.einsum("bc,bpc->bp", q, k, preferred_element_type=jnp.float32)
        logits /= math.sqrt(width)
        side = math.isqrt(cfg.num_tokens(self.grid))
        tokens, logits = WeightedPool(self.grid // side, name="attention")(last, logits)
        finest = math.isqrt(cfg.num_places(self.grid))
        centres = m3.centres(finest, max(finest // side, 1))
        return VisualTokens(
            tokens, places=jnp.broadcast_to(centres, tokens.shape[:2]), logits=logits
        )

    @staticmethod
    def show(visual: VisualTokens, count: Int[Array, ""]) -> VisualTokens:
        """All tokens pooled to `count`, which must be the number that some stride gives (unchecked: it is not static)."""

        def pooled(x: Array, stride: int) -> Array:
            return WeightedPool(stride, parent=None).apply({}, x, visual.logits)[0]

        return m3.at_scale(visual.tokens, count, pooled)


class WeightedPool(nn.Module):
    """The tokens of each stride x stride window, and the window's log-sum-exp: its log-weight when pooled further.

    Sows each patch's share of its window's token [B M 1 stride stride] as intermediates/weights.
    """

    stride: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B P D"], logits: Float[Array, "B P"]
    ) -> tuple[Float[Array, "B M D"], Float[Array, "B M"]]:
        grid = math.isqrt(x.shape[1])
        inside = windows.split(logits[..., None], grid, self.stride)[..., 0]
        shares = jax.nn.softmax(inside, axis=(-2, -1))
        self.sow("intermediates", "weights", shares[:, :, None])
        split = windows.split(x, grid, self.stride)
        tokens = jnp.einsum("bmyx,bmyxd->bmd", shares, split, preferred_element_type=jnp.float32)
        return tokens.astype(x.dtype), jax.nn.logsumexp(inside, axis=(-2, -1))
