"""The original LLaVA layout, in which the compressors' releases are stored too: one config.json with `mm_...` fields."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.config import CompressorConfig, ConfigError, LMConfig
from vlm_jax.hf import settings
from vlm_jax.hf.naming import Names

# model_type -> the decoder's
DECODERS = {
    "llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2", "llava_phi": "phi3",
}  # fmt: skip

# A tensor that only this compressor has; none of them: no compressor.
MARKS = {"0.q_downsample.weight": "quecc", "q_proj_1.weight": "tokenpacker", "ln_q.weight": "mqt"}
TAPS = (12, 16, 22, 23)  # of QueCC and TokenPacker, fixed in their releases
QUECC_HEADS, TOKENPACKER_HEAD_DIM, TOKENPACKER_STRIDE, MQT_HEAD_DIM = 8, 128, 2, 64  # likewise

FIXED: dict[str, tuple[Any, ...]] = {
    "mm_use_im_start_end": (False,), "mm_vision_select_feature": ("patch",), "mm_patch_merge_type": ("flat",),
    "image_aspect_ratio": ("pad", "square"), "mm_vision_token_compression_type": ("quecc",),
    "query_abstractor_type": ("matry_query",),
}  # fmt: skip
READ = frozenset({
    "mm_hidden_size", "mm_projector_type", "mm_vision_select_layer", "mm_vision_tower", "scale_factor",
    "mm_vision_output_text_embedding_size", "mm_vision_output_token_count", "mm_vision_token_compression_kernel_size",
    "mm_vision_token_compression_stride",
})  # fmt: skip
NEUTRAL = frozenset({
    "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler", "image_crop_resolution", "image_grid_pinpoints",
    "image_split_resolution", "mm_projector_lr", "mm_resampler_type", "mm_use_im_patch_token", "mm_vision_tower_lr",
    "mm_tunable_parts", "num_visual_tokens", "pretrain_mm_mlp_adapter", "tokenizer_model_max_length", "tokenizer_padding_side",
    "tune_mm_mlp_adapter", "tune_mm_query_abstractor", "unfreeze_mm_vision_tower", "use_mm_proj",
})  # fmt: skip


def is_reference(raw: Mapping[str, Any]) -> bool:
    return "mm_vision_tower" in raw and "text_config" not in raw


def decoder(raw: Mapping[str, Any], where: str) -> LMConfig:
    """The decoder of a config.json in which its fields stand beside those of the images. Raises ConfigError as usual."""
    if raw["model_type"] not in DECODERS:
        raise ConfigError(
            f"{where}: model_type {raw['model_type']!r} with mm_ fields is not known here; use one of {', '.join(DECODERS)}."
        )
    for name, allowed in FIXED.items():
        if raw.get(name) and raw[name] not in allowed:
            raise ConfigError(
                f"{where}: {name} {raw[name]!r} is not computed here; allowed: {', '.join(map(repr, allowed))}."
            )
    own = {k: v for k, v in raw.items() if k not in READ | NEUTRAL and k not in FIXED}
    return settings.decoder(own, where, DECODERS[raw["model_type"]])


def projector_layers(raw: Mapping[str, Any], where: str) -> int:
    """1 for "linear", k for "mlp{k}x_gelu"."""
    kind = raw.get("mm_projector_type", "linear")
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if not match and kind != "linear":
        raise ConfigError(
            f"{where}: mm_projector_type {kind!r} is not computed here; allowed: linear, mlp2x_gelu, mlp3x_gelu, ..."
        )
    return int(match[1]) if match else 1


def compressor(
    raw: Mapping[str, Any], names: Names, shapes: Mapping[str, tuple[int, ...]], where: str
) -> CompressorConfig:
    """Which compressor the tensors belong to, and its settings. names: of the mm_projector; shapes: by the files' names."""
    found = [name for mark, name in MARKS.items() if mark in names]
    if not found:
        return CompressorConfig("identity")
    if found == ["tokenpacker"]:
        width = shapes[names["q_proj_1.weight"]][0]
        stride = raw.get("scale_factor", TOKENPACKER_STRIDE)
        heads = max(width // TOKENPACKER_HEAD_DIM, 1)
        return CompressorConfig("tokenpacker", stride=stride, num_heads=heads, taps=TAPS)
    if found == ["mqt"]:
        queries, width = shapes[names["query"]]
        heads = max(width // MQT_HEAD_DIM, 1)
        return CompressorConfig("mqt", num_heads=heads, query_grid=math.isqrt(queries))
    kernel = shapes[names["0.q_downsample.weight"]][-1]
    stride = raw.get("mm_vision_token_compression_stride") or kernel
    if kernel != stride:
        raise ConfigError(
            f"{where}: quecc: kernel {kernel} differs from stride {stride}; only kernel = stride is computed here."
        )
    return CompressorConfig("quecc", stride=stride, num_heads=QUECC_HEADS, taps=TAPS)
