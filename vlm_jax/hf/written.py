"""Our frozen configs to config.json, preprocessor_config.json and processor_config.json: the inverse of settings.py.

The field names are the older ones that every release of transformers, vLLM and llama.cpp reads (`rope_theta`, `torch_dtype`).
"""

from __future__ import annotations

from typing import Any

from vlm_jax.hf import pixels, reference, settings
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LMConfig, ViTConfig, VLMConfig

Json = dict[str, Any]
IMAGE_TOKEN = "<image>"


def decoder(c: LMConfig) -> Json:
    """config.json of a decoder. Raises ConfigError when no architecture has exactly its features."""
    name = _architecture(c)
    classes = {"qwen3": "Qwen3", "qwen2": "Qwen2", "mistral": "Mistral", "llama": "Llama"}
    fields: Json = {
        "architectures": [f"{classes[name]}ForCausalLM"], "model_type": name, "vocab_size": c.vocab_size,
        "hidden_size": c.width, "intermediate_size": c.mlp_width, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim,
        "hidden_act": "silu", "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "rope_scaling": _rope(c),
        "tie_word_embeddings": c.tied_embeddings,
    }  # fmt: skip
    if name == "qwen2" and c.head_dim * c.num_heads != c.width:
        raise ConfigError(
            f"export: with qkv_bias, head_dim must be width / num_heads ({c.width // c.num_heads}), not {c.head_dim}."
        )
    if c.o_bias:
        fields["attention_bias"] = True
    if c.mlp_bias:
        fields["mlp_bias"] = True
    if name == "mistral":
        fields["sliding_window"] = c.sliding_window
    elif c.sliding_window:
        fields |= {"use_sliding_window": True, "sliding_window": c.sliding_window, "max_window_layers": 0}  # fmt: skip
    return fields


def _architecture(c: LMConfig) -> str:
    """The model_type of the decoder that has exactly these features. Raises ConfigError if there is none."""
    if c.qk_norm:
        name, fits = "qwen3", c.qkv_bias == c.o_bias and not c.mlp_bias
    elif c.qkv_bias and not c.o_bias:
        name, fits = "qwen2", not c.mlp_bias
    elif c.sliding_window:
        name, fits = "mistral", not (c.qkv_bias or c.o_bias or c.mlp_bias)
    else:
        name, fits = "llama", c.qkv_bias == c.o_bias
    if not fits:
        own = ", ".join(f"{field} {getattr(c, field)}" for field in ("qk_norm", "qkv_bias", "o_bias", "mlp_bias", "sliding_window"))  # fmt: skip
        raise ConfigError(
            f"export: no known architecture has {own} together; llama, mistral, qwen2 and qwen3 are known."
        )
    return name


def _rope(c: LMConfig) -> Json | None:
    s = c.rope_scaling
    if s.kind == "none":
        return None
    if s.kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": s.factor}
    return {
        "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
        "high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_max_positions,
    }  # fmt: skip


def encoder(c: ViTConfig) -> Json:
    """config.json of an encoder that ends at the feature layer. Raises ConfigError as `decoder` does."""
    families = {
        name: (d["cls_token"], d["pre_norm"], d["patch_bias"])
        for name, d in settings.ENCODERS.items()
    }
    traits = (c.cls_token, c.pre_norm, c.patch_bias)
    name = next((name for name, own in families.items() if own == traits), None)
    if name is None:
        raise ConfigError(
            "export: neither CLIP (cls_token, pre_norm) nor SigLIP (patch_bias) has this encoder's parts."
        )
    if c.position_grid not in (0, c.grid):
        raise ConfigError(
            f"export: the position table of {c.position_grid}x{c.position_grid} is interpolated to {c.grid}x{c.grid}, which "
            "transformers does not do; train with position_grid 0."
        )
    names = {ours: theirs for theirs, ours in settings.ACTIVATIONS.items()}
    own = {"vision_use_head": False} if c.patch_bias else {}
    return {
        "architectures": ["CLIPVisionModel" if c.cls_token else "SiglipVisionModel"], "model_type": name,
        "image_size": c.image_px, "patch_size": c.patch_px, "hidden_size": c.width, "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.feature_state, "num_attention_heads": c.num_heads, "num_channels": 3,
        "hidden_act": names[c.activation], "layer_norm_eps": c.norm_eps, **own,
    }  # fmt: skip


def llava(c: VLMConfig, image_token_index: int) -> Json:
    """config.json of transformers' LLaVA. Raises ConfigError when the model is not one."""
    if c.compressor.name != "identity":
        raise ConfigError(
            f"export: transformers' LLaVA has no {c.compressor.name}; export the parts: --what=lm, --what=vit and "
            "--what=reference."
        )
    for field, wanted in (("projector_layers", 2), ("projector_norm", "none"), ("projector_positions", "none")):  # fmt: skip
        if getattr(c, field) != wanted:
            raise ConfigError(
                f"export: transformers' LLaVA has {field} {wanted!r}, this model {getattr(c, field)!r}; export the parts: "
                "--what=lm and --what=vit."
            )
    if c.vit.post_norm and c.vit.feature_layer == -1:
        raise ConfigError(
            "export: transformers' LLaVA takes the encoder's last state before its last norm, this model after it "
            "(model.vit.post_norm); export the parts: --what=lm and --what=vit."
        )
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": decoder(c.lm),
        "vision_config": encoder(c.vit), "image_token_index": image_token_index, "image_seq_length": c.vit.num_patches,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default" if c.vit.cls_token else "full",
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "tie_word_embeddings": c.lm.tied_embeddings,
    }  # fmt: skip


def original(c: VLMConfig, encoder_name: str) -> Json:
    """config.json of the original LLaVA layout, with the fields that the compressors' releases read.

    encoder_name: hub name or path of the encoder, which this layout does not hold.
    """
    fields = decoder(c.lm)
    kind = "linear" if c.projector_layers == 1 else f"mlp{c.projector_layers}x_gelu"
    fields |= {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": reference.WRITTEN[fields["model_type"]], "mm_projector_type": kind, "use_mm_proj": True,
        "mm_hidden_size": c.vit.width, "mm_vision_tower": encoder_name, "mm_vision_select_layer": c.vit.feature_layer,
        "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad",
    }  # fmt: skip
    return fields | c.compressor.reference_fields(c.vit.num_patches, c.lm.width)


def preprocessor(c: ViTConfig, image_mode: str) -> Json:
    """preprocessor_config.json for data.image_mode pad, crop or stretch."""
    numbers = {name: number for number, name in pixels.RESAMPLE.items()}
    px = c.image_px
    edge = {"size": {"shortest_edge": px}, "do_center_crop": True, "crop_size": {"height": px, "width": px}}  # fmt: skip
    own: dict[str, Json] = {
        "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **edge},
        "crop": {"image_processor_type": "CLIPImageProcessor", **edge},
        "stretch": {"image_processor_type": "SiglipImageProcessor", "size": {"height": px, "width": px}},
    }  # fmt: skip
    return own[image_mode] | {
        "do_convert_rgb": True, "do_resize": True, "resample": numbers[c.resample], "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(c.mean), "image_std": list(c.std),
    }  # fmt: skip


def processor(c: ViTConfig) -> Json:
    """processor_config.json: how many image tokens transformers writes into a prompt."""
    return {
        "processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, "patch_size": c.patch_px,
        "num_additional_image_tokens": int(c.cls_token),
        "vision_feature_select_strategy": "default" if c.cls_token else "full",
    }  # fmt: skip
