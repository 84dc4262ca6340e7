"""Question-weighted pooling at nested scales (ours): one training serves every number of visual tokens, and each token
holds what the question asks of its window. What it computes: modules/querypool.py."""

from __future__ import annotations

import dataclasses

from vlm_jax.compressors.m3 import M3Config
from vlm_jax.compressors.windowed import mlp_flops, mlp_params
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LMConfig, ViTConfig


@dataclasses.dataclass(frozen=True)
class QueryPoolConfig(M3Config):
    """Scales as M3's; a training step draws one of them."""

    name: str = dataclasses.field(default="querypool", init=False)
    # pyrefly: ignore[bad-override]
    taps: tuple[
        int, ...
    ] = ()  # hidden states side by side, which the weights look at; () = the feature
    # pyrefly: ignore[bad-override]
    query_layers: int = 0  # decoder layers that read the question; -1 = all, 0 = embeddings
    norm_eps: float = 1e-6

    flax_module = "vlm_jax.compressors.modules.querypool.QueryPool"
    uses_query = True
    uses_taps = True
    draws = True
    drawn = "windows"
    reference = None

    def check(self, vit: ViTConfig, lm: LMConfig) -> None:
        super().check(vit, lm)
        if vit.width % 4:
            raise ConfigError(
                f"{self.name}: its sine positions need an encoder width that 4 divides, got {vit.width}."
            )

    def num_params(self, width: int, text_width: int) -> int:
        return text_width * width + 3 * width + mlp_params(self.taps_width(width), width)

    def flops(self, grid: int, width: int, text_width: int) -> int:
        """Keys, the question's map, their products, and the weighted sum of what enters the projector's last map."""
        patches = grid**2
        keys = mlp_flops(patches, self.taps_width(width), width)
        return 2 * text_width * width + keys + 2 * patches * width + 2 * patches * text_width

    def entry_flops(self, grid: int, width: int, text_width: int) -> int:
        """The question's map and the keys' first."""
        return 2 * text_width * width + 2 * grid**2 * self.taps_width(width) * width
