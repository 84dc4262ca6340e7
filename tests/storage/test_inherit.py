"""A run that starts from another one takes its model, tokenizer and template; what contradicts it is named."""

import copy
import dataclasses
import json

import pytest
import tiny

from configs import default, stage2, stage2_lora
from vlm_jax import train
from vlm_jax.hf import named
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment
from vlm_jax.training import inputs


@pytest.fixture
def data(tmp_path):
    return tiny.write(tmp_path / "data")


@pytest.fixture
def run(data, tmp_path):
    """The workdir of a finished stage of the tiny model, without its training."""
    config = tiny.config(data)
    config.model.compressor.taps = (0, 1)
    config.data.template, config.data.query, config.data.max_query_tokens = "plain", "last_turn", 5
    experiment.write(experiment.resolve(config), experiment.open_workdir(str(tmp_path / "run")))
    (tmp_path / "run" / "checkpoints" / "6").mkdir(parents=True)
    return tmp_path / "run"


def starting(run, config=stage2):
    c = config.get_config()
    c.init["from"] = str(run)
    return c


def test_init_from_brings_model_tokenizer_template_and_question(run):
    before, now = experiment.read(run), experiment.resolve(starting(run))
    assert now.model == before.model
    for name in ("tokenizer", "template", "system", "query", "max_query_tokens"):
        assert getattr(now.data, name) == getattr(before.data, name)
    assert now.init.sources == dict.fromkeys(("vit", "compressor", "projector", "lm"), str(run))
    # What belongs to the stage is not taken over.
    assert (now.data.batch_size, now.data.max_tokens, now.data.annotations) == (128, 2048, ())
    assert now.optim == experiment.resolve(stage2.get_config()).optim


def test_what_is_only_how_it_is_computed_may_differ_from_the_run(run):
    config = starting(run, stage2_lora)
    config.model.vit.dtype = "float16"
    now, before = experiment.resolve(config).model, experiment.read(run).model
    assert (now.lm.lora_rank, now.lm.param_dtype, now.vit.dtype) == (128, "bfloat16", "float16")
    same = dict(lora_rank=0, lora_alpha=16.0, param_dtype="float32")
    assert dataclasses.replace(now.lm, **same) == before.lm
    assert dataclasses.replace(now.vit, dtype="float32") == before.vit


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model.compressor.taps", (1, 2), "model.compressor.taps = (0, 1), now (1, 2)"),
        ("model.compressor.name", "pool", "model.compressor.name = 'tokenpacker', now 'pool'"),
        ("model.vit.mean", (0.1, 0.2, 0.3), "model.vit.mean = (0.5, 0.5, 0.5), now (0.1, 0.2, 0.3)"),
        ("model.lm.rope_theta", 5.0, "model.lm.rope_theta = 10000.0, now 5.0"),
        ("model.lm.rope_scaling.kind", "linear", "model.lm.rope_scaling = RopeScaling(kind='none'"),
        ("model.projector_norm", "none", "model.projector_norm = 'rms', now 'none'"),
        ("model.lm.preset", "mini-82k", "model.lm.width = 16, but model.lm.preset 'mini-82k' has 64"),
        ("data.template", "chatml", "data.template = 'plain', now 'chatml'"),
        ("data.query", "none", "data.query = 'last_turn', now 'none'"),
    ],
)  # fmt: skip
def test_a_field_that_contradicts_the_run_is_named_with_both_values(run, field, value, said):
    config = starting(run)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError) as caught:
        experiment.resolve(config, [field])
    assert f"init.from: '{run}' was trained with {said}" in str(caught.value)
    assert "take the parts one by one" in str(caught.value) and "\n" not in str(caught.value)


def test_a_flag_contradicts_the_run_also_where_it_repeats_the_default(run):
    config = starting(run)
    assert config.data.template == default.get_config().data.template == "vicuna_v1"
    assert experiment.resolve(config).data.template == "plain"
    with pytest.raises(ConfigError, match=r"data.template = 'plain', now 'vicuna_v1'"):
        experiment.resolve(config, ["data.template"])


def test_fields_that_repeat_the_run_s_values_are_fine(run, data, tmp_path):
    config = tiny.config(data)
    config.init["from"] = str(run)
    config.model.compressor.taps = (0, 1)
    config.data.template, config.data.query, config.data.max_query_tokens = "plain", "last_turn", 5
    assert experiment.resolve(config).model == experiment.read(run).model
    (data / "tokenizer").rename(tmp_path / "moved")  # the same vocabulary under another path
    (data / "tokenizer").mkdir()
    for file in (tmp_path / "moved").iterdir():
        (data / "tokenizer" / file.name).write_bytes(file.read_bytes())
    config.data.tokenizer = str(tmp_path / "moved")
    assert experiment.resolve(config).data.tokenizer == str(tmp_path / "moved")


def test_another_vocabulary_contradicts_the_run(run, tmp_path):
    tiny.write_tokenizer(tmp_path / "other", ["one", "more", "word"])
    config = starting(run)
    config.data.tokenizer = str(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"with data.tokenizer = '.*tokenizer', now '.*other'"):
        experiment.resolve(config)


@pytest.mark.parametrize(
    ("part", "field", "value", "said"),
    [
        ("compressor", "model.compressor.taps", (1, 2), "model.compressor.taps = (0, 1), now (1, 2)"),
        ("vit", "model.vit.std", (1.0, 1.0, 1.0), "model.vit.std = (0.5, 0.5, 0.5), now (1.0, 1.0, 1.0)"),
        ("lm", "model.lm.norm_eps", 1e-5, "model.lm.norm_eps = 1e-06, now 1e-05"),
        ("projector", "model.projector_norm", "none", "model.projector_norm = 'rms', now 'none'"),
    ],
)  # fmt: skip
def test_a_part_that_would_be_read_otherwise_than_its_run_did_is_refused(
    run, data, part, field, value, said
):
    """All of these have equal shapes: nothing else would notice."""
    config = tiny.config(data)
    config.model.compressor.taps = (0, 1)
    config.init[part] = str(run)
    inputs.check_inputs(experiment.resolve(config))
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError) as caught:
        inputs.check_inputs(experiment.resolve(config))
    assert f"init.{part}: '{run}' was trained with {said}; give the run's value, or" in str(
        caught.value
    )
    assert f"--config.init.from={run} alone" in str(caught.value)


def test_init_from_names_a_run_that_has_a_checkpoint(run, tmp_path):
    with pytest.raises(ConfigError, match=r"init: from '.*none' has no finished checkpoint"):
        experiment.resolve(starting(tmp_path / "none"))


def test_the_settings_that_were_taken_over_are_saved_and_resume(run, data, tmp_path):
    config = starting(run)
    config.data.annotations = (str(data / "data.json"),)
    config.data.image_roots = (str(data),)
    exp, second = experiment.resolve(config), tmp_path / "second"
    second.mkdir()
    experiment.write(exp, second)
    (second / "checkpoints" / "3").mkdir(parents=True)
    assert experiment.read(second) == exp
    inputs.check_same(experiment.resolve(copy.deepcopy(config)), second)
    saved = json.loads((second / "config.json").read_text())
    assert saved["init"]["run"] == str(run) and saved["model"]["lm"]["width"] == 16


def test_a_tap_that_this_encoder_does_not_have_names_the_field_and_taps_that_it_has():
    config = default.get_config()
    config.model.vit.preset = "mini"
    with pytest.raises(ConfigError) as caught:
        named.vlm(config.model.to_dict())
    assert str(caught.value) == (
        "quecc: model.compressor.taps (12, 16, 22, 23): 12 is not a hidden state up to this encoder's feature layer (0..2); "
        "for example --config.model.compressor.taps=(1, 2) (evenly spaced), or () for the feature alone."
    )


@pytest.mark.parametrize("kind", ["lm", "vit", "init", "tokenizer"])
def test_a_hub_name_is_answered_with_the_command_that_fetches_it(kind, data):
    config = tiny.config(data)
    name = "Qwen/Qwen1.5-0.5B"
    if kind in ("lm", "vit"):
        config.model[kind].preset = name
    elif kind == "init":
        config.init.lm = name
    else:
        config.data.tokenizer = name
    with pytest.raises(ConfigError) as caught:
        inputs.check_inputs(experiment.resolve(config))
    assert "`hf download Qwen/Qwen1.5-0.5B --local-dir Qwen1.5-0.5B` fetches it" in str(
        caught.value
    )
    config = tiny.config(data)
    config.data.tokenizer = f"{data}/nowhere"  # a path, not a name
    with pytest.raises(ConfigError) as caught:
        inputs.check_inputs(experiment.resolve(config))
    assert "hf download" not in str(caught.value)


def test_the_command_tells_a_contradiction_in_one_line(run, data, tmp_path, capsys):
    """Also where the flag repeats what configs/default.py says: the command line is known."""
    words = ["--config=stage2", f"--workdir={tmp_path}/next", f"--config.init.from={run}"]
    words += [f"--config.data.annotations={data}/data.json", f"--config.data.image_roots={data}"]
    assert train.main([*words, "--config.data.template=vicuna_v1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: init.from: ") and said.count("\n") == 1
    assert "data.template = 'plain', now 'vicuna_v1'" in said
    assert not (tmp_path / "next").exists()
