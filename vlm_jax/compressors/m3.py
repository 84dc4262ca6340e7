"""M3, Matryoshka Multimodal Models (Cai et al. 2024, arXiv 2405.17430; mu-cai/matryoshka-mm): nested average pooling.
What it computes: modules/m3.py."""

from __future__ import annotations

import dataclasses
import math

from vlm_jax.settings.model import (
    CompressorConfig,
    LMConfig,
    Reference,
    ViTConfig,
    stride_for,
    valid_strides,
)


@dataclasses.dataclass(frozen=True)
class M3Config(CompressorConfig):
    """Its FLOPs are additions alone, counted as 0."""

    name: str = dataclasses.field(default="m3", init=False)
    visual_tokens: int = 0  # shown at inference; 0 = all patches
    train_tokens: tuple[int, ...] = ()  # the numbers trained for; () = the paper's

    flax_module = "vlm_jax.compressors.modules.m3.M3"
    place = "inside"
    elastic = True
    sizable = True
    reference = Reference()

    def check(self, vit: ViTConfig, lm: LMConfig) -> None:
        self.check_counts(vit.grid)
        super().check(vit, lm)

    def check_counts(self, grid: int) -> None:
        """Raises ConfigError for a number of visual tokens that it cannot give."""
        largest = math.isqrt(max(self.train_tokens, default=grid**2))
        for count in filter(None, (self.visual_tokens, *self.train_tokens)):
            stride_for(grid, count)
        for count in self.train_tokens:
            stride_for(largest, count)  # training pools the others from the largest

    def num_tokens(self, grid: int) -> int:
        return self.visual_tokens or grid**2

    def num_places(self, grid: int) -> int:
        """Those of the finest scale trained for; a coarser token stands in the middle of its window."""
        return max(self.counts(grid))

    def with_tokens(self, grid: int, visual_tokens: int) -> M3Config:
        sized = dataclasses.replace(self, visual_tokens=visual_tokens)
        sized.check_counts(grid)
        return sized

    def counts(self, grid: int) -> tuple[int, ...]:
        """The scales trained together; the paper's halve a side, then take the next prime: 24, 12, 6, 3, 1 patches."""
        if self.train_tokens:
            return self.train_tokens
        sides = [grid]
        while sides[-1] > 1:
            sides.append(sides[-1] // valid_strides(sides[-1])[1])
        return tuple(side**2 for side in sides)
