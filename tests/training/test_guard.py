"""NaN and infinity: what stays, what is told, when a run ends."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax import sharding, train
from vlm_jax.data import pipeline
from vlm_jax.settings.checks import ConfigError, RunEnded
from vlm_jax.storage import run as experiment
from vlm_jax.training import guard, loop, step
from vlm_jax.training.telemetry import read_lines

BAD_STEP = 4  # counted from 1


def poison(monkeypatch):
    """The loss of step BAD_STEP becomes NaN, its gradients too."""
    make_loss = step.make_loss

    def poisoned(*settings):
        loss_of_batch = make_loss(*settings)

        def loss_of(params, batch, taken, *frozen):
            loss, scalars = loss_of_batch(params, batch, taken, *frozen)
            return loss * jnp.where(taken == BAD_STEP - 1, jnp.nan, 1.0), scalars

        return loss_of

    monkeypatch.setattr(step, "make_loss", poisoned)


def test_what_is_finite_is_taken_bit_for_bit_and_counters_go_on():
    new = {"w": jnp.array([0.1, -0.0, 1e-42]), "count": jnp.int32(3)}
    old = {"w": jnp.array([9.0, 9.0, 9.0]), "count": jnp.int32(2)}
    kept = jax.jit(guard.keep_finite)(jnp.bool_(True), new, old)
    np.testing.assert_array_equal(kept["w"].view(jnp.int32), new["w"].view(jnp.int32))
    left = guard.keep_finite(jnp.bool_(False), new | {"w": new["w"] * jnp.nan}, old)
    np.testing.assert_array_equal(left["w"], old["w"])
    assert int(kept["count"]) == int(left["count"]) == 3


@pytest.mark.parametrize(
    ("loss", "norm", "ok"),
    [(1.0, 2.0, True), (np.nan, 2.0, False), (1.0, np.inf, False), (-np.inf, 0.0, False)],
)
def test_loss_and_gradient_must_both_be_finite(loss, norm, ok):
    assert bool(guard.is_finite(jnp.float32(loss), jnp.float32(norm))) is ok


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_no_weight_and_the_others_no_bit(tmp_path, monkeypatch):
    config = tiny.config(tiny.write(tmp_path / "data"))
    config.optim.trainable = "^(compressor|projector)/"
    exp = experiment.resolve(config)
    plan = step.plan(exp, sharding.make_mesh(exp.mesh), 6)
    batch = sharding.put(next(pipeline.train_iterator(exp.data, 1, exp.model.vit)), plan.mesh)
    poison(monkeypatch)

    def states(number):
        state, found = step.fresh_state(plan), []
        update = step.make_step(plan)
        with sharding.use(plan.mesh):
            for _ in range(number):
                state, scalars = update(state, batch)
                found.append((jax.tree.map(np.array, state), bool(scalars["skipped"])))
        return found

    found = states(BAD_STEP + 1)
    assert [skipped for _, skipped in found] == [False, False, False, True, False]
    before, bad, after = (state for state, _ in found[2:])
    jax.tree.map(np.testing.assert_array_equal, before.trainable, bad.trainable)
    assert int(bad.step) == BAD_STEP
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    kernel = [s.trainable["projector"]["dense_0"]["kernel"] for s in (bad, after)]
    assert not np.array_equal(*kernel)

    monkeypatch.setattr(guard, "keep_finite", lambda ok, new, old: new)
    jax.tree.map(np.testing.assert_array_equal, before, states(BAD_STEP - 1)[-1][0])


@pytest.mark.slow
def test_a_run_stops_with_the_records_named_and_goes_on_when_told_to_skip(tmp_path, monkeypatch):
    poison(monkeypatch)
    config = tiny.config(tiny.write(tmp_path / "data"), num_steps=6, save_every=3, log_every=100)
    config.optim.trainable = "^(compressor|projector)/"
    workdir = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"step 4: loss nan, gradient norm nan; .*nonfinite_4"):
        train.train(config, str(workdir))
    assert experiment.last_step(workdir) == 3  # step 6, after the bad one, was not saved
    assert not (workdir / "final.json").exists()
    told = json.loads((workdir / "nonfinite_4.json").read_text())
    exp = experiment.resolve(config)
    iterator = pipeline.train_iterator(exp.data, 1, exp.model.vit)
    ids = [next(iterator)["ids"] for _ in range(4)]
    assert told["ids_of_each_process"] == [ids[3]] and told["step"] == 4
    assert np.isnan(told["loss"]) and told["config"] == "config.json"

    config.train.on_nonfinite, config.train.max_skipped = "skip", 1
    final = train.train(config, str(workdir))
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert np.isnan(lines[3]["loss"]) and np.isfinite(final["loss"])
    assert [line["lr"] for line in lines][-1] == final["lr"] > 0


@pytest.mark.parametrize(
    ("policy", "limit", "skipped", "stops"),
    [("stop", 5, 1, True), ("skip", 5, 5, False), ("skip", 5, 6, True), ("skip", 0, 1, True)],
)
def test_one_step_too_many_stops_the_run(tmp_path, policy, limit, skipped, stops):
    config = tiny.config(tmp_path, on_nonfinite=policy, max_skipped=limit)
    watch = guard.Guard(experiment.resolve(config).train, tmp_path)
    line = {"step": 7, "loss": float("inf"), "grad_norm": 1.0, "skipped": skipped}
    if stops:
        with pytest.raises(ConfigError, match=r"step 7: loss inf, gradient norm 1\.0"):
            watch.notice(line, ["a", "b"])
    else:
        watch.notice(line, ["a", "b"])
    assert json.loads((tmp_path / "nonfinite_7.json").read_text())["loss"] == float("inf")


@pytest.mark.parametrize(
    ("second", "raised"),
    [(ConfigError("the disk"), ConfigError), (RunEnded("the peer", exit_code=1), RunEnded)],
)
def test_an_error_in_closing_is_logged_and_the_first_one_is_told(second, raised, caplog):
    """As a RunEnded where closing found that something is gone, so that the process does not wait for it at its exit."""

    class Saving:
        def close(self):
            raise second

    with pytest.raises(raised, match=r"^the records$") as told, loop._closing(Saving()):
        raise ConfigError("the records")
    assert f"also: {second}" in caplog.text
    assert getattr(told.value, "exit_code", 2) == 2
