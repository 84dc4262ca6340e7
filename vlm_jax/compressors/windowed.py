"""Settings and counts that the windowed compressors share: they cut the patch grid into stride x stride windows."""

from __future__ import annotations

import dataclasses

from vlm_jax.settings.checks import ConfigError, check_positive
from vlm_jax.settings.model import CompressorConfig, LMConfig, ViTConfig, stride_for, valid_strides


@dataclasses.dataclass(frozen=True)
class WindowedConfig(CompressorConfig):
    """One visual token per window."""

    stride: int = 1  # patches along one side of a window: visual tokens = (grid / stride)^2

    sizable = True

    def __post_init__(self):
        super().__post_init__()
        check_positive("compressor", stride=self.stride)

    def check(self, vit: ViTConfig, lm: LMConfig) -> None:
        if vit.grid % self.stride:
            raise ConfigError(
                f"{self.name}: grid {vit.grid} is not divisible by stride {self.stride}; use one of {valid_strides(vit.grid)}."
            )
        super().check(vit, lm)

    def num_tokens(self, grid: int) -> int:
        return (grid // self.stride) ** 2

    def with_tokens(self, grid: int, visual_tokens: int) -> WindowedConfig:
        return dataclasses.replace(self, stride=stride_for(grid, visual_tokens))


@dataclasses.dataclass(frozen=True)
class AttendingConfig(WindowedConfig):
    """Inside each window one query attends to multi-level features: what QueCC and TokenPacker share."""

    # pyrefly: ignore[bad-override]
    num_heads: int = 8  # together as wide as the encoder
    # pyrefly: ignore[bad-override]
    taps: tuple[int, ...] = ()  # hidden states side by side as a second input; () = the feature
    norm_eps: float = 1e-6

    uses_taps = True
    drawn = "windows"

    def __post_init__(self):
        super().__post_init__()
        check_positive("compressor", num_heads=self.num_heads)

    def check(self, vit: ViTConfig, lm: LMConfig) -> None:
        check_heads(self.name, vit.width, self.num_heads)
        super().check(vit, lm)

    def attention_flops(self, grid: int, width: int) -> int:
        """Key and value MLPs over the taps; query, key, value and output maps, scores and mixing."""
        patches, tokens = grid**2, self.num_tokens(grid)
        keys_values = 2 * mlp_flops(patches, self.taps_width(width), width)
        return keys_values + 4 * tokens * width**2 + 4 * patches * width**2 + 4 * patches * width

    def attention_params(self, width: int) -> int:
        """Of the same."""
        return 2 * mlp_params(self.taps_width(width), width) + 4 * (width**2 + width)


def check_heads(name: str, width: int, num_heads: int) -> None:
    """Raises ConfigError when `num_heads` heads are not together as wide as the encoder."""
    if width % num_heads:
        raise ConfigError(
            f"{name}: encoder width {width} is not divisible by num_heads {num_heads}."
        )


def mlp_flops(patches: int, in_width: int, width: int) -> int:
    """Of a normed MLP, two maps."""
    return 2 * patches * (in_width * width + width**2)


def mlp_params(in_width: int, width: int) -> int:
    """Of the same: two maps with biases and a LayerNorm."""
    return in_width * width + width**2 + 4 * width


# The stored names of a release's attention MLPs, as `settings.model.Reference` takes them.
def stored_mlp(tensor: str, norm: str, path: str) -> tuple[tuple[str, ...], ...]:
    """A normed MLP: maps at .0 and .2 of `tensor`, and its LayerNorm."""
    return (
        ("linear", f"{tensor}.0", f"{path}/fc1"),
        ("linear", f"{tensor}.2", f"{path}/fc2"),
        ("norm", norm, f"{path}/norm"),
    )
