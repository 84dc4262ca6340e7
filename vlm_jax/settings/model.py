"""Frozen, validated settings: what each module is given, and nothing more. Imports no jax.

`configs/default.py` lists every field once with its unit and source. A wrong value is a `ConfigError` with one line.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from vlm_jax.settings.checks import ConfigError, check_choice, check_positive

DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "dots", "full", "offload")
ATTENTION = ("auto", "xla", "cudnn", "splash")
RESAMPLE = ("bicubic", "bilinear")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A SigLIP or CLIP image encoder; hidden states are numbered 0 (embeddings) .. num_layers."""

    image_px: int
    patch_px: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str  # gelu_tanh (SigLIP) | gelu | quick_gelu (CLIP)
    norm_eps: float
    cls_token: bool  # CLIP: a class token in row 0, dropped from the features
    pre_norm: bool  # CLIP: LayerNorm after the embeddings
    post_norm: bool  # SigLIP: LayerNorm after the last layer (applies when feature_layer is -1)
    patch_bias: bool  # SigLIP: the patch projection has a bias
    feature_layer: int  # the feature's hidden state, from the end: -1 last, -2 last but one
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    position_grid: int = 0  # side of the learned position table when it is interpolated; 0 = grid
    resample: str = "bicubic"  # filter that resizes an image to image_px: bicubic | bilinear
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    sharded: bool = False  # True: weights are sharded as the decoder's are; False: replicated

    def __post_init__(self):
        check_choice("vit", "activation", self.activation, ("gelu_tanh", "gelu", "quick_gelu"))
        check_choice("vit", "resample", self.resample, RESAMPLE)
        check_choice("vit", "dtype", self.dtype, DTYPES)
        check_choice("vit", "param_dtype", self.param_dtype, DTYPES)
        check_choice("vit", "remat", self.remat, REMAT)
        check_positive(
            "vit", image_px=self.image_px, patch_px=self.patch_px, num_layers=self.num_layers
        )
        if self.image_px < self.patch_px:
            raise ConfigError(
                f"vit: image_px {self.image_px} is smaller than patch_px {self.patch_px}."
            )
        if self.width % self.num_heads:
            raise ConfigError(
                f"vit: width {self.width} is not divisible by num_heads {self.num_heads}."
            )
        if self.width % 4:
            raise ConfigError(
                f"vit: width {self.width} is not divisible by 4 (2-D sine positions)."
            )
        if not -self.num_layers <= self.feature_layer <= -1:
            raise ConfigError(
                f"vit: feature_layer {self.feature_layer} must lie in [-{self.num_layers}, -1]."
            )

    @property
    def weight_axis(self) -> str:
        """The logical axis of the width in its weights: replicated, or split as the decoder's."""
        return "embed" if self.sharded else "vision"

    @property
    def grid(self) -> int:
        """Patches along one side (a border narrower than a patch is left out, as in SigLIP-384/14)."""
        return self.image_px // self.patch_px

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def feature_state(self) -> int:
        """The number of the hidden state used as the feature: -2 of 24 layers is state 23."""
        return self.num_layers + 1 + self.feature_layer


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are scaled for longer contexts: none | linear | llama3 (field names as in Hugging Face)."""

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        check_choice("rope_scaling", "kind", self.kind, ("none", "linear", "llama3"))
        check_positive("rope_scaling", factor=self.factor)


class Adapter(NamedTuple):
    """A low-rank addition to one linear map: y = x W + scale (x A) B (LoRA, arXiv 2106.09685)."""

    rank: int
    scale: float


LORA = ("lora_a", "lora_b")  # an adapter's parameters A and B, beside its map's `kernel`
# The decoder's linear maps that may have adapters, as paths below "lm/".
LM_LINEARS = tuple(
    f"layers/{name}"
    for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
)


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A decoder-only language model: Llama/Vicuna, Mistral, Qwen1.5/2/2.5, Qwen3, Phi-3."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool  # Qwen1.5/2/2.5
    qk_norm: bool  # Qwen3: RMSNorm over each query and key head
    tied_embeddings: bool
    rope_scaling: RopeScaling = RopeScaling()
    o_bias: bool = False  # with qkv_bias: `attention_bias` of Llama and Qwen3
    mlp_bias: bool = False  # of gate, up and down: Llama's
    sliding_window: int = (
        0  # the number of last keys that a query attends to, its own included (Mistral); 0 = all
    )
    nominal_params: float = 0.0  # the size in the model's name, in parameters; 0 = count them
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"  # the training kernel; auto: by platform (see step.attention_kernel)
    lora_rank: int = 0  # of the adapters; 0 = none
    lora_alpha: float = 16.0  # an adapter's output is scaled by lora_alpha / lora_rank
    lora_targets: str = "."  # regex searched in LM_LINEARS: which maps have adapters

    def __post_init__(self):
        check_choice("lm", "attention", self.attention, ATTENTION)
        check_choice("lm", "dtype", self.dtype, DTYPES)
        check_choice("lm", "param_dtype", self.param_dtype, DTYPES)
        check_choice("lm", "remat", self.remat, REMAT)
        check_positive(
            "lm", vocab_size=self.vocab_size, width=self.width, num_layers=self.num_layers,
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, mlp_width=self.mlp_width,
        )  # fmt: skip
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"lm: num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}."
            )
        if self.sliding_window < 0:
            raise ConfigError(
                f"lm: sliding_window must be 0 (no window) or more, got {self.sliding_window}."
            )
        if self.head_dim % 2:
            raise ConfigError(f"lm: head_dim {self.head_dim} must be even (rotary pairs).")
        self._check_adapters()

    def _check_adapters(self) -> None:
        check_positive("lm", lora_alpha=self.lora_alpha)
        if self.lora_rank < 0:
            raise ConfigError(
                f"lm: lora_rank must be 0 (no adapters) or more, got {self.lora_rank}."
            )
        try:
            found = any(re.search(self.lora_targets, path) for path in LM_LINEARS)
        except re.error as error:
            raise ConfigError(
                f"lm: lora_targets {self.lora_targets!r} is not a regular expression: {error}."
            ) from error
        if not found:
            raise ConfigError(
                f"lm: lora_targets {self.lora_targets!r} matches none of {', '.join(LM_LINEARS)}."
            )

    def adapter(self, path: str) -> Adapter | None:
        """The adapter of a linear map, by its path as in LM_LINEARS; None if it has none."""
        if not self.lora_rank or not re.search(self.lora_targets, path):
            return None
        return Adapter(self.lora_rank, self.lora_alpha / self.lora_rank)

    @property
    def non_embedding_params(self) -> int:
        """Parameters of the layers and the final norm, without embedding table and head (and without adapters)."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * self.width * q + 2 * self.width * kv
        attention += (q + 2 * kv) * self.qkv_bias + self.width * self.o_bias
        attention += 2 * self.head_dim * self.qk_norm
        mlp = 3 * self.width * self.mlp_width
        mlp += (2 * self.mlp_width + self.width) * self.mlp_bias
        layer = attention + mlp + 2 * self.width
        return self.num_layers * layer + self.width

    @property
    def total_params(self) -> int:
        tables = 1 if self.tied_embeddings else 2
        return self.non_embedding_params + tables * self.vocab_size * self.width


class Reference(NamedTuple):
    """How a compressor's release stores it, beside the projector, in one module of the original LLaVA layout.

    tensors: (kind, stored name, our path, more if any), with a kind of `hf.maps.KINDS`.
    projector: the stored names of the projector's maps; None: LLaVA's own, by the number of maps.
    module: what the module is called. mark: a tensor that no other compressor has; "": it has no parameters.
    """

    tensors: tuple[tuple[str, ...], ...] = ()
    projector: tuple[str, ...] | None = None
    module: str = "mm_projector"
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """The settings of a compressor and all that is known of it without running it; see `compressors/__init__.py`."""

    name: str = dataclasses.field(default="", init=False)  # a key of compressors.COMPRESSORS
    dtype: str = "float32"  # of the computation

    flax_module: ClassVar[str]  # the dotted path of its flax module, which loads jax
    place: ClassVar[str] = "before"  # before | inside | instead: of the projector
    uses_query: ClassVar[bool] = False  # looks at the question
    uses_taps: ClassVar[bool] = False  # looks at the hidden states `taps`
    uses_scores: ClassVar[bool] = False  # looks at the encoder's queries and keys
    elastic: ClassVar[bool] = False  # is trained for several numbers of tokens, shows one of them
    draws: ClassVar[bool] = False  # elastic: a training step draws one number; else all, averaged
    sizable: ClassVar[bool] = False  # its number of visual tokens can be chosen
    drawn: ClassVar[str] = "means"  # a key of inference.views.VIEWS
    reference: ClassVar[Reference | None] = None  # None: no release stores it

    # Settings of some compressors, as those without them count.
    num_heads: ClassVar[int] = 1
    taps: ClassVar[tuple[int, ...]] = ()
    query_layers: ClassVar[int] = 0

    def __post_init__(self):
        check_choice("compressor", "dtype", self.dtype, DTYPES)

    def check(self, vit: ViTConfig, lm: LMConfig) -> None:
        """Raises ConfigError for settings that do not fit the encoder or the decoder."""
        last = vit.feature_state
        for tap in self.taps:
            if not 0 <= tap <= last:
                raise ConfigError(
                    f"{self.name}: model.compressor.taps {self.taps}: {tap} is not a hidden state up to this encoder's "
                    f"feature layer (0..{last}); for example --config.model.compressor.taps={spread_taps(last)!r} "
                    "(evenly spaced), or () for the feature alone."
                )
        if not -1 <= self.query_layers <= lm.num_layers:
            raise ConfigError(
                f"{self.name}: query_layers {self.query_layers} must lie in [-1, {lm.num_layers}]."
            )

    @classmethod
    def module_class(cls) -> Any:
        """The flax module's class. Loads jax."""
        module, _, name = cls.flax_module.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def module(self, grid: int, *text_width: int) -> Any:
        """The flax module. text_width: of the decoder, for a compressor that stands instead of the projector."""
        return self.module_class()(self, grid, *text_width)

    def taps_width(self, width: int) -> int:
        """Channels of the multi-level features: the tapped states side by side, or the feature alone."""
        return width * max(1, len(self.taps))

    def num_tokens(self, grid: int) -> int:
        """Slots for the visual tokens of one image."""
        raise NotImplementedError

    def num_places(self, grid: int) -> int:
        """Rows of the projector's table of positions: by default one per slot."""
        return self.num_tokens(grid)

    def with_tokens(self, grid: int, visual_tokens: int) -> CompressorConfig:
        """Set to `visual_tokens`; `self` where they cannot be chosen. Raises ConfigError for a number it cannot give."""
        return self

    def counts(self, grid: int) -> tuple[int, ...]:
        """The numbers of visual tokens that it is trained for."""
        return (self.num_tokens(grid),)

    def num_params(self, width: int, text_width: int) -> int:
        """Parameters, without the projector. width: of the encoder; text_width: of the decoder."""
        return 0

    def flops(self, grid: int, width: int, text_width: int) -> int:
        """FLOPs of one image, without the projector and the language model's pass over the question."""
        return 0

    def entry_flops(self, grid: int, width: int, text_width: int) -> int:
        """The part of `flops` in linear maps that read features or the question themselves."""
        return 0

    def reference_fields(self, patches: int, text_width: int) -> dict[str, Any]:
        """Fields of config.json that the release reads, beside LLaVA's."""
        return {}

    @classmethod
    def from_reference(
        cls, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
    ) -> CompressorConfig:
        """The settings of a release. raw: its config.json; shapes: of the module's tensors; where: for errors."""
        return cls()


def valid_strides(grid: int) -> list[int]:
    return [s for s in range(1, grid + 1) if grid % s == 0]


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """The whole model: encoder -> compressor -> projector -> decoder."""

    vit: ViTConfig
    compressor: CompressorConfig
    lm: LMConfig
    projector_layers: int = 2  # linear layers with GELU between ("mlp2x_gelu" = 2)
    projector_norm: str = "none"  # none | rms: RMSNorm of the visual tokens handed to the decoder
    projector_positions: str = "none"  # none | grid: a learned vector per place, after the norm
    projector_scale: str = "one"  # one | words: root mean square of the first visual tokens

    def __post_init__(self):
        check_positive("vlm", projector_layers=self.projector_layers)
        check_choice("vlm", "projector_norm", self.projector_norm, ("none", "rms"))
        check_choice("vlm", "projector_positions", self.projector_positions, ("none", "grid"))
        check_choice("vlm", "projector_scale", self.projector_scale, ("one", "words"))
        if self.projector_scale == "words" and self.projector_norm == "none":
            raise ConfigError(
                "vlm: projector_scale 'words' scales the projector's norm; set projector_norm to 'rms', or it to 'one'."
            )
        self.compressor.check(self.vit, self.lm)


def spread_taps(last: int) -> tuple[int, ...]:
    """Up to four hidden states, evenly spaced from the middle of an encoder to its feature layer `last`."""
    return tuple(sorted({round(last * (1 + i / 3) / 2) for i in range(4)} - {0})) or (0,)


def stride_for(grid: int, visual_tokens: int) -> int:
    """The stride at which a windowed compressor gives `visual_tokens` on a `grid` x `grid` encoder."""
    side = math.isqrt(visual_tokens)
    if side < 1 or side * side != visual_tokens or grid % side:
        allowed = [(grid // s) ** 2 for s in reversed(valid_strides(grid))]
        raise ConfigError(
            f"visual_tokens {visual_tokens} cannot be cut from a {grid}x{grid} grid; use one of {allowed}."
        )
    return grid // side
