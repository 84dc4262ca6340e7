"""Checkpoints leave out what is frozen and lies elsewhere; every use of the run finds it there, or says in one line that it is gone."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import eval as eval_config
from vlm_jax import evaluate, sharding, train
from vlm_jax.hf import export
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import frozen, weights
from vlm_jax.storage import run as experiment
from vlm_jax.storage.checkpoint import saved_names
from vlm_jax.training.telemetry import read_lines


def config(world, source, trainable="^projector/", **fields):
    cfg = tiny.config(world, **fields)
    with cfg.unlocked():
        cfg.init["from"] = str(source)
    cfg.optim.trainable = trainable
    return cfg


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """DIR/base learns all but the encoder; DIR/second only its projector, from base; DIR/third its compressor, from second."""
    root = tmp_path_factory.mktemp("frozen")
    world = tiny.write(root / "world")
    train.train(tiny.config(world), str(root / "base"))
    train.train(config(world, root / "base"), str(root / "second"))
    train.train(config(world, root / "second", "^compressor/"), str(root / "third"))
    return root


def params(run):
    exp = experiment.read(run)
    wanted = weights.abstract(exp.model, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    loaded = weights.load(str(run), exp.model, wanted)
    return {name: np.asarray(x) for name, x in flatten_dict(loaded, sep="/").items()}


def parts(names):
    return {name.split("/")[0] for name in names}


def test_a_checkpoint_holds_what_was_trained_and_a_random_part_that_nothing_else_holds(runs):
    assert parts(saved_names(runs / "base")) == {"vit", "compressor", "projector", "lm"}
    assert parts(saved_names(runs / "second")) == {"projector"}
    assert parts(saved_names(runs / "third")) == {"compressor"}
    sources = {leaf.source for leaf in frozen.read(runs / "third").values()}
    assert sources == {str(runs / "base"), str(runs / "second")}  # not by way of second


def test_the_parameters_of_a_run_are_those_of_one_that_saves_everything(runs, tmp_path):
    cfg = config(runs / "world", runs / "base", save_frozen=True)
    train.train(cfg, str(tmp_path / "whole"))
    assert not (tmp_path / "whole" / "frozen.json").exists()
    whole, second, base = params(tmp_path / "whole"), params(runs / "second"), params(runs / "base")
    assert whole.keys() == second.keys()
    for name, x in whole.items():
        np.testing.assert_array_equal(x, second[name])
        assert (name.startswith("projector/")) == (not np.array_equal(x, base[name]))


def test_what_a_model_directory_holds_is_read_there_parameter_by_parameter(runs, tmp_path):
    base = params(runs / "base")
    lm = {name: x for name, x in base.items() if name.startswith("lm/")}
    tree, config_of = unflatten_dict(lm, sep="/"), experiment.read(runs / "base").model
    export.standalone(tmp_path / "lm", "lm", tree, config_of, export.Companions(None, None, None))
    cfg = config(runs / "world", runs / "base", "^projector/|^lm/layers/attn")
    cfg.init.lm = str(tmp_path / "lm")
    train.train(cfg, str(tmp_path / "run"))
    left_out = frozen.read(tmp_path / "run")
    inside = {name for name, leaf in left_out.items() if leaf.source == str(tmp_path / "lm")}
    assert inside == {name for name in lm if not name.startswith("lm/layers/attn")}
    found = params(tmp_path / "run")
    for name in inside:
        np.testing.assert_array_equal(found[name], base[name])
    assert not np.array_equal(found["lm/layers/attn/q/kernel"], base["lm/layers/attn/q/kernel"])


def test_a_resumed_run_goes_on_to_the_same_metrics(runs, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(runs / "second", again)
    shutil.rmtree(again / "checkpoints" / "6")
    (again / "final.json").unlink()
    train.train(config(runs / "world", runs / "base"), str(again))
    assert read_lines(again / "metrics.jsonl") == read_lines(runs / "second" / "metrics.jsonl")
    # From now on with everything in it.
    shutil.rmtree(again / "checkpoints" / "6")
    (again / "final.json").unlink()
    train.train(config(runs / "world", runs / "base", save_frozen=True), str(again))
    assert parts(saved_names(again)) == {"vit", "compressor", "projector", "lm"}
    jax.tree.map(np.testing.assert_array_equal, params(again), params(runs / "second"))


def test_it_is_asked_and_evaluated_as_any_other_also_when_all_of_it_moved(runs, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(runs, moved)
    hidden = runs.with_name("hidden")
    runs.rename(hidden)
    try:
        cfg = eval_config.get_config()
        cfg.eval.update(
            {"checkpoint": str(moved / "third"), "benchmarks": ("llava",), "annotations": (str(moved / "world"),),
             "batch_size": 4, "max_new_tokens": 3}
        )  # fmt: skip
        tokens = moved / "third" / "config.json"
        saved = json.loads(tokens.read_text())
        saved["data"]["tokenizer"] = str(moved / "world" / "tokenizer")
        tokens.write_text(json.dumps(saved))
        assert evaluate.evaluate(cfg, str(tmp_path / "eval"))[0]["n"] == 14
        shutil.rmtree(moved / "base")
        with pytest.raises(
            ConfigError,
            match=r"does not hold its frozen \w+, which came from '.*base', and that is gone",
        ):
            params(moved / "third")
    finally:
        hidden.rename(runs)


def test_a_source_that_was_trained_again_is_noticed(runs, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(runs / "second", moved / "second")
    shutil.copytree(runs / "base", moved / "base")
    known = json.loads((moved / "second" / "frozen.json").read_text())
    name = next(name for name in known["leaves"] if name.startswith("lm/"))
    known["leaves"][name]["sum"][1] ^= 1
    (moved / "second" / "frozen.json").write_text(json.dumps(known))
    with pytest.raises(ConfigError, match=r"was trained with another lm than '.*base' holds now"):
        params(moved / "second")
    with pytest.raises(ConfigError, match="was trained with another lm"):
        shutil.rmtree(moved / "second" / "checkpoints" / "6")
        train.train(config(runs / "world", runs / "base"), str(moved / "second"))
    (moved / "second" / "frozen.json").write_text('{"format": 1, "leaves": {"lm/embed": {}}}')
    with pytest.raises(ConfigError, match=r"frozen\.json is damaged"):
        params(moved / "second")
