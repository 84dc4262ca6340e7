"""config.json of a run: whoever reads it from another folder finds the tokenizer."""

import tiny

from vlm_jax.storage import run as experiment
from vlm_jax.training import inputs


def test_a_relative_tokenizer_is_kept_with_its_whole_path(tmp_path, monkeypatch):
    world = tiny.write(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    cfg = tiny.config(world)
    cfg.data.tokenizer = "data/tokenizer"
    exp = experiment.resolve(cfg)
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    experiment.write(exp, tmp_path / "run")
    assert experiment.read(tmp_path / "run").data.tokenizer == str(tmp_path / "data" / "tokenizer")
    inputs.check_same(exp, tmp_path / "run")  # the same command resumes it
    assert experiment.whole("") == ""  # of a model without one
