"""Which fields of a config.json stop an import: what transformers itself would read decides."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from test_hf_errors import edit
from test_hf_parity import check, compare_decoder, compare_encoder, compare_llava

from vlm_jax.hf import named
from vlm_jax.hf.describe import describe
from vlm_jax.settings.checks import ConfigError


@pytest.fixture
def copied(models, tmp_path):
    return lambda name: Path(shutil.copytree(models(name), tmp_path / "model"))


# What exporters leave in the files of a llama; none of it is declared by transformers' class.
OF_EXPORTERS = dict(
    is_llama_config=True, unsloth_fixed=True, unsloth_version="2024.9", _model_name_or_path="a/b", rope_interleaved=False,
    logit_scale=8.0, vocab_size_of_tomorrow=5, num_experts=1, pretrained_from={"name": "x"},
)  # fmt: skip
# What older releases of transformers wrote into every file: defaults of generation and of the base class.
OF_TRANSFORMERS = dict(
    _name_or_path="a/b", torch_dtype="float16", transformers_version="4.31.0", architectures=["LlamaForCausalLM"],
    temperature=0.6, top_p=0.9, top_k=50, max_length=4096, do_sample=True, repetition_penalty=1.1, typical_p=1.0,
    pruned_heads={}, is_decoder=False, add_cross_attention=False, cross_attention_hidden_size=None, chunk_size_feed_forward=0,
    tie_encoder_decoder=False, use_bfloat16=False, torchscript=False, finetuning_task=None, id2label={"0": "LABEL_0"},
    label2id={"LABEL_0": 0}, problem_type=None, num_beams=1, use_cache=False, pretraining_tp=2, initializer_range=0.04,
    quantization_config=None, num_local_experts=0, num_experts=0, use_moe=False, hidden_act="swish",
)  # fmt: skip


def test_fields_that_transformers_does_not_declare_change_nothing_and_are_named_once(copied, caplog):  # fmt: skip
    folder = copied("llama, grouped queries")
    before = named.lm(str(folder))
    edit(folder, **OF_TRANSFORMERS)
    with caplog.at_level(logging.INFO):
        assert named.lm(str(folder)) == before
        assert not [r for r in caplog.records if "ignored" in r.message]
        edit(folder, **OF_EXPORTERS)
        assert named.lm(str(folder)) == before == describe(folder).lm
    lines = [r.message for r in caplog.records if "ignored" in r.message]
    assert lines == [
        f"{folder / 'config.json'}: ignored, because transformers does not know them: _model_name_or_path, is_llama_config, "
        "logit_scale, num_experts, pretrained_from, unsloth_fixed, unsloth_version, vocab_size_of_tomorrow."
    ]
    assert compare_decoder(folder, answers=False).difference < 2e-5


FACTORS = [1.0 + 0.01 * i for i in range(48)]
PHI4 = dict(
    full_attn_mod=1, interpolate_factor=1, partial_rotary_factor=0.75,
    rope_scaling={"type": "longrope", "long_factor": FACTORS, "short_factor": FACTORS},
)  # fmt: skip
# name -> (model, fields, the whole message behind the file's name)
REFUSED = {
    "long factors": (
        "phi3, fused weights", PHI4,
        "rope_scaling of type 'longrope' is not computed here, nor is partial_rotary_factor 0.75; allowed: default, linear, llama3.",
    ),
    "the first name of longrope": (
        "phi3, fused weights", dict(rope_scaling={"type": "su", "long_factor": FACTORS, "short_factor": FACTORS}),
        "rope_scaling of type 'su' is not computed here; allowed: default, linear, llama3.",
    ),
    "partly rotated heads": (
        "phi3, fused weights", dict(rope_parameters=None, partial_rotary_factor=0.5),
        "partial_rotary_factor must be 1 (whole heads are rotated here), not 0.5.",
    ),
    "quantised": (
        "llama, grouped queries", dict(quantization_config={"quant_method": "gptq", "bits": 4, "desc_act": list(range(48))}, full_attn_mod=1),
        "field 'quantization_config' = {'quant_method': 'gptq', 'bits': 4, 'desc_act': [0, 1, 2, 3,...: quantised weights are not "
        "computed here; give the directory that they were made from.",
    ),
    "experts": (
        "llama, grouped queries", dict(num_local_experts=8, num_experts_per_tok=2),
        "field 'num_local_experts' = 8 belongs to a mixture of experts, which is not computed here.",
    ),
    "other code": (
        "llama, grouped queries", dict(auto_map={"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}),
        "auto_map says that AutoModelForCausalLM is 'modeling_mine.MineForCausalLM', code of its own beside the weights; only "
        "what transformers' llama computes is computed here.",
    ),
    "an embedding model": (
        "qwen2, biases", dict(is_causal=False, auto_map={"AutoModel": "modeling_qwen.Qwen2Model"}),
        "is_causal is false: a decoder whose tokens see what follows them is not computed here.",
    ),
    "layers of their own": (
        "llama, grouped queries", dict(per_layer_config={"0": {"intermediate_size": 96}}),
        "per_layer_config = {'0': {'intermediate_size': 96}}: only layers that are all alike are computed here.",
    ),
    "a window that only the cache has": (
        "llama, grouped queries", dict(sliding_window=64),
        "sliding_window 64: llama has no such window in its layers, but transformers cuts its cache to it; set it to null in "
        "config.json, or use a model_type that has it (mistral).",
    ),
    "an encoder and a decoder": (
        "llama, grouped queries", dict(is_encoder_decoder=True),
        "is_encoder_decoder True is not computed here; allowed: False, the default of llama.",
    ),
    "dropout": (
        "phi3, fused weights", dict(resid_pdrop=0.1), "resid_pdrop 0.1 is not computed here; allowed: 0.0, the default of phi3.",
    ),
    "angles by layer": (
        "qwen2, biases", dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        "rotary angles that differ between layers (full_attention) are not computed here.",
    ),
    "grey pictures": (
        "clip tower", dict(num_channels=1), "num_channels 1 is not computed here; allowed: 3, the default of clip_vision_model.",
    ),
    "a picture that is no square": ("siglip tower", dict(image_size=[24, 32]), "image_size [24, 32] is no square."),
    "a block that is none": ("llava 1.5", dict(text_config="llama"), "text_config 'llama' is no JSON object."),
    "a projector without biases": (
        "llava 1.5", dict(multimodal_projector_bias=False),
        "multimodal_projector_bias False is not computed here; allowed: True, the default of llava.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_would_change_the_numbers_is_refused_with_the_reason_that_matters(name, copied):  # fmt: skip
    model, fields, message = REFUSED[name]
    folder = copied(model)
    if "rope_scaling" in fields:
        edit(folder, rope_parameters=None)
    with pytest.raises(ConfigError, match=re.escape(f"{folder / 'config.json'}: {message}") + "$"):
        describe(edit(folder, **fields))


def test_a_mark_inside_a_block_of_llava_is_found_there(copied):
    folder = copied("llava 1.5")
    config = json.loads((folder / "config.json").read_text())
    for block in ("text_config", "vision_config"):
        edit(folder, **{block: config[block] | {"quantization_config": {"bits": 4}}})
        with pytest.raises(ConfigError, match=rf"config\.json: {block}: field 'quantization_config' = {{'bits': 4}}"):  # fmt: skip
            describe(folder)
        edit(folder, **{block: config[block]})


OWN_CODE = {
    "phi3, fused weights": {
        "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    },
    "llama, linear rope scaling": {"AutoModelForCausalLM": "a/b--modeling_flash_llama.LlamaForCausalLM"},
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_CODE)
def test_code_that_transformers_has_taken_over_is_no_obstacle(name, copied):
    folder = copied(name)
    before = named.lm(str(folder))
    assert named.lm(str(edit(folder, auto_map=OWN_CODE[name]))) == before


def test_the_biases_of_an_architecture_are_what_its_class_declares(copied, models, tmp_path):
    """Qwen2's three biases are no setting; Llama's attention_bias is one of all four maps, Mistral's is not declared."""
    folder = copied("qwen2, biases")
    found = named.lm(str(edit(folder, attention_bias=False)))
    assert (found.qkv_bias, found.o_bias, found.mlp_bias) == (True, False, False)
    found = named.lm(str(models("llama, wide heads, all biases")))
    assert (found.qkv_bias, found.o_bias, found.mlp_bias) == (True, True, True)
    stored = load_file(models("llama, wide heads, all biases") / "model.safetensors")
    assert found.total_params == sum(tensor.size for tensor in stored.values())
    mistral = Path(shutil.copytree(models("mistral, no window"), tmp_path / "mistral"))
    found = named.lm(str(edit(mistral, attention_bias=True, mlp_bias=True)))
    assert (found.qkv_bias, found.o_bias, found.mlp_bias) == (False, False, False)


def test_a_llava_as_the_hub_has_it_is_the_same_model(copied, caplog):
    """Transformers of the 4.36 era repeated the decoder's vocabulary at the top."""
    folder = copied("llava 1.5")
    before = describe(folder)
    config = json.loads((folder / "config.json").read_text())
    fields = dict(vocab_size=67, ignore_index=-100, torch_dtype="float16")
    edit(folder, **fields, vision_config=config["vision_config"] | {"vocab_size": 32000})
    with caplog.at_level(logging.INFO):
        assert describe(folder) == before
    assert "do not know" not in caplog.text
    assert caplog.text.count("ignore_index, vision_config.vocab_size, vocab_size.") == 1


def test_a_llava_without_vision_config_has_the_encoder_that_transformers_gives_it(copied):
    folder = copied("llava 1.5")
    edit(folder, vision_config=None)
    vit = describe(folder).vit
    assert vit is not None
    assert (vit.image_px, vit.patch_px, vit.width, vit.num_layers) == (336, 14, 1024, 24)


@pytest.mark.parametrize(("top", "text"), [(True, False), (False, True), (None, True)])
def test_the_head_of_a_llava_is_tied_where_either_level_says_so(top, text, copied):
    folder = copied("llava, siglip and qwen2, tied")
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["text_config"]["tie_word_embeddings"]
    edit(folder, text_config=config["text_config"] | {"tie_word_embeddings": text})
    edit(folder, tie_word_embeddings=top)
    if top is None:
        config = json.loads((folder / "config.json").read_text())
        config.pop("tie_word_embeddings")
        (folder / "config.json").write_text(json.dumps(config))
    found = describe(folder).lm
    assert found is not None and found.tied_embeddings
    if top:  # the case that no file of transformers' own has
        check(compare_llava(folder, answers=False))


def test_the_older_place_of_a_clip_s_settings_counts(copied):
    """Files of laion's keep vision_config_dict beside a vision_config that need not agree with it."""
    folder = copied("clip pair")
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit(folder, vision_config={"hidden_size": 64, "model_type": "clip_vision_model"}, vision_config_dict=vision)  # fmt: skip
    found = describe(folder).vit
    assert found is not None and found.width == 32
    check(compare_encoder(folder))
