"""A compressor is one file and one line: the one of tests/helpers/toy_compressor.py, with nothing said of it elsewhere."""

import json

import jax
import numpy as np
import pytest
import tiny
import toy_compressor

from configs import eval as eval_config
from vlm_jax import compressors, evaluate, sharding, show, train
from vlm_jax.compressors import COMPRESSORS
from vlm_jax.hf import export
from vlm_jax.hf.describe import describe
from vlm_jax.laws import table
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment
from vlm_jax.storage import weights


@pytest.fixture(autouse=True, scope="module")
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMPRESSORS, "scaled", toy_compressor.ScaledConfig)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of data and, in `run`, a model with the compressor, trained for two steps."""
    directory = tiny.write(tmp_path_factory.mktemp("world") / "data")
    cfg = tiny.config(directory, num_steps=2, save_every=2)
    compressors.choose(cfg.model.compressor, "scaled", stride=1, gain=0.5)
    cfg.model.projector_norm = "none"  # as in a release
    train.train(cfg, str(directory.parent / "run"))
    return directory


def test_it_trains_and_its_run_keeps_its_own_settings_alone(world):
    saved = json.loads((world.parent / "run" / "config.json").read_text())["model"]["compressor"]
    assert saved == {"name": "scaled", "dtype": "float32", "stride": 1, "gain": 0.5}
    run = experiment.read(world.parent / "run").model
    assert run.compressor == toy_compressor.ScaledConfig(stride=1, gain=0.5)
    assert compressors.sizable()[-1] == "scaled"
    scale = read(world, run)["compressor"]["scale"]
    assert scale.shape == (8,) and (scale != 0.5).all() and np.abs(scale - 0.5).max() < 0.1


def read(world, model) -> dict:
    wanted = weights.abstract(model, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    parts = {part: wanted[part] for part in ("compressor", "projector")}
    return jax.device_get(weights.load(str(world.parent / "run"), model, parts))


def test_it_answers_with_as_many_tokens_as_are_asked_for(world, tmp_path):
    cfg = eval_config.get_config()
    cfg.eval.update(
        {
            "checkpoint": str(world.parent / "run"), "benchmarks": ("llava",), "annotations": (str(world),),
            "batch_size": 4, "max_new_tokens": 2, "visual_tokens": 1,
        }
    )  # fmt: skip
    evaluate.evaluate(cfg, str(tmp_path))
    (row,) = table.read(tmp_path / "errors.csv")
    assert (row.compressor, row.visual_tokens, row.n) == ("scaled", 1, 14)


def test_it_goes_out_and_comes_back_as_its_release_stores_it(world, tmp_path):
    model = experiment.read(world.parent / "run").model
    own = read(world, model)
    bare = export.Companions(None, None, None)
    export.standalone(tmp_path / "out", "reference", own, model, bare, encoder_name="clip-l-336")
    assert describe(tmp_path / "out").compressor == toy_compressor.ScaledConfig(stride=1)
    wanted = weights.abstract(model, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    back = weights.load(str(tmp_path / "out"), model, {part: wanted[part] for part in own})
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), own)


def test_it_is_drawn_and_a_wrong_setting_names_its_own_ones(world, tmp_path, capsys):
    picture = next((world / "images").glob("*.png"))
    words = [f"--config.eval.checkpoint={world.parent / 'run'}", "--config.eval.max_new_tokens=2"]
    out = tmp_path / "drawn.png"
    assert show.main(["--config=configs/eval.py", *words, str(picture), "--question", "What ?", f"--out={out}"]) == 0  # fmt: skip
    assert out.stat().st_size > 1000
    chosen = ["--config=configs/stage1.py", f"--workdir={tmp_path / 'x'}", "--config.model.compressor.name=scaled"]  # fmt: skip
    capsys.readouterr()
    for wrong, told in {
        "query_grid=3": "scaled: has no setting 'query_grid'; it has dtype, stride, gain.",
        "gian=3": "scaled: has no setting 'gian'; it has dtype, stride, gain.",
        "gain=much": "scaled: gain must be one float, got 'much'.",
        "taps=(1,2)": "scaled: has no setting 'taps'; it has dtype, stride, gain.",
    }.items():
        assert train.main([*chosen, f"--config.model.compressor.{wrong}"]) == 2
        assert capsys.readouterr().err == f"error: {told}\n"


# What an older config.json holds: the settings of all compressors, at the values of its config file.
OLDER = {
    "name": "pool", "stride": 2, "num_heads": 4, "taps": [12, 16, 22, 23], "norm_eps": 1e-6, "dtype": "bfloat16",
    "visual_tokens": 0, "train_tokens": [], "query_grid": 16, "key_source": "positions", "query_layers": -1,
    "prune_ratio": "adaptive", "fixed_ratio": 0.125, "max_kept": 0, "neighbours": 32, "sample_last": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ["identity", "quecc", "pool", "m3", "mqt", "prumerge_plus"])
def test_an_older_run_is_read_with_the_settings_of_its_own_compressor(tmp_path, name):
    run = experiment.resolve(tiny.config(tmp_path))
    experiment.write(run, tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["model"]["compressor"] = OLDER | {"name": name}
    saved["model"]["vit"] |= {"num_layers": 24, "feature_layer": -1, "image_px": 64}
    path.write_text(json.dumps(saved))
    found = experiment.read(tmp_path).model.compressor
    assert found.name == name and found.dtype == "bfloat16"
    own = {
        "identity": {},
        "quecc": {"stride": 2, "taps": (12, 16, 22, 23), "num_heads": 4, "query_layers": -1},
    }
    own |= {
        "pool": {"stride": 2},
        "m3": {"visual_tokens": 0},
        "mqt": {"query_grid": 16, "num_heads": 4},
    }
    own |= {"prumerge_plus": {"neighbours": 32, "sample_last": True}}
    assert vars(found).items() >= own[name].items()
    saved["model"]["compressor"] |= {"strid": 3}
    path.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=f"{name}: has no setting 'strid'; it has dtype"):
        experiment.read(tmp_path)
