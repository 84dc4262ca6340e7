"""What is wrong with a model directory is said in one line, before anything is computed or written."""

import json
import logging
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file
from test_hf_export import convert  # noqa: F401 (a fixture)
from test_hf_parity import load

from vlm_jax import train
from vlm_jax.hf import describe, directory, named
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment


@pytest.fixture
def llama(models, tmp_path):
    return Path(shutil.copytree(models("llama, grouped queries"), tmp_path / "llama"))


def edit(folder: Path, **fields) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def change(folder: Path, function) -> Path:
    """Rewrites model.safetensors after `function` changed its tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


FIELDS = {
    "quantised": (dict(quantization_config={"bits": 4}), "field 'quantization_config'"),
    "yarn": (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)), "rope_scaling of type 'yarn'"),
    "dynamic": (dict(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling of type 'dynamic'"),
    "rope sections": (
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2])), "rope field 'mrope_section'"
    ),
    "partial rotary": (
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)), "partial_rotary_factor must be 1"
    ),
    "gelu": (dict(hidden_act="gelu"), "hidden_act 'gelu' is not computed here; allowed: 'silu'"),
    "dropout": (dict(attention_dropout=0.1), "attention_dropout 0.1 is not computed here"),
    "another architecture": (dict(model_type="gpt2"), "model_type 'gpt2' is not known here; use one of llama, mistral"),
    "linear without a factor": (dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4)), "Missing required keys.*'factor'"),
    "not a config": (dict(num_attention_heads="four"), "not a valid llama config"),
    "odd heads": (dict(num_key_value_heads=3), "not divisible by num_kv_heads 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_not_computed_is_named(name, llama):
    fields, message = FIELDS[name]
    with pytest.raises(ConfigError, match=message) as error:
        named.lm(str(edit(llama, **fields)))
    assert "\n" not in str(error.value)


def test_a_field_that_is_off_or_only_bookkeeping_is_no_obstacle(llama):
    before = named.lm(str(llama))
    edit(llama, quantization_config=None, use_cache=True, torch_dtype="float16", top_k=50, pretraining_tp=1, logit_scale=None)  # fmt: skip
    assert named.lm(str(llama)) == before


LAYERS = {"one window": (["sliding_attention"] * 2, 4), "none": (["full_attention"] * 2, 0)}


@pytest.mark.parametrize("name", LAYERS)
def test_windows_are_read_layer_by_layer(name, models, tmp_path):
    kinds, window = LAYERS[name]
    folder = Path(shutil.copytree(models("qwen2, biases"), tmp_path / "qwen"))
    edit(folder, layer_types=kinds, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert named.lm(str(folder)).sliding_window == window
    edit(folder, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ConfigError, match="differ between layers"):
        named.lm(str(folder))


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def headless(folder):
    (folder / "model.safetensors").write_bytes(b"not a model at all")


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def as_pickle(folder):
    tensors = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def eight_bits(folder):
    from safetensors.torch import save_file as save

    save({"model.norm.weight": torch.ones(4, dtype=torch.float8_e4m3fn)}, folder / "model.safetensors")  # fmt: skip


def missing_layer(folder):
    change(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def one_too_many(folder):
    change(folder, lambda t: t.update({"model.layers.1.mlp.extra.weight": np.ones(3, np.float32)}))


def of_no_part(folder):
    change(folder, lambda t: t.update({"lora_A.weight": np.ones(3, np.float32)}))


def a_third_layer(folder):
    change(folder, lambda t: t.update({k.replace("layers.1", "layers.2"): v for k, v in list(t.items()) if "layers.1" in k}))  # fmt: skip


def wrong_shape(folder):
    change(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.ones((48, 31), np.float32)}))  # fmt: skip


def other_vocabulary(folder):
    edit(folder, vocab_size=99)


def the_same_twice(folder):
    change(folder, lambda t: t.update({"language_model.model.norm.weight": t["model.norm.weight"]}))


def bad_json(folder):
    (folder / "config.json").write_text("{")


def no_config(folder):
    (folder / "config.json").unlink()


DAMAGED = {
    truncated: "is truncated or damaged", headless: "is truncated or damaged", without_weights: r"has no \*.safetensors file",
    as_pickle: "a pickle, which can run code.*--from-bin", eight_bits: "has dtype F8_E4M3.*Dequantise",
    missing_layer: "missing model.layers.1.mlp.up_proj.weight", one_too_many: "no parameter takes model.layers.1.mlp.extra.weight",
    of_no_part: "tensors of no known part of a model: lora_A.weight",
    a_third_layer: "no parameter takes model.layers.2.input_layernorm.weight, .*q_proj",
    wrong_shape: r"up_proj.weight has shape \[48, 31\], which does not make lm/layers/mlp/up/kernel \[32, 48\]",
    other_vocabulary: r"embed_tokens.weight has shape \[67, 32\]", the_same_twice: "are the same weight twice",
    bad_json: "is no valid JSON", no_config: "has no config.json",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda f: f.__name__)
def test_damage_is_named_in_one_line(damage, llama):
    damage(llama)
    with pytest.raises(ConfigError, match=DAMAGED[damage]) as error:
        load(llama, ("lm",))
    assert "\n" not in str(error.value)


def test_a_shard_that_is_missing_or_is_not_what_the_index_says_is_named(models, tmp_path):
    folder = Path(shutil.copytree(models("llama, many shards"), tmp_path / "shards"))
    index = folder / directory.INDEX
    content = json.loads(index.read_text())
    first = sorted(set(content["weight_map"].values()))[0]
    (folder / first).rename(folder / "away")
    with pytest.raises(ConfigError, match=rf"lacks 1 of \d+ weight files.*{first}"):
        load(folder, ("lm",))
    (folder / "away").rename(folder / first)
    name = next(iter(content["weight_map"]))
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"model.ghost": first}}))
    with pytest.raises(ConfigError, match=r"disagree about model\.ghost"):
        load(folder, ("lm",))
    index.write_text(json.dumps({"weight_map": {name: "../" + first}}))
    with pytest.raises(ConfigError, match="outside its directory"):
        load(folder, ("lm",))


def test_a_stored_head_must_be_the_table_it_is_tied_to(models, tmp_path):
    folder = Path(shutil.copytree(models("llama, tied, odd vocabulary"), tmp_path / "tied"))
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    load(folder, ("lm",))
    change(folder, lambda t: t["lm_head.weight"].__setitem__((3, 4), 7.0))
    with pytest.raises(ConfigError, match=r"ties the embeddings, but lm_head\.weight differs"):
        load(folder, ("lm",))


def test_values_that_are_not_numbers_are_a_warning_that_names_them(llama, caplog):
    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.nan
        tensors["model.norm.weight"][0] = np.inf

    change(llama, poison)
    with caplog.at_level(logging.WARNING):
        load(llama, ("lm",))
    assert "NaN or infinite values in lm/final_norm/scale, lm/layers/mlp/up/kernel" in caplog.text


def test_parameters_have_the_dtype_that_the_config_says(llama):
    _, params = load(llama, ("lm",))
    assert params["lm"]["embed"].dtype == np.float32
    from vlm_jax import sharding
    from vlm_jax.compressors import settings as compressor_settings
    from vlm_jax.settings.model import VLMConfig
    from vlm_jax.settings.run import MeshConfig
    from vlm_jax.storage import weights

    lm = named.lm(str(llama), param_dtype="bfloat16")
    config = VLMConfig(named.vit("mini"), compressor_settings("identity"), lm)
    wanted = weights.abstract(config, sharding.make_mesh(MeshConfig()))
    half = weights.load(str(llama), config, {"lm": wanted["lm"]})["lm"]["embed"]
    np.testing.assert_array_equal(half, params["lm"]["embed"].astype(ml_dtypes.bfloat16))


class Attack:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_weights_are_converted_on_request_and_never_run(llama, tmp_path, convert):  # noqa: F811
    before = load_file(llama / "model.safetensors")
    as_pickle(llama)
    assert convert("--from-bin", llama, tmp_path / "safe") == 0
    after = load_file(tmp_path / "safe" / "pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    load(tmp_path / "safe", ("lm",))

    torch.save({"x": Attack(str(tmp_path / "hacked"))}, llama / "pytorch_model.bin")
    assert convert("--from-bin", llama, tmp_path / "evil") == 2
    assert not (tmp_path / "hacked").exists()
    assert not list((tmp_path / "evil").glob("*.safetensors"))


def test_a_directory_that_is_evaluated_must_be_converted_first(llama):
    with pytest.raises(ConfigError, match=r"not a run; convert it first: scripts/convert_hf\.py"):
        experiment.read(llama)


def test_settings_of_another_model_than_the_weights_are_refused(llama, models):
    """Same shapes, other numbers: the worst mistake, because nothing would crash."""
    config, _ = load(llama, ("lm",))
    describe.check_agrees(str(llama), "lm", config)
    edit(llama, rope_parameters=dict(rope_type="default", rope_theta=5e5))
    with pytest.raises(ConfigError, match=r"rope_theta 500000.0, but model.lm says 10000.0; set --config.model.lm.preset="):  # fmt: skip
        describe.check_agrees(str(llama), "lm", config)


@pytest.mark.slow
def test_a_stage_trains_from_downloaded_directories(models, tmp_path):
    """Encoder and decoder by path, the encoder frozen and held in bfloat16; mistakes are told before jax starts."""
    folder, clip, llama = tiny.write(tmp_path / "data"), models("clip tower"), models("llama, grouped queries")  # fmt: skip
    config = tiny.config(folder, num_steps=2)
    config.model.vit = tiny.default.model().vit
    config.model.lm = tiny.default.model().lm
    config.model.vit.update({"preset": str(clip), "param_dtype": "bfloat16", "dtype": "float32"})
    config.model.lm.update({"preset": str(llama), "dtype": "float32", "remat": "none"})
    config.model.compressor.update({"stride": 3, "num_heads": 4})
    config.init.update({"vit": str(clip), "lm": str(llama)})
    final = train.train(config, str(tmp_path / "run"))
    assert final["step"] == 2 and np.isfinite(final["loss"])
    assert experiment.read(tmp_path / "run").model.vit.param_dtype == "bfloat16"

    config.optim.trainable = "."
    with pytest.raises(ConfigError, match=r"vit/.* is trained, but stored as bfloat16"):
        train.train(config, str(tmp_path / "other"))
    config.optim.trainable = "^projector/"
    config.init.projector = str(llama)
    with pytest.raises(ConfigError, match="holds no projector; it holds lm"):
        train.train(config, str(tmp_path / "other"))
