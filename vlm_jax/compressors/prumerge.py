"""PruMerge and PruMerge+ (Shang et al. 2024, arXiv 2403.15388; 42Shawn/LLaVA-PruMerge): keep the patches that the class
token looks at, and merge into each the patches that look like it. What it computes: modules/prumerge.py."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from vlm_jax.settings.checks import ConfigError, check_choice, check_positive
from vlm_jax.settings.model import CompressorConfig, LMConfig, Reference, ViTConfig


@dataclasses.dataclass(frozen=True)
class PruMergeConfig(CompressorConfig):
    name: str = dataclasses.field(default="prumerge", init=False)
    prune_ratio: str = "adaptive"  # adaptive | batch | fixed (see modules/prumerge.py)
    fixed_ratio: float = 0.125  # of the patches, kept by "fixed"
    max_kept: int = 0  # patches kept at most by the other two; 0 = no limit
    neighbours: int = 32  # patches merged into each kept one

    flax_module = "vlm_jax.compressors.modules.prumerge.PruMerge"
    uses_scores = True
    drawn = "merged"
    reference = Reference()
    samples: ClassVar[bool] = False  # keeps every so-many-th patch too

    def __post_init__(self):
        super().__post_init__()
        check_choice("compressor", "prune_ratio", self.prune_ratio, ("adaptive", "batch", "fixed"))
        check_positive("compressor", neighbours=self.neighbours)
        if not 0 < self.fixed_ratio <= 1:
            raise ConfigError(
                f"compressor: fixed_ratio must lie in (0, 1], got {self.fixed_ratio}."
            )
        if self.max_kept < 0:
            raise ConfigError(
                f"compressor: max_kept must be 0 (no limit) or more, got {self.max_kept}."
            )

    def check(self, vit: ViTConfig, lm: LMConfig) -> None:
        if self.neighbours >= vit.num_patches:
            raise ConfigError(
                f"{self.name}: neighbours {self.neighbours} must be fewer than the {vit.num_patches} patches."
            )
        super().check(vit, lm)

    def end_of_samples(self, patches: int) -> int:
        """One more than the last patch that may be sampled."""
        return patches

    def fixed_samples(self, patches: int) -> range:
        """The patches that "fixed" samples."""
        step = math.floor(1 / self.fixed_ratio)
        return range(step // 2, self.end_of_samples(patches), step) if self.samples else range(0)

    def adaptive_needs(self, patches: int) -> list[int]:
        """Slots that surely hold what is kept of an image with 1, 2, ... P / 4 outliers (there are never more)."""
        counts = range(1, max(patches // 4, 1) + 1)
        if not self.samples:
            return list(counts)
        end = self.end_of_samples(patches)
        return [min(n + len(range(0, end, patches // n // 3)), patches) for n in counts]

    def num_kept(self, grid: int) -> int:
        """Slots for the kept patches of one image. Raises ConfigError when nothing or more than everything would be kept."""
        patches = grid**2
        if self.prune_ratio == "fixed":
            top = math.floor(patches * self.fixed_ratio)
            kept = top + len(self.fixed_samples(patches))
            if not 1 <= top <= kept <= patches:
                raise ConfigError(
                    f"{self.name}: fixed_ratio {self.fixed_ratio} keeps {kept} of {patches} patches, {top} by score; "
                    f"use one between {1 / patches:.3g} and {0.5 if self.samples else 1}."
                )
            return kept
        needed = self.adaptive_needs(patches)
        if self.max_kept and self.max_kept < needed[0]:
            raise ConfigError(
                f"{self.name}: max_kept {self.max_kept} holds no image of {patches} patches; use {needed[0]} or more."
            )
        return min(self.max_kept or patches, max(needed))

    def with_tokens(self, grid: int, visual_tokens: int) -> PruMergeConfig:
        """Keeps a fixed share of the patches. Raises ConfigError where no share gives so many."""
        patches = grid**2
        for kept in range(1, patches):
            sized = dataclasses.replace(self, prune_ratio="fixed", fixed_ratio=kept / patches)
            top = math.floor(patches * sized.fixed_ratio)
            if 0 < top + len(sized.fixed_samples(patches)) == visual_tokens - 1 and top:
                return sized
        raise ConfigError(
            f"{self.name}: no share of a {grid}x{grid} grid gives {visual_tokens} visual tokens; use another number."
        )

    def num_tokens(self, grid: int) -> int:
        """The kept patches and the extra token."""
        return self.num_kept(grid) + 1

    def num_places(self, grid: int) -> int:
        """The patches, and one for the extra token."""
        return grid**2 + 1

    def flops(self, grid: int, width: int, text_width: int) -> int:
        """With every slot filled. The encoder's part included: keys of the patches and of a class token, and the one query.

        The release forms all queries and the whole attention matrix, 2 P width (P + width) more.
        """
        patches, tokens = grid**2, self.num_tokens(grid)
        encoder = 2 * (patches + 1) * width**2 + 2 * width**2
        attention = 2 * (patches + 1) * width
        similarity = 2 * (tokens - 1) * patches * width
        return encoder + attention + similarity + 2 * tokens * patches * width


@dataclasses.dataclass(frozen=True)
class PruMergePlusConfig(PruMergeConfig):
    """PruMerge+ also keeps every so-many-th patch, whatever its score."""

    name: str = dataclasses.field(default="prumerge_plus", init=False)
    sample_last: bool = True  # may the last patch be sampled

    samples: ClassVar[bool] = True

    def end_of_samples(self, patches: int) -> int:
        return patches - (not self.sample_last)
