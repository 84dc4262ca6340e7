"""QueCC: query-based convolutional cross-attention (Li et al. 2024, "Inference Optimal VLMs Need Fewer Visual Tokens and
More Parameters", section 4; locuslab/llava-token-compression).

The question's state is added to every patch, a depth-wise convolution down-samples the result to one query per window,
and each query attends to its own window of multi-level features.

    last + text -> MLP -> LN -> conv (kernel = stride) -> q [B M C]  --+
    taps        -> MLP -> LN -> windows                -> k, v       --+-> attention -> [B M C]

With `positions` "sines" (ours), last and the keys' taps begin with 2-D sine codes of their places. A deep encoder's features
hold little of where a patch lies, so that without the codes a query can hardly ask for a place ("read c5").
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.compressors.modules import windows
from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.compressors.quecc import QueCCConfig
from vlm_jax.layers import LayerNorm, Linear, sincos_positions, uniform_fan_in, weight


class QueCC(nn.Module):
    """Differs from the release: width of the taps, heads and grid are free (there 4096, 8 and 24), and kernel = stride
    always, because with kernel != stride the convolution's windows and the keys' windows disagree.
    """

    config: QueCCConfig
    grid: int

    @nn.compact
    def __call__(
        self,
        last: Float[Array, "B P C"],
        taps: Float[Array, "B P Z"],
        query: Float[Array, "B D"],
        scores: None = None,
    ) -> VisualTokens:
        """query: the decoder's final-norm state at the last token of the question (see `VLM.query`)."""
        cfg, width = self.config, last.shape[-1]
        keyed = taps
        if cfg.positions == "sines":
            last, keyed = (x + sincos_positions(self.grid, x.shape[-1]) for x in (last, taps))

        def mlp(name: str) -> windows.NormedMLP:
            return windows.NormedMLP(width, cfg.norm_eps, cfg.dtype, name=name)

        text = Linear((width,), ("embed", "vision"), dtype=cfg.dtype, name="text")(query)
        text = LayerNorm(cfg.norm_eps, cfg.dtype, name="text_norm")(text)
        asked = mlp("query_mlp")(last.astype(cfg.dtype) + text[:, None])
        q = DepthwiseConv(cfg.stride, cfg.dtype, name="downsample")(
            windows.split(asked, self.grid, cfg.stride)
        )
        k = windows.split(mlp("key_mlp")(keyed), self.grid, cfg.stride)
        v = windows.split(mlp("value_mlp")(taps), self.grid, cfg.stride)
        attention = windows.WindowAttention(cfg.num_heads, cfg.dtype, name="attention")
        return VisualTokens(attention(q, k, v))


class DepthwiseConv(nn.Module):
    """Convolution per channel whose kernel equals its stride: each window is summed with one weight per patch."""

    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B M s s C"]) -> Float[Array, "B M C"]:
        side, width = self.stride, x.shape[-1]
        init = uniform_fan_in(side**2)
        kernel = weight(self, "filter", init, (side, side, width), (None, None, "vision"))
        bias = weight(self, "bias", init, (width,), ("vision",))
        y = jnp.einsum(
            "bmyxc,yxc->bmc", x, kernel.astype(self.dtype), preferred_element_type=jnp.float32
        )
        return (y + bias).astype(self.dtype)
