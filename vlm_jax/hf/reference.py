"""The original LLaVA layout, in which the compressors' releases are stored too: one config.json with `mm_...` fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.compressors.identity import IdentityConfig
from vlm_jax.hf import settings
from vlm_jax.hf.directory import Names, short
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import CompressorConfig, LMConfig

# model_type of the decoder -> model_type in LLaVA's code. Some training scripts leave the decoder's own there.
WRITTEN = {
    "llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen", "qwen3": "llava_qwen3", "phi3": "llava_phi",
}  # fmt: skip
NAMES = {name: own for own, name in WRITTEN.items()} | {"llava": "llama"}

FIXED: dict[str, tuple[Any, ...]] = {
    "mm_use_im_start_end": (False,), "mm_vision_select_feature": ("patch",), "mm_patch_merge_type": ("flat",),
    "image_aspect_ratio": ("pad", "square"), "mm_vision_token_compression_type": ("quecc",),
    "query_abstractor_type": ("matry_query",), "mm_resampler_type": (None,),
}  # fmt: skip
READ = frozenset({
    "mm_hidden_size", "mm_projector_type", "mm_vision_select_layer", "mm_vision_tower",
    "mm_vision_output_text_embedding_size", "mm_vision_output_token_count", "mm_vision_token_compression_kernel_size",
    "mm_vision_token_compression_stride",
})  # fmt: skip
KINDS = {"mm_vision_tower": str, "mm_vision_select_layer": int, "mm_projector_type": str, "scale_factor": int}  # fmt: skip
# Fields of training only; any other field that begins with mm_ could change what is computed.
NEUTRAL = frozenset({
    "mm_projector_lr", "mm_tunable_parts", "mm_use_im_patch_token", "mm_vision_tower_lr",
})  # fmt: skip
# Other fields of LLaVA, without mm_, which are not named in the log as ignored.
KNOWN = frozenset({
    "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler", "image_aspect_ratio", "image_crop_resolution",
    "image_grid_pinpoints", "image_split_resolution", "num_visual_tokens", "pretrain_mm_mlp_adapter", "query_abstractor_type",
    "scale_factor", "tokenizer_model_max_length", "tokenizer_padding_side", "tune_mm_mlp_adapter",
    "tune_mm_query_abstractor", "tune_mm_vision_resampler", "unfreeze_mm_vision_tower", "use_mm_proj",
})  # fmt: skip


def is_reference(raw: Mapping[str, Any]) -> bool:
    return bool(raw.get("mm_vision_tower")) and "text_config" not in raw


def decoder_type(raw: Mapping[str, Any], where: str) -> str:
    """The model_type of the decoder: "qwen2" of llava_qwen, llava_qwen2, llava-qwen2 and qwen2."""
    name = raw["model_type"].replace("-", "_")
    bare = name.removeprefix("llava_")
    own = NAMES.get(name) or (bare if bare in settings.DECODERS else "")
    if not own:
        known = ", ".join(["llava", *WRITTEN.values(), *WRITTEN])
        raise ConfigError(
            f"{where}: model_type {raw['model_type']!r} with mm_ fields is not known here; use one of {known}."
        )
    return own


def decoder(raw: Mapping[str, Any], where: str) -> LMConfig:
    """The decoder of a config.json that holds its fields beside those of the image parts. Raises ConfigError as
    `settings.decoder` does, and for an mm_ field that could change what is computed."""
    own = decoder_type(raw, where)
    for name, allowed in FIXED.items():
        if raw.get(name) and raw[name] not in allowed:
            raise ConfigError(
                f"{where}: {name} {short(raw[name])} is not computed here; allowed: {', '.join(map(repr, allowed))}."
            )
    for name, value in raw.items():
        if name.startswith("mm_") and name not in READ | NEUTRAL and name not in FIXED and value:
            raise ConfigError(
                f"{where}: field {name!r} = {short(value)} is not known here, and may change what the model computes; remove it "
                "from config.json if it does not."
            )
    for name, kind in KINDS.items():
        if raw.get(name) is not None and not isinstance(raw[name], kind):
            raise ConfigError(
                f"{where}: {name} {short(raw[name])} is not computed here; it must be one {kind.__name__}."
            )
    # auto_map names code of the training repository, which is what defines this layout.
    return settings.decoder({k: v for k, v in raw.items() if k != "auto_map"}, where, own)


def ignored(raw: Mapping[str, Any], where: str) -> list[str]:
    """The fields with a value that neither LLaVA nor its decoder knows."""
    rest = {k: v for k, v in raw.items() if not k.startswith("mm_") and k not in KNOWN}
    return settings.ignored(rest, decoder_type(raw, where), settings.DECODER_READ)


def projector_layers(raw: Mapping[str, Any], names: Names, where: str) -> int:
    """The number of linear layers of the projector. names: the tensors of the mm_projector.

    A compressor's release may hold them under names of its own, or none; else 1 for "linear", k for "mlp{k}x_gelu". Raises
    ConfigError for another mm_projector_type.
    """
    layout = _stored(names).reference
    if layout and layout.projector is not None:
        return len(layout.projector)
    kind = raw.get("mm_projector_type") or "linear"
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if not match and kind != "linear":
        raise ConfigError(
            f"{where}: mm_projector_type {kind!r} is not computed here; allowed: linear, mlp2x_gelu, mlp3x_gelu, ..., and those of "
            f"the compressors {', '.join(_marked())} beside their weights."
        )
    return int(match[1]) if match else 1


def _marked() -> dict[str, str]:
    """The compressors with parameters in a release -> a tensor that no other one has."""
    layouts = {name: entry.reference for name, entry in COMPRESSORS.items()}
    return {name: layout.mark for name, layout in layouts.items() if layout and layout.mark}


def _stored(names: Names) -> type[CompressorConfig]:
    """The compressor that the tensors of an mm_projector belong to."""
    found = [name for name, mark in _marked().items() if mark in names]
    return COMPRESSORS[found[0]] if found else IdentityConfig


def compressor(
    raw: Mapping[str, Any], names: Names, shapes: Mapping[str, tuple[int, ...]], where: str
) -> CompressorConfig:
    """Which compressor the tensors belong to, and its settings. names: of the mm_projector; shapes: by the files' names."""
    own = {name: shapes[stored] for name, stored in names.items()}
    return _stored(names).from_reference(raw, own, where)
