"""A compressor that is not registered, in the one file that a compressor takes: the window's mean times a learned scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from vlm_jax.compressors.modules import pool
from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.compressors.windowed import WindowedConfig
from vlm_jax.layers import weight
from vlm_jax.settings.model import Reference


@dataclasses.dataclass(frozen=True)
class ScaledConfig(WindowedConfig):
    name: str = dataclasses.field(default="scaled", init=False)
    gain: float = 1.0  # of the scale, when it is made

    flax_module = "toy_compressor.Scaled"
    reference = Reference(tensors=(("array", "gain", "scale"),), mark="gain")

    def num_params(self, width: int, text_width: int) -> int:
        return width

    def reference_fields(self, patches: int, text_width: int) -> dict[str, Any]:
        return {"scale_factor": self.stride}

    @classmethod
    def from_reference(
        cls, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
    ) -> ScaledConfig:
        return cls(stride=raw["scale_factor"])


class Scaled(nn.Module):
    config: ScaledConfig
    grid: int

    @nn.compact
    def __call__(
        self,
        last: Float[Array, "B P C"],
        taps: Float[Array, "B P Z"],
        query: None = None,
        scores: None = None,
    ) -> VisualTokens:
        init = nn.initializers.constant(self.config.gain)
        scale = weight(self, "scale", init, (last.shape[-1],), ("vision",))
        mean = pool.mean(last, self.grid, self.config.stride)
        return VisualTokens(mean * scale.astype(mean.dtype))
