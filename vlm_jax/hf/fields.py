"""The fields of Hugging Face's config.json files: which are read, which must have one value, which change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax.config import ConfigError

DECODER_READ = frozenset({
    "attention_bias", "head_dim", "hidden_size", "intermediate_size", "layer_types", "max_window_layers", "mlp_bias",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "partial_rotary_factor", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "use_sliding_window",
    "vocab_size",
})  # fmt: skip
ENCODER_READ = frozenset({
    "hidden_act", "hidden_size", "image_size", "intermediate_size", "layer_norm_eps", "num_attention_heads",
    "num_hidden_layers", "num_patches", "patch_size",
})  # fmt: skip
LLAVA_READ = frozenset({
    "image_seq_length", "image_token_id", "image_token_index", "text_config", "tie_word_embeddings", "vision_config",
    "vision_feature_layer", "vision_feature_select_strategy",
})  # fmt: skip
ROPE_READ = frozenset({
    "factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings", "partial_rotary_factor",
    "rope_theta", "rope_type", "type",
})  # fmt: skip

# Computed in one way here; a file that asks for another is refused.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, 0.0), "dropout": (0, 0.0), "embd_pdrop": (0, 0.0), "resid_pdrop": (0, 0.0),
    "hidden_act": ("silu",), "multimodal_projector_bias": (True,), "num_channels": (3,),
    "projector_hidden_act": ("gelu",), "projector_type": ("mlp",),
}  # fmt: skip

# No part of the forward pass: bookkeeping, training, tokens, and the generation defaults that older files hold in full.
NEUTRAL = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention",
    "architectures", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "ignore_index", "initializer_factor", "initializer_range",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "logit_scale_init_value", "max_length",
    "max_position_embeddings", "max_sequence_length", "min_length", "model_max_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "original_max_position_embeddings",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "projection_dim", "projection_size", "pruned_heads", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "use_bfloat16", "use_cache", "vision_use_head",
})  # fmt: skip
# Of an encoder only: LLaVA's vision_config repeats them.
ENCODER_NEUTRAL = frozenset({"vocab_size", "tie_word_embeddings"})


def check_fields(raw: Mapping[str, Any], read: frozenset[str], where: str) -> None:
    """Raises ConfigError for the first field that is neither read, nor neutral, nor at the one value computed here.

    A field that is off (null, false, 0 or empty) asks for nothing.
    """
    known = read | NEUTRAL | (ENCODER_NEUTRAL if read is ENCODER_READ else frozenset())
    for name, value in raw.items():
        if name in known or not value:
            continue
        if name in FIXED and value in FIXED[name]:
            continue
        if name in FIXED:
            raise ConfigError(
                f"{where}: {name} {value!r} is not computed here; allowed: {FIXED[name][0]!r}."
            )
        raise ConfigError(
            f"{where}: field {name!r} = {value!r} is not known here, and may change what the model computes; remove it from "
            "config.json if it does not."
        )


def check_rope(rope: Mapping[str, Any], where: str) -> None:
    """The same for the fields of a rope_scaling or rope_parameters block."""
    for name, value in rope.items():
        if name not in ROPE_READ and value:
            raise ConfigError(f"{where}: rope field {name!r} = {value!r} is not computed here.")
