"""The held-out loss: what it is, that it changes nothing, and the parameters it keeps."""

import json

import jax
import numpy as np
import pytest
import tiny

from vlm_jax import sharding, train
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment
from vlm_jax.storage import weights
from vlm_jax.storage.checkpoint import load_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("data") / "tiny")


def config(folder, **train_fields):
    c = tiny.config(folder, **train_fields)
    c.data.batch_size = 10  # every record in every batch
    return c


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_on_the_training_records_it_is_the_training_loss(folder, tmp_path):
    c = config(folder, num_steps=3, validate_every=1)
    c.optim.learning_rate = 1e-12
    c.train.validation = c.data.annotations
    train.train(c, str(tmp_path))
    for line in lines(tmp_path):
        assert line["validation_loss"] == pytest.approx(line["loss"], rel=1e-5)


def test_it_is_measured_every_so_many_steps_and_changes_nothing(folder, tmp_path):
    plain, held = config(folder, num_steps=5), config(folder, num_steps=5, validate_every=2)
    held.train.validation, held.train.keep_best = held.data.annotations, True
    train.train(plain, str(tmp_path / "plain"))
    final = train.train(held, str(tmp_path / "held"))
    both = lines(tmp_path / "plain"), lines(tmp_path / "held")
    assert [line["loss"] for line in both[0]] == [line["loss"] for line in both[1]]
    measured = {line["step"]: line["validation_loss"] for line in both[1] if "validation_loss" in line}  # fmt: skip
    assert set(measured) == {2, 4, 5} and final["validation_loss"] == measured[5]
    best = min(measured, key=lambda step: measured[step])
    assert experiment.last_step(tmp_path / "held" / "best") == best == 5
    exp = experiment.resolve(held)
    wanted = weights.abstract(exp.model, sharding.make_mesh(exp.mesh))
    pair = (load_params(tmp_path / "held" / name, wanted) for name in ("", "best"))
    jax.tree.map(np.testing.assert_array_equal, *pair)


def test_wrong_settings_are_refused_before_the_run(folder, tmp_path):
    c = config(folder)
    c.train.keep_best = True
    with pytest.raises(
        ConfigError, match=r"keep_best needs a held-out loss; set train\.validation"
    ):
        train.train(c, str(tmp_path))
    c.train.validation = (str(folder / "none.json"),)
    with pytest.raises(ConfigError, match=r"none\.json' does not exist; give the path of held-out"):
        train.train(c, str(tmp_path))
