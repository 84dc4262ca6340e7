"""config.json and preprocessor_config.json to our frozen configs.

transformers fills in what a file leaves to the defaults of its model type; every field the file does hold is looked up
here: it is read, or it must have the one value that we compute, or it does not change the model. Anything else is
refused, because ignoring it would give wrong numbers silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.config import ConfigError, LMConfig, RopeScaling, ViTConfig
from vlm_jax.hf.fields import DECODER_READ, ENCODER_READ, check_fields, check_rope

# model_type -> what its decoder adds to Llama's
DECODERS: dict[str, dict[str, Any]] = {
    "llama": dict(qkv_bias=False, qk_norm=False),
    "mistral": dict(qkv_bias=False, qk_norm=False),
    "phi3": dict(qkv_bias=False, qk_norm=False),
    "qwen2": dict(qkv_bias=True, qk_norm=False),
    "qwen3": dict(qkv_bias=False, qk_norm=True),
}

_CLIP = dict(cls_token=True, pre_norm=True, post_norm=False, patch_bias=False, feature_layer=-2)
_SIGLIP = dict(cls_token=False, pre_norm=False, post_norm=True, patch_bias=True, feature_layer=-1)
# model_type -> what its encoder is made of, and what a compressor is given of it by default
ENCODERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _CLIP, "siglip_vision_model": _SIGLIP, "siglip2_vision_model": _SIGLIP,
}  # fmt: skip
# Two-tower models, of which the image encoder is wanted.
PAIRS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}  # fmt: skip
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}

_CLIP_PIXELS = dict(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
_HALF_PIXELS = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
# What the family's processors do when a directory has no preprocessor_config.json.
PIXELS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _CLIP_PIXELS, "siglip_vision_model": _HALF_PIXELS, "siglip2_vision_model": _HALF_PIXELS,
}  # fmt: skip
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def complete(raw: Mapping[str, Any], model_type: str, where: str) -> Any:
    """transformers' config object of `model_type` with the fields of `raw` and the defaults of the rest."""
    from transformers import AutoConfig  # seconds to import: only who reads a directory pays

    fields = {key: value for key, value in raw.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # its validators raise many kinds, some without a common base
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: not a valid {model_type} config: {reason}") from error


def decoder(raw: Mapping[str, Any], where: str, model_type: str = "") -> LMConfig:
    """A decoder's config. Raises ConfigError for a model type or a feature that we do not compute."""
    model_type = model_type or raw["model_type"]
    if model_type not in DECODERS:
        raise ConfigError(
            f"{where}: model_type {model_type!r} is no decoder we know; use one of {', '.join(DECODERS)}."
        )
    check_fields(raw, DECODER_READ, where)
    c = complete(raw, model_type, where)
    if getattr(c, "attention_bias", False) or getattr(c, "mlp_bias", False):
        raise ConfigError(f"{where}: attention_bias and mlp_bias must be false in {model_type}.")
    return LMConfig(
        vocab_size=c.vocab_size, width=c.hidden_size, num_layers=c.num_hidden_layers, num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads, head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        mlp_width=c.intermediate_size, rope_theta=float(c.rope_parameters["rope_theta"]), norm_eps=c.rms_norm_eps,
        tied_embeddings=c.tie_word_embeddings, rope_scaling=_rope_scaling(c.rope_parameters, where),
        sliding_window=_window(c, where), **DECODERS[model_type],
    )  # fmt: skip


def _rope_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling:
    kinds = {"default": "none", "linear": "linear", "llama3": "llama3"}
    check_rope(rope, where)
    kind = rope["rope_type"]
    if kind not in kinds:
        raise ConfigError(
            f"{where}: rope_scaling of type {kind!r} is not computed here; allowed: {', '.join(kinds)}."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor must be 1 (rotate whole heads).")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor=float(rope["factor"]))
    return RopeScaling(
        "llama3", float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
        rope["original_max_position_embeddings"],
    )  # fmt: skip


def _window(c: Any, where: str) -> int:
    """The window that every layer has; 0 for none."""
    window = getattr(c, "sliding_window", None) or 0
    kinds = set(getattr(c, "layer_types", None) or ["sliding_attention" if window else "full_attention"])  # fmt: skip
    if kinds == {"full_attention"}:
        return 0
    if kinds != {"sliding_attention"}:
        raise ConfigError(
            f"{where}: layer_types {sorted(kinds)} differ between layers; only one kind in all layers is computed here."
        )
    return window


def encoder(raw: Mapping[str, Any], folder: Path, where: str, model_type: str = "") -> ViTConfig:
    """An image encoder's config, with the pixels of the directory's preprocessor_config.json."""
    model_type = model_type or raw["model_type"]
    if model_type not in ENCODERS:
        known = ", ".join([*ENCODERS, *PAIRS])
        raise ConfigError(
            f"{where}: model_type {model_type!r} is no image encoder we know; use one of {known}."
        )
    check_fields(raw, ENCODER_READ, where)
    c = complete(raw, model_type, where)
    if c.hidden_act not in ACTIVATIONS:
        raise ConfigError(
            f"{where}: hidden_act {c.hidden_act!r} is not computed here; allowed: {', '.join(ACTIVATIONS)}."
        )
    fixed = getattr(c, "image_size", None)  # SigLIP 2 counts patches instead
    image_px = fixed or round(c.num_patches**0.5) * c.patch_size
    if not fixed and (image_px // c.patch_size) ** 2 != c.num_patches:
        raise ConfigError(
            f"{where}: num_patches {c.num_patches} is no square; only a fixed square resolution is computed here."
        )
    pixels = PIXELS[model_type] | preprocessing(folder, image_px)
    del pixels["image_mode"]
    return ViTConfig(
        image_px=image_px, patch_px=c.patch_size, width=c.hidden_size, num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads, mlp_width=c.intermediate_size, activation=ACTIVATIONS[c.hidden_act],
        norm_eps=c.layer_norm_eps, **pixels, **ENCODERS[model_type],
    )  # fmt: skip


def preprocessing(folder: Path, image_px: int) -> dict[str, Any]:
    """What preprocessor_config.json says: {"image_mode", "resample"} and, where given, {"mean", "std"}.

    Without the file: stretched, bicubic. Raises ConfigError for steps that data/images.py does not take, and for a size
    that is not the encoder's.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {"image_mode": "stretch", "resample": "bicubic"}
    p = json.loads(path.read_text(encoding="utf-8"))
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if p.get(step) is False:
            raise ConfigError(f"{str(path)!r}: {step} is false; that step is always taken here.")
    if abs(p.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ConfigError(f"{str(path)!r}: rescale_factor {p['rescale_factor']} is not 1/255.")
    resample = p.get("resample", 3)
    if resample not in RESAMPLE:
        raise ConfigError(f"{str(path)!r}: resample {resample} is not 2 (bilinear) or 3 (bicubic).")
    mode, side = _squaring(p, str(path))
    if side not in (None, image_px):
        raise ConfigError(
            f"{str(path)!r}: images of {side} px, but the encoder takes {image_px} px."
        )
    pixels = {ours: tuple(p[theirs]) for ours, theirs in (("mean", "image_mean"), ("std", "image_std")) if p.get(theirs)}  # fmt: skip
    return {"image_mode": mode, "resample": RESAMPLE[resample], **pixels}


def _squaring(p: Mapping[str, Any], where: str) -> tuple[str, int | None]:
    """(data.image_mode, side in pixels or None) of a preprocessor: pad, crop the middle, or stretch."""
    size, crop = p.get("size"), p.get("crop_size")
    if isinstance(size, Mapping) and "height" in size:
        if size["height"] != size["width"]:
            raise ConfigError(f"{where}: {size['height']}x{size['width']} px is no square.")
        return "stretch", size["height"]
    side = size["shortest_edge"] if isinstance(size, Mapping) else size
    cropped = crop["height"] if isinstance(crop, Mapping) else crop
    if not p.get("do_center_crop", True) and not p.get("do_pad"):
        raise ConfigError(f"{where}: shortest_edge without do_center_crop leaves no square.")
    if side is not None and cropped is not None and side != cropped:
        raise ConfigError(
            f"{where}: images are resized to {side} px and cropped to {cropped} px; only equal sizes are computed here."
        )
    return "pad" if p.get("do_pad") else "crop", side


def feature_layer(index: int, num_layers: int) -> int:
    """A hidden state's number, counted from either end, as ViTConfig counts it: from the end."""
    return index if index < 0 else index - (num_layers + 1)
