"""config.json to our frozen configs, with the pixels of the directory's image processor.

transformers fills in what a file leaves to the defaults of its model type, and says which fields mean something (see
fields.py): one that does and that is not computed here is refused, because ignoring it would give wrong numbers silently.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.hf.fields import (
    DECODER_READ,
    ENCODER_READ,
    ROPE_KINDS,
    check_declared,
    check_marks,
    short,
)
from vlm_jax.hf.pixels import preprocessing
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LMConfig, RopeScaling, ViTConfig

# model_type -> what its decoder adds to Llama's
DECODERS: dict[str, dict[str, Any]] = {
    "llama": dict(qkv_bias=False, qk_norm=False),
    "mistral": dict(qkv_bias=False, qk_norm=False),
    "phi3": dict(qkv_bias=False, qk_norm=False),
    "qwen2": dict(qkv_bias=True, qk_norm=False),
    "qwen3": dict(qkv_bias=False, qk_norm=True),
}
BIASED = ("llama", "qwen3")  # whose attention_bias is a bias of all four maps of attention

_CLIP = dict(cls_token=True, pre_norm=True, post_norm=False, patch_bias=False, feature_layer=-2)
_SIGLIP = dict(cls_token=False, pre_norm=False, post_norm=True, patch_bias=True, feature_layer=-1)
# model_type -> what its encoder is made of, and what a compressor is given of it by default
ENCODERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _CLIP, "siglip_vision_model": _SIGLIP, "siglip2_vision_model": _SIGLIP,
}  # fmt: skip
# Two-tower models, of which the image encoder is wanted.
PAIRS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}  # fmt: skip
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}


def check_decoder(model_type: str, where: str) -> None:
    """Raises ConfigError for a model_type that is not computed here."""
    if model_type not in DECODERS:
        raise ConfigError(
            f"{where}: model_type {model_type!r} is no decoder we know; use one of {', '.join(DECODERS)}."
        )


def check_encoder(model_type: str, where: str) -> None:
    """The same for image encoders."""
    if model_type not in ENCODERS:
        known = ", ".join([*ENCODERS, *PAIRS])
        raise ConfigError(
            f"{where}: model_type {model_type!r} is no image encoder we know; use one of {known}."
        )


def complete(raw: Mapping[str, Any], model_type: str, where: str) -> Any:
    """transformers' config object of `model_type` with the fields of `raw` and the defaults of the rest."""
    from transformers import AutoConfig  # seconds to import: only who reads a directory pays

    # A copy, because transformers completes the blocks that it is given.
    fields = {key: copy.deepcopy(value) for key, value in raw.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # its validators raise many kinds, some without a common base
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
        raise ConfigError(f"{where}: not a valid {model_type} config: {reason}") from error


def decoder(raw: Mapping[str, Any], where: str, model_type: str = "", completed: Any = None) -> LMConfig:  # fmt: skip
    """A decoder's config. Raises ConfigError for a model type or a feature that we do not compute.

    completed: transformers' object, where a larger config has made it; None: made of `raw` here.
    """
    model_type = model_type or raw["model_type"]
    check_decoder(model_type, where)
    check_marks(raw, model_type, where)
    c = completed or complete(raw, model_type, where)
    check_declared(raw, model_type, DECODER_READ, where)
    biased = bool(getattr(c, "attention_bias", False)) and model_type in BIASED
    traits = DECODERS[model_type] | {"o_bias": biased, "mlp_bias": model_type == "llama" and c.mlp_bias}  # fmt: skip
    traits["qkv_bias"] |= biased
    return LMConfig(
        vocab_size=c.vocab_size, width=c.hidden_size, num_layers=c.num_hidden_layers, num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads, head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        mlp_width=c.intermediate_size, rope_theta=float(c.rope_parameters["rope_theta"]), norm_eps=c.rms_norm_eps,
        tied_embeddings=c.tie_word_embeddings, rope_scaling=_rope_scaling(c.rope_parameters),
        sliding_window=_window(c, model_type, where), **traits,
    )  # fmt: skip


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling:
    kind = ROPE_KINDS[rope["rope_type"]]
    if kind == "none":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor=float(rope["factor"]))
    return RopeScaling(
        "llama3", float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
        rope["original_max_position_embeddings"],
    )  # fmt: skip


def _window(c: Any, model_type: str, where: str) -> int:
    """The window that every layer has; 0 for none, and where the architecture knows of none."""
    if model_type == "llama":
        return 0
    window = c.sliding_window or 0
    kinds = set(getattr(c, "layer_types", None) or ["sliding_attention" if window else "full_attention"])  # fmt: skip
    if kinds == {"full_attention"}:
        return 0
    if kinds != {"sliding_attention"}:
        raise ConfigError(
            f"{where}: layer_types {sorted(kinds)} differ between layers; only one kind in all layers is computed here."
        )
    return window


def encoder(
    raw: Mapping[str, Any], folder: Path, where: str, model_type: str = "", completed: Any = None
) -> ViTConfig:
    """An image encoder's config, with the pixels of the directory's image processor. completed: as in `decoder`."""
    model_type = model_type or raw["model_type"]
    check_encoder(model_type, where)
    check_marks(raw, model_type, where)
    c = completed or complete(raw, model_type, where)
    check_declared(raw, model_type, ENCODER_READ, where)
    if c.hidden_act not in ACTIVATIONS:
        raise ConfigError(
            f"{where}: hidden_act {c.hidden_act!r} is not computed here; allowed: {', '.join(ACTIVATIONS)}."
        )
    patch_px = _side(c.patch_size, "patch_size", where)
    if model_type == "siglip2_vision_model":  # it counts patches instead
        image_px = round(c.num_patches**0.5) * patch_px
        if (image_px // patch_px) ** 2 != c.num_patches:
            raise ConfigError(
                f"{where}: num_patches {c.num_patches} is no square; only a fixed square resolution is computed here."
            )
    else:
        image_px = _side(c.image_size, "image_size", where)
    pixels = preprocessing(folder, image_px, model_type)
    del pixels["image_mode"]
    return ViTConfig(
        image_px=image_px, patch_px=patch_px, width=c.hidden_size, num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads, mlp_width=c.intermediate_size, activation=ACTIVATIONS[c.hidden_act],
        norm_eps=c.layer_norm_eps, **pixels, **ENCODERS[model_type],
    )  # fmt: skip


def _side(size: Any, name: str, where: str) -> int:
    """The side of a square that is given by a number, or by two equal ones."""
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1:
        raise ConfigError(f"{where}: {name} {short(size)} is no square.")
    return sides.pop()


def feature_layer(index: int, num_layers: int) -> int:
    """A hidden state's number, counted from either end, as ViTConfig counts it: from the end."""
    return index if index < 0 else index - (num_layers + 1)
