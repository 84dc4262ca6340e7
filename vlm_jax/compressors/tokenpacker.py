"""TokenPacker (Li et al. 2024, arXiv 2407.02392; CircleRadon/TokenPacker): coarse queries collect their window's detail.
What it computes: modules/tokenpacker.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.compressors.windowed import AttendingConfig, stored_mlp
from vlm_jax.settings.model import Reference


@dataclasses.dataclass(frozen=True)
class TokenPackerConfig(AttendingConfig):
    name: str = dataclasses.field(default="tokenpacker", init=False)

    flax_module = "vlm_jax.compressors.modules.tokenpacker.TokenPacker"
    reference = Reference(
        tensors=(
            ("bare", "q_proj_1", "query"),
            ("norm", "ln_q_1", "query_norm"),
            *stored_mlp("k_proj_1", "ln_k_1", "key_mlp"),
            *stored_mlp("v_proj_1", "ln_v_1", "value_mlp"),
            ("attention", "clip_attn", "attention/"),
        ),
        projector=("mlp.0", "mlp.2"),
        mark="q_proj_1.weight",
    )

    def num_params(self, width: int, text_width: int) -> int:
        return width**2 + 2 * width + self.attention_params(width)

    def flops(self, grid: int, width: int, text_width: int) -> int:
        tokens = self.num_tokens(grid)
        return 8 * tokens * width + 2 * tokens * width**2 + self.attention_flops(grid, width)

    def entry_flops(self, grid: int, width: int, text_width: int) -> int:
        """The map of the down-sampled feature and those of the taps."""
        query = 2 * self.num_tokens(grid) * width**2
        return query + 4 * grid**2 * self.taps_width(width) * width

    def reference_fields(self, patches: int, text_width: int) -> dict[str, Any]:
        return {"scale_factor": self.stride}

    @classmethod
    def from_reference(
        cls, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
    ) -> TokenPackerConfig:
        """Taps, the heads' width of 128 and, unless config.json has another, the stride 2 are fixed in the release."""
        heads = max(shapes["q_proj_1.weight"][0] // 128, 1)
        stride = raw.get("scale_factor") or 2
        return cls(stride=stride, num_heads=heads, taps=(12, 16, 22, 23))
