"""MQT, Matryoshka Query Transformer (Hu et al. 2024, arXiv 2405.19315; gordonhu608/MQT-LLaVA): learned queries, of which
the first m are shown. What it computes: modules/mqt.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.compressors.windowed import check_heads
from vlm_jax.settings.checks import ConfigError, check_choice, check_positive
from vlm_jax.settings.model import CompressorConfig, LMConfig, Reference, ViTConfig


@dataclasses.dataclass(frozen=True)
class MQTConfig(CompressorConfig):
    name: str = dataclasses.field(default="mqt", init=False)
    # pyrefly: ignore[bad-override]
    num_heads: int = 8  # together as wide as the encoder; the paper's: 16
    norm_eps: float = 1e-6
    visual_tokens: int = 0  # shown at inference; 0 = all queries
    train_tokens: tuple[int, ...] = ()  # the numbers trained for; () = the paper's
    query_grid: int = 16  # queries along one side
    key_source: str = "positions"  # positions | image (positions added)

    flax_module = "vlm_jax.compressors.modules.mqt.MQT"
    place = "instead"
    elastic = True
    draws = True
    sizable = True
    drawn = "queries"
    # It has no projector, and its position table is computed.
    reference = Reference(
        tensors=(
            ("attention", "attn", ""),
            ("norm", "ln_q", "q_norm"),
            ("norm", "ln_k", "k_norm"),
            ("norm", "ln_v", "v_norm"),
            ("array", "query", "query"),
            ("array", "proj", "project/kernel"),
        ),
        projector=(),
        module="query_abstractor",
        mark="ln_q.weight",
    )

    def __post_init__(self):
        super().__post_init__()
        check_choice("compressor", "key_source", self.key_source, ("positions", "image"))
        check_positive("compressor", num_heads=self.num_heads, query_grid=self.query_grid)

    def check(self, vit: ViTConfig, lm: LMConfig) -> None:
        check_heads(self.name, vit.width, self.num_heads)
        self.check_counts()
        super().check(vit, lm)

    def check_counts(self) -> None:
        """Raises ConfigError for a number of visual tokens that it cannot give."""
        counts, side = (self.visual_tokens, *self.train_tokens), self.query_grid
        if not all(0 <= count <= side**2 for count in counts):
            raise ConfigError(
                f"mqt: {side} x {side} queries give 1 to {side**2} visual tokens, not {max(counts)}."
            )

    def num_tokens(self, grid: int) -> int:
        return self.visual_tokens or self.query_grid**2

    def num_places(self, grid: int) -> int:
        """One per query, shown or not."""
        return self.query_grid**2

    def with_tokens(self, grid: int, visual_tokens: int) -> MQTConfig:
        sized = dataclasses.replace(self, visual_tokens=visual_tokens)
        sized.check_counts()
        return sized

    def counts(self, grid: int) -> tuple[int, ...]:
        """Each step draws one of them; the paper's second stage draws from 2, 4, .. 256 (its first: all, always)."""
        return self.train_tokens or tuple(range(2, self.query_grid**2 + 1, 2))

    def num_params(self, width: int, text_width: int) -> int:
        norms, maps = 6 * width, 4 * (width**2 + width)
        return self.query_grid**2 * width + norms + maps + width * text_width

    def flops(self, grid: int, width: int, text_width: int) -> int:
        """With the projection to the decoder's width."""
        patches, tokens = grid**2, self.num_tokens(grid)
        mixed = 2 * patches * width**2 + 2 * tokens * patches * width
        projected = 2 * tokens * (width**2 + width * text_width)
        return mixed + projected + self.weights_flops(grid, width)

    def weights_flops(self, grid: int, width: int) -> int:
        """The part of `flops` up to the attention weights, spent once per batch when keys hold positions alone."""
        patches, tokens = grid**2, self.num_tokens(grid)
        return 2 * (tokens + patches) * width**2 + 2 * tokens * patches * width

    def reference_fields(self, patches: int, text_width: int) -> dict[str, Any]:
        return {
            "query_abstractor_type": "matry_query",
            "num_visual_tokens": self.visual_tokens or self.query_grid**2,
        }

    @classmethod
    def from_reference(
        cls, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
    ) -> MQTConfig:
        """The heads' width of 64 is fixed in the release."""
        queries, width = shapes["query"]
        return cls(num_heads=max(width // 64, 1), query_grid=math.isqrt(queries))
