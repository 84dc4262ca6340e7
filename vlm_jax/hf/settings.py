"""config.json to our frozen configs, with the preprocessing settings of the directory's image processor.

transformers decides what a field means: it fills in the defaults that a file leaves out. A field that the configuration
class of the model_type does not declare has no effect there, so it is ignored and named in the log. A declared field must be
one that is read here, one that is no part of the forward pass (NEUTRAL), or at its default: ignoring any other would
silently give wrong numbers. A few fields say that the directory holds another model than its model_type, whatever the class
declares: `check_marks` refuses them, with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.files import Path
from vlm_jax.hf.directory import short
from vlm_jax.hf.pixels import preprocessing
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LMConfig, RopeScaling, ViTConfig
from vlm_jax.settings.presets import CLIP, SIGLIP

# model_type -> in which fields its decoder differs from Llama
DECODERS: dict[str, dict[str, Any]] = {
    "llama": dict(qkv_bias=False, qk_norm=False),
    "mistral": dict(qkv_bias=False, qk_norm=False),
    "phi3": dict(qkv_bias=False, qk_norm=False),
    "qwen2": dict(qkv_bias=True, qk_norm=False),
    "qwen3": dict(qkv_bias=False, qk_norm=True),
}
BIASED = ("llama", "qwen3")  # model types whose attention_bias adds a bias to q, k, v and o

# model_type -> what its encoder is made of, and which of its hidden states is the feature by default
TRAITS = ("cls_token", "pre_norm", "post_norm", "patch_bias", "feature_layer")
ENCODERS: dict[str, dict[str, Any]] = {
    f"{family}_vision_model": {name: preset[name] for name in TRAITS}
    for family, preset in (("clip", CLIP), ("siglip", SIGLIP), ("siglip2", SIGLIP))
}
# Models of an image and a text encoder -> the model_type of their image encoder, which alone is read.
PAIRS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}  # fmt: skip
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}

DECODER_READ = frozenset({
    "attention_bias", "head_dim", "hidden_size", "intermediate_size", "layer_types", "max_window_layers", "mlp_bias",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "sliding_window",
    "tie_word_embeddings", "use_sliding_window", "vocab_size",
})  # fmt: skip
ENCODER_READ = frozenset({
    "hidden_act", "hidden_size", "image_size", "intermediate_size", "layer_norm_eps", "num_attention_heads",
    "num_hidden_layers", "num_patches", "patch_size",
})  # fmt: skip
LLAVA_READ = frozenset({
    "image_seq_length", "image_token_index", "text_config", "tie_word_embeddings", "vision_config", "vision_feature_layer",
    "vision_feature_select_strategy",
})  # fmt: skip
# Declared by those classes but no part of the forward pass: metadata, training, tokens, sizes of parts that are not imported.
NEUTRAL = frozenset({
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_factor",
    "initializer_range", "label2id", "max_position_embeddings", "original_max_position_embeddings", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "problem_type", "projection_dim", "return_dict", "transformers_version", "use_cache",
    "vision_use_head",
})  # fmt: skip
# Not declared by the classes but accepted by all of them: examined in `check_marks`, or without effect.
TAKEN = frozenset({
    "_attn_implementation", "_commit_hash", "_name_or_path", "attn_implementation", "auto_map", "model_type", "name_or_path",
    "num_labels", "output_attentions", "partial_rotary_factor", "rope_scaling", "rope_theta", "tie_word_embeddings", "torch_dtype",
})  # fmt: skip
SAME = {("hidden_act", "swish"): "silu"}  # another name of the same function

ROPE_READ = frozenset({
    "factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings", "partial_rotary_factor",
    "rope_theta", "rope_type", "type",
})  # fmt: skip
ROPE_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3"}

QUANTISED = re.compile(r"quantization.*|compression_config")
EXPERTS = re.compile(r"(.*_)?(moe|experts?)(_.*)?")


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
    from transformers import AutoConfig  # takes seconds to import, so only when a directory is read

    # A copy, because transformers completes the blocks that it is given.
    fields = {key: copy.deepcopy(value) for key, value in raw.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # its validators raise errors of many types
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
        raise ConfigError(f"{where}: not a valid {model_type} config: {reason}") from error


def decoder(raw: Mapping[str, Any], where: str, model_type: str = "", completed: Any = None) -> LMConfig:  # fmt: skip
    """A decoder's config. Raises ConfigError for a model type or a feature that we do not compute.

    completed: transformers' config object, if a larger config already contains it; None: it is made from `raw`.
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
    """The sliding window of every layer; 0 for none, and for an architecture without one."""
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
    """An image encoder's config, with the directory's preprocessing settings. completed: as in `decoder`."""
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
    if model_type == "siglip2_vision_model":  # its config has num_patches instead of image_size
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


# --- The fields of config.json: which change what is computed, and which do not. ---------------------------------------


def is_off(value: Any) -> bool:
    """Whether a value turns a feature off: null, false, 0, empty, or 1 (a single expert)."""
    return not value or (value is not True and value == 1)


def config_class(model_type: str) -> Any:
    """transformers' configuration class of a model_type."""
    # Takes seconds to import, so only when a directory is read.
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def check_marks(raw: Mapping[str, Any], model_type: str, where: str) -> None:
    """Raises ConfigError for the first field that shows that the weights or the model are not plain `model_type`."""
    for name, value in raw.items():
        if is_off(value):
            continue
        if QUANTISED.fullmatch(name):
            raise ConfigError(
                f"{where}: field {name!r} = {short(value)}: quantised weights are not computed here; give the directory "
                "that they were made from."
            )
        if EXPERTS.fullmatch(name):
            raise ConfigError(
                f"{where}: field {name!r} = {short(value)} belongs to a mixture of experts, which is not computed here."
            )
        if name == "per_layer_config":
            raise ConfigError(
                f"{where}: {name} = {short(value)}: only layers that are all alike are computed here."
            )
    if raw.get("is_causal") is False:
        raise ConfigError(
            f"{where}: is_causal is false: a decoder whose tokens see what follows them is not computed here."
        )
    _check_code(raw, model_type, where)
    _check_rope_kind(raw, where)
    _check_cut_cache(raw, model_type, where)


def _check_code(raw: Mapping[str, Any], model_type: str, where: str) -> None:
    """Raises ConfigError for an auto_map that names code other than transformers' own, which Phi-3's auto_map names."""
    stem = config_class(model_type).__name__.removesuffix("Config")
    own = re.compile(rf"{stem}(Config|Model|PreTrainedModel|For[A-Z]\w*|ModelWithProjection)")
    code = raw.get("auto_map")
    for auto, name in (code if isinstance(code, Mapping) else {}).items():
        if auto.startswith(("AutoConfig", "AutoModel")) and not own.fullmatch(str(name).split(".")[-1]):  # fmt: skip
            raise ConfigError(
                f"{where}: auto_map says that {auto} is {short(name)}, code of its own beside the weights; only what "
                f"transformers' {model_type} computes is computed here."
            )


def block(raw: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The fields of a block of config.json; {} where it is missing or null."""
    found = raw.get(name) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: {name} {short(found)} is no JSON object.")
    return dict(found)


def rope_block(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rotary settings of config.json: rope_scaling takes precedence over rope_parameters, as in transformers."""
    return block(raw, "rope_scaling", where) or block(raw, "rope_parameters", where)


def _check_rope_kind(raw: Mapping[str, Any], where: str) -> None:
    rope = rope_block(raw, where)
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"{where}: rotary angles that differ between layers ({', '.join(nested)}) are not computed here."
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if kind not in ROPE_KINDS:
        also = f", nor is partial_rotary_factor {short(partial)}" if partial != 1.0 else ""
        raise ConfigError(
            f"{where}: rope_scaling of type {short(kind)} is not computed here{also}; allowed: {', '.join(ROPE_KINDS)}."
        )
    if partial != 1.0:
        raise ConfigError(
            f"{where}: partial_rotary_factor must be 1 (whole heads are rotated here), not {short(partial)}."
        )
    sections = [name for name, value in rope.items() if name.startswith("mrope") and value]
    if sections:  # Qwen2-VL's three-dimensional positions of images and videos
        raise ConfigError(
            f"{where}: rope field {sections[0]!r} = {short(rope[sections[0]])} is not computed here."
        )


def _check_cut_cache(raw: Mapping[str, Any], model_type: str, where: str) -> None:
    """Raises ConfigError for a window that transformers applies to the key/value cache but not to the attention mask."""
    declared = _declared(model_type)
    longest = raw.get("max_position_embeddings") or float("inf")
    for name in ("sliding_window", "attention_chunk_size"):
        window = raw.get(name)
        cut = isinstance(window, int) and 0 < window < longest
        if cut and name not in declared and "max_position_embeddings" in declared:
            raise ConfigError(
                f"{where}: {name} {short(window)}: {model_type} has no such window in its layers, but transformers cuts its cache "
                "to it; set it to null in config.json, or use a model_type that has it (mistral)."
            )


def _declared(model_type: str) -> dict[str, Any]:
    """The fields that transformers' class declares, with their defaults (of those that have one)."""
    return {field.name: field.default for field in dataclasses.fields(config_class(model_type))}


def check_declared(
    raw: Mapping[str, Any], model_type: str, read: Collection[str], where: str
) -> None:
    """Raises ConfigError for the first declared field that is neither read, nor neutral, nor at its default."""
    declared, renamed = _declared(model_type), config_class(model_type).attribute_map
    for name, value in raw.items():
        field = renamed.get(name, name)
        if field not in declared or field in read or field in NEUTRAL or value is None:
            continue
        default = declared[field]
        if SAME.get((field, str(value)), value) != default:
            raise ConfigError(
                f"{where}: {name} {short(value)} is not computed here; allowed: {short(default)}, the default of {model_type}."
            )


def ignored(raw: Mapping[str, Any], model_type: str, read: Collection[str]) -> list[str]:
    """The fields with a value that transformers' class does not declare. Generation defaults and empty fields are left out."""
    from transformers import GenerationConfig

    known = {*_declared(model_type), *config_class(model_type).attribute_map, *read, *TAKEN, *vars(GenerationConfig())}  # fmt: skip
    names = [name for name, value in raw.items() if name not in known and value]
    rope = rope_block(raw, "")
    return names + [f"rope_scaling.{name}" for name, value in rope.items() if name not in ROPE_READ and value]  # fmt: skip
