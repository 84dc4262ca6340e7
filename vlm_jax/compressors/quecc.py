"""QueCC: query-based convolutional cross-attention (Li et al. 2024, "Inference Optimal VLMs Need Fewer Visual Tokens and
More Parameters", section 4; locuslab/llava-token-compression). What it computes: modules/quecc.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.compressors.windowed import AttendingConfig, mlp_flops, mlp_params, stored_mlp
from vlm_jax.settings.checks import ConfigError, check_choice
from vlm_jax.settings.model import LMConfig, Reference, ViTConfig


@dataclasses.dataclass(frozen=True)
class QueCCConfig(AttendingConfig):
    name: str = dataclasses.field(default="quecc", init=False)
    # pyrefly: ignore[bad-override]
    query_layers: int = -1  # decoder layers that read the question; -1 = all, 0 = embeddings
    positions: str = "none"  # none (as released) | sines: added to what queries and keys read

    flax_module = "vlm_jax.compressors.modules.quecc.QueCC"
    uses_query = True
    # Index 0 of the release's sequence; its projector is at 1 and 3.
    reference = Reference(
        tensors=(
            ("linear", "0.text_projection.0", "text"),
            ("norm", "0.text_projection.1", "text_norm"),
            *stored_mlp("0.q_proj", "0.q_proj.3", "query_mlp"),
            *stored_mlp("0.k_proj", "0.k_proj.3", "key_mlp"),
            *stored_mlp("0.v_proj", "0.v_proj.3", "value_mlp"),
            ("array", "0.q_downsample.weight", "downsample/filter", "c 1 y x -> y x c"),
            ("array", "0.q_downsample.bias", "downsample/bias"),
            ("attention", "0.clip_attn", "attention/"),
        ),
        projector=("1", "3"),
        mark="0.q_downsample.weight",
    )

    def __post_init__(self):
        super().__post_init__()
        check_choice("compressor", "positions", self.positions, ("none", "sines"))

    def check(self, vit: ViTConfig, lm: LMConfig) -> None:
        super().check(vit, lm)
        if self.positions == "sines" and vit.width % 4:
            raise ConfigError(
                f"{self.name}: positions 'sines' need an encoder width that 4 divides, got {vit.width}; use 'none'."
            )

    def num_params(self, width: int, text_width: int) -> int:
        text = text_width * width + 3 * width
        downsample = self.stride**2 * width + width
        return text + mlp_params(width, width) + downsample + self.attention_params(width)

    def flops(self, grid: int, width: int, text_width: int) -> int:
        patches, tokens = grid**2, self.num_tokens(grid)
        text = 2 * text_width * width
        query = mlp_flops(patches, width, width) + 2 * tokens * self.stride**2 * width
        return text + query + self.attention_flops(grid, width)

    def entry_flops(self, grid: int, width: int, text_width: int) -> int:
        """The maps of the question's state and of the taps (the features' own path carries the question's gradient)."""
        return 2 * text_width * width + 4 * grid**2 * self.taps_width(width) * width

    def reference_fields(self, patches: int, text_width: int) -> dict[str, Any]:
        if self.positions != "none":
            raise ConfigError(
                f"export: QueCC's release has no positions, this model {self.positions!r}; export the parts: --what=lm and "
                "--what=vit."
            )
        return {
            "mm_vision_token_compression_type": "quecc", "mm_vision_output_token_count": patches,
            "mm_vision_output_text_embedding_size": text_width, "mm_vision_token_compression_kernel_size": self.stride,
            "mm_vision_token_compression_stride": self.stride,
        }  # fmt: skip

    @classmethod
    def from_reference(
        cls, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
    ) -> QueCCConfig:
        """Taps and heads are fixed in the release."""
        kernel = shapes["0.q_downsample.weight"][-1]
        stride = raw.get("mm_vision_token_compression_stride") or kernel
        if kernel != stride:
            raise ConfigError(
                f"{where}: quecc: kernel {kernel} differs from stride {stride}; only kernel = stride is computed here."
            )
        return cls(stride=stride, num_heads=8, taps=(12, 16, 22, 23))
