"""Frozen, validated settings: what each module is given, and nothing more. Imports no jax.

`configs/default.py` lists every field once with its unit and source. A wrong value is a `ConfigError` with one line.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

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


# Compressors that ...
WINDOWED = ("quecc", "tokenpacker", "pool")  # cut the patch grid into stride x stride windows
ATTENDING = ("quecc", "tokenpacker", "mqt")  # have num_heads heads, together as wide as the encoder
ELASTIC = ("m3", "mqt")  # are trained for several numbers of visual tokens and show one of them
SCORED = ("prumerge", "prumerge_plus")  # look at the encoder's queries and keys


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """Which compressor, how strongly it compresses, and its size."""

    name: str  # a key of compressors.COMPRESSORS
    stride: int = 1  # patches along one side of a window: visual tokens = (grid / stride)^2
    num_heads: int = 8
    taps: tuple[int, ...] = ()  # hidden states side by side as a second input; () = the feature
    norm_eps: float = 1e-6
    dtype: str = "float32"
    visual_tokens: int = 0  # M3, MQT: shown at inference; 0 = all (patches or queries)
    train_tokens: tuple[int, ...] = ()  # M3, MQT: the numbers trained for; () = the paper's
    query_grid: int = 16  # MQT: queries along one side
    key_source: str = "positions"  # MQT: positions | image (positions added)
    query_layers: int = -1  # QueCC: decoder layers that read the question; -1 = all, 0 = embeddings
    prune_ratio: str = "adaptive"  # PruMerge: adaptive | batch | fixed (see compressors.prumerge)
    fixed_ratio: float = 0.125  # of the patches, kept by "fixed"
    max_kept: int = 0  # patches kept at most by the other two; 0 = no limit
    neighbours: int = 32  # patches merged into each kept one
    sample_last: bool = True  # PruMerge+: may the last patch be sampled

    def __post_init__(self):
        check_choice("compressor", "dtype", self.dtype, DTYPES)
        check_choice("compressor", "key_source", self.key_source, ("positions", "image"))
        check_positive(
            "compressor", stride=self.stride, num_heads=self.num_heads, query_grid=self.query_grid
        )
        if self.name not in ELASTIC and (self.visual_tokens or self.train_tokens):
            raise ConfigError(
                f"{self.name}: visual_tokens and train_tokens are for {', '.join(ELASTIC)}; set them to 0 and ()."
            )
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

    def __post_init__(self):
        check_positive("vlm", projector_layers=self.projector_layers)
        check_choice("vlm", "projector_norm", self.projector_norm, ("none", "rms"))
        check_choice("vlm", "projector_positions", self.projector_positions, ("none", "grid"))
        name, grid, stride = self.compressor.name, self.vit.grid, self.compressor.stride
        if name in WINDOWED and grid % stride:
            raise ConfigError(
                f"{name}: grid {grid} is not divisible by stride {stride}; use one of {valid_strides(grid)}."
            )
        if name in ATTENDING and self.vit.width % self.compressor.num_heads:
            raise ConfigError(
                f"{name}: encoder width {self.vit.width} is not divisible by num_heads {self.compressor.num_heads}."
            )
        if name in SCORED and self.compressor.neighbours >= self.vit.num_patches:
            raise ConfigError(
                f"{name}: neighbours {self.compressor.neighbours} must be fewer than the {self.vit.num_patches} patches."
            )
        check_elastic(self.compressor, grid)
        if not -1 <= self.compressor.query_layers <= self.lm.num_layers:
            raise ConfigError(
                f"{name}: query_layers {self.compressor.query_layers} must lie in [-1, {self.lm.num_layers}]."
            )
        last = self.vit.feature_state
        for tap in self.compressor.taps:
            if not 0 <= tap <= last:
                raise ConfigError(
                    f"{name}: model.compressor.taps {self.compressor.taps}: {tap} is not a hidden state up to this encoder's "
                    f"feature layer (0..{last}); for example --config.model.compressor.taps={spread_taps(last)!r} "
                    "(evenly spaced), or () for the feature alone."
                )


def spread_taps(last: int) -> tuple[int, ...]:
    """Up to four hidden states, evenly spaced from the middle of an encoder to its feature layer `last`."""
    return tuple(sorted({round(last * (1 + i / 3) / 2) for i in range(4)} - {0})) or (0,)


def check_elastic(compressor: CompressorConfig, grid: int) -> None:
    """Raises ConfigError for a number of visual tokens that an elastic compressor cannot give."""
    counts = (compressor.visual_tokens, *compressor.train_tokens)
    if compressor.name == "m3":
        largest = math.isqrt(max(compressor.train_tokens, default=grid**2))
        for count in filter(None, counts):
            stride_for(grid, count)
        for count in compressor.train_tokens:
            stride_for(largest, count)  # training pools the others from the largest
    side = compressor.query_grid
    if compressor.name == "mqt" and not all(0 <= count <= side**2 for count in counts):
        raise ConfigError(
            f"mqt: {side} x {side} queries give 1 to {side**2} visual tokens, not {max(counts)}."
        )


def with_tokens(compressor: CompressorConfig, grid: int, visual_tokens: int) -> CompressorConfig:
    """The compressor set to `visual_tokens` of a grid x grid encoder; ConfigError if it cannot be."""
    if compressor.name in ELASTIC:
        sized = dataclasses.replace(compressor, visual_tokens=visual_tokens)
        check_elastic(sized, grid)
        return sized
    if compressor.name == "identity" and visual_tokens == grid**2:
        return compressor
    if compressor.name in WINDOWED:
        return dataclasses.replace(compressor, stride=stride_for(grid, visual_tokens))
    raise ConfigError(
        f"{compressor.name}: its visual tokens cannot be chosen; use one of {', '.join(WINDOWED + ELASTIC)}."
    )


def stride_for(grid: int, visual_tokens: int) -> int:
    """The stride at which a windowed compressor gives `visual_tokens` on a `grid` x `grid` encoder."""
    side = math.isqrt(visual_tokens)
    if side < 1 or side * side != visual_tokens or grid % side:
        allowed = [(grid // s) ** 2 for s in reversed(valid_strides(grid))]
        raise ConfigError(
            f"visual_tokens {visual_tokens} cannot be cut from a {grid}x{grid} grid; use one of {allowed}."
        )
    return grid // side
