"""One training stage: what it learns, what it leaves alone, what it says about mistakes."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax import sharding, train
from vlm_jax.data import pipeline
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import InitConfig
from vlm_jax.storage import run as experiment
from vlm_jax.storage.checkpoint import load_params
from vlm_jax.training import inputs, loop, losses, optim, step, telemetry

ROOT = Path(__file__).parents[1]
STEPS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def overfitted(folder):
    """(plan, first state on the host, last state, scalars of all steps, times compiled): STEPS steps on one batch."""
    config = tiny.config(folder, num_steps=STEPS)
    config.optim.warmup_ratio = 0.05
    exp = experiment.resolve(config)
    plan = step.plan(exp, sharding.make_mesh(exp.mesh), STEPS)
    state = step.fresh_state(plan)
    before = jax.tree.map(np.array, step.to_saved(state))
    iterator = pipeline.train_iterator(exp.data, 1, exp.model.vit)
    batch, update, found = sharding.put(next(iterator), plan.mesh), step.make_step(plan), []
    iterator.close()
    with sharding.use(plan.mesh):
        for _ in range(STEPS):
            state, scalars = update(state, batch)
            found.append({name: float(value) for name, value in scalars.items()})
    return plan, before, state, found, update._cache_size()


def test_a_tiny_batch_is_learnt_by_heart_with_one_compilation(overfitted):
    _, _, state, scalars, compilations = overfitted
    assert scalars[0]["loss"] == pytest.approx(
        np.log(64), rel=0.05
    )  # untrained: as good as uniform over 64 words
    assert scalars[-1]["loss"] < 0.02 and scalars[-1]["accuracy"] == 1
    assert compilations == 1 and int(state.step) == STEPS


def test_frozen_parameters_keep_every_bit_and_the_others_move(overfitted):
    _, before, state, _, _ = overfitted
    assert set(state.frozen) == {"vit"}
    jax.tree.map(
        np.testing.assert_array_equal,
        before["params"]["vit"],
        jax.tree.map(np.array, state.frozen["vit"]),
    )
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - np.array(b)).max()),
        before["params"]["lm"],
        state.trainable["lm"],
    )
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_no_optimiser_state_is_kept_for_frozen_parameters(overfitted):
    _, _, state, _, _ = overfitted
    paths = [
        sharding.path_name(path)
        for path, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    ]
    assert any("/lm/" in path for path in paths) and not any("/vit/" in path for path in paths)


def test_the_logged_rate_is_the_schedule_s(overfitted):
    _, _, _, scalars, _ = overfitted
    rate = optim.schedule(1e-2, STEPS, 0.05)
    np.testing.assert_allclose(
        [s["lr"] for s in scalars], [float(rate(i)) for i in range(STEPS)], rtol=1e-4
    )


def test_the_frozen_encoder_has_no_backward_pass(overfitted):
    plan, *_ = overfitted
    batch = {
        "tokens": jnp.zeros((4, 32), jnp.int32), "visual_index": jnp.full((4, 32), -1), "positions": jnp.zeros((4, 32), jnp.int32),
        "segments": jnp.zeros((4, 32), jnp.int32), "loss_mask": jnp.ones((4, 32), bool),
        "images": jnp.zeros((4, 1, 16, 16, 3), jnp.uint8),
    }  # fmt: skip
    text = str(jax.make_jaxpr(step.make_step(plan))(plan.state, batch))
    everything = plan.experiment.optim.__class__(
        **dataclasses.asdict(plan.experiment.optim) | {"trainable": ".*"}
    )
    exp = dataclasses.replace(plan.experiment, optim=everything)
    whole = step.plan(exp, plan.mesh, STEPS)
    assert text.count("dot_general") < str(
        jax.make_jaxpr(step.make_step(whole))(whole.state, batch)
    ).count("dot_general")


def test_the_loss_is_the_mean_over_supervised_targets_of_the_whole_batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
    tokens, mask = rng.integers(0, 7, (3, 5)), np.zeros((3, 5), bool)
    mask[0, 1:] = mask[1, 4] = mask[2, 2] = True  # 4 + 1 + 1 targets: rows do not count alike
    want, hits = [], []
    for b, t in zip(*np.nonzero(mask), strict=True):
        row = logits[b, t - 1].astype(np.float64)
        want.append(np.log(np.exp(row).sum()) - row[tokens[b, t]])
        hits.append(row.argmax() == tokens[b, t])
    loss, scalars = losses.next_token_loss(
        jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(mask)
    )
    assert float(loss) == pytest.approx(np.mean(want), rel=1e-5)
    assert int(scalars["tokens"]) == 6 and float(scalars["accuracy"]) == pytest.approx(
        np.mean(hits)
    )


@pytest.mark.slow
def test_a_run_leaves_config_metrics_and_checkpoints_and_is_not_run_twice(folder, tmp_path):
    config = tiny.config(folder, num_steps=3, save_every=2)
    config.optim.trainable = "^projector/"
    final = train.train(config, str(tmp_path / "run"))
    lines = telemetry.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1] == final
    assert set(final) == {
        "step",
        "loss",
        "accuracy",
        "grad_norm",
        "lr",
        "tokens",
        "bad_records",
        "skipped",
        "fill",
    }
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "3"]
    assert experiment.read(tmp_path / "run") == experiment.resolve(config)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    config.train.log_every = 1  # logging may change
    written = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert train.train(config, str(tmp_path / "run")) == final  # nothing is trained again
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == written

    with config.unlocked():
        config.init.projector = str(
            tmp_path / "run"
        )  # a second stage takes the projector, and nothing else, from it
    exp = experiment.resolve(config)
    plan = step.plan(exp, sharding.make_mesh(exp.mesh), 3)
    given = loop.begin(plan).trainable["projector"]
    random = loop.begin(
        plan._replace(experiment=dataclasses.replace(exp, init=InitConfig("", "", "", "")))
    )
    wanted = {"projector": plan.state.trainable["projector"]}
    learnt = load_params(tmp_path / "run", wanted)["projector"]
    jax.tree.map(np.testing.assert_array_equal, given, learnt)
    assert not np.array_equal(
        given["dense_0"]["kernel"], random.trainable["projector"]["dense_0"]["kernel"]
    )


def test_new_visual_tokens_may_begin_at_the_scale_of_the_word_embeddings(folder):
    config = tiny.config(folder)
    config.model.projector_positions = "grid"
    config.model.projector_norm = "rms"

    def begun(scale):
        config.model.projector_scale = scale
        exp = experiment.resolve(config)
        return loop.begin(step.plan(exp, sharding.make_mesh(exp.mesh), 3))

    one, words = (begun(scale) for scale in ("one", "words"))
    table = optim.merge(words.trainable, words.frozen)["lm"]["embed"]
    rms = np.sqrt(np.mean(np.square(table)))
    assert 0.01 < rms < 0.03
    for name in ("position", "norm"):
        before, now = one.trainable["projector"][name], words.trainable["projector"][name]
        jax.tree.map(lambda b, n: np.testing.assert_allclose(n, b * rms, rtol=1e-5), before, now)
    jax.tree.map(
        np.testing.assert_array_equal,
        one.trainable["projector"]["dense_0"], words.trainable["projector"]["dense_0"],
    )  # fmt: skip
    config.model.projector_norm = "none"
    with pytest.raises(ConfigError, match="projector_scale 'words' scales the projector's norm"):
        experiment.resolve(config)


def settled(folder, tmp_path):
    """A workdir that holds a run of the tiny config with a checkpoint, without having trained."""
    exp = experiment.resolve(tiny.config(folder))
    experiment.write(exp, tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("block", "field", "value"),
    [
        (("optim",), "learning_rate", 5e-3),
        (("model", "lm"), "width", 32),
        (("data",), "max_tokens", 48),
        (("train",), "seed", 1),
        (("train",), "num_steps", 9),
    ],
)
def test_a_workdir_refuses_other_settings_and_names_the_field(
    folder, tmp_path, block, field, value
):
    config = tiny.config(folder)
    node = config
    for name in block:
        node = node[name]
    node[field] = value
    with pytest.raises(
        ConfigError, match=rf"holds a run with {'.'.join((*block, field))} = .*, now {value}"
    ):
        train.train(config, str(settled(folder, tmp_path)))


def test_logging_mesh_and_workers_may_change_between_two_starts(folder, tmp_path):
    config = tiny.config(folder, log_every=1, save_every=1, keep=5)
    config.data.num_workers, config.mesh.data, config.model.lm.remat = 2, 1, "full"
    inputs.check_same(experiment.resolve(config), settled(folder, tmp_path))


def test_metrics_after_a_crash_are_cut_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    metrics = telemetry.Metrics(tmp_path, 1, writes=True, notice=lambda line, ids: None)
    assert metrics.last["loss"] == 3.0
    metrics.append(2, {"loss": jnp.float32(0.1), "skipped": jnp.bool_(False)}, ["a"])
    metrics.append(3, {"loss": jnp.float32(0.2), "skipped": jnp.bool_(False)}, ["b"])
    metrics.flush(2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    metrics.flush(3)
    metrics.close()
    assert telemetry.read_lines(path)[2] == {
        "step": 3,
        "loss": float(np.float32(0.2)),
        "skipped": 0,
    }


def mistakes(folder):
    """Flags after the good ones -> what the one line must say."""
    missing = str(folder / "nowhere")
    (folder / "file").touch()
    return {
        "--config.optim.learning_rte=1": "config.optim has no field 'learning_rte'; it has: beta1",
        "--config.model.vit.preset=clip-xl": "unknown encoder preset 'clip-xl'; use one of clip-b16-224",
        "--config.model.compressor.stride=5": "grid 8 is not divisible by stride 5; use one of [1, 2, 4, 8]",
        "--config.optim.warmup_ratio=2": "warmup_ratio must lie in [0, 1)",
        "--config.optim.learning_rate=fast": "could not convert string to float",
        f"--config.data.annotations={missing}.json": "nowhere.json' does not exist",
        f"--config.data.image_roots={missing}": "image_roots",
        f"--config.data.tokenizer={missing}": "nowhere' does not exist",
        f"--config.data.tokenizer={folder}/images": "holds no tokenizer",
        f"--config.init.lm={missing}": "has no finished checkpoint and is no model directory",
        f"--config.init.from={missing}": "init: from '" + missing + "' has no finished checkpoint",
        f"--workdir={folder}/file/run": "cannot write to",
        "--wrkdir=x": "Unknown command line flag 'wrkdir'",
    }


def test_mistakes_are_answered_in_one_line_with_exit_code_2_within_5_seconds(folder, tmp_path):
    good = [
        "--config=configs/stage1.py", f"--workdir={tmp_path}/run", f"--config.data.annotations={folder}/data.json",
        f"--config.data.image_roots={folder}", f"--config.data.tokenizer={folder}/tokenizer",
        "--config.model.vit.preset=mini", "--config.model.compressor.taps=(0,1)", "--config.model.lm.preset=mini-45k",
        "--config.model.compressor.stride=2",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "nothing"}  # whoever wakes jax up fails
    for flag, message in mistakes(folder).items():
        start = time.perf_counter()
        kept = [
            other for other in good if other.split("=")[0] != flag.split("=")[0]
        ]  # repeated lists add up
        command = [sys.executable, "-m", "vlm_jax.train", *kept, flag]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2, (flag, done.stderr)
        assert message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout, (
            flag,
            done.stderr,
        )
        assert time.perf_counter() - start < 5, flag
    assert not (tmp_path / "run").exists()


def test_what_needs_the_registry_or_the_tokenizer_is_refused_before_compiling(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "plan", None)
    config = tiny.config(folder)
    config.model.compressor.name = "squeezer"
    with pytest.raises(
        ConfigError, match="unknown compressor 'squeezer'; use one of identity, quecc, tokenpacker"
    ):
        train.train(config, str(tmp_path))
    config = tiny.config(folder)
    config.model.lm.vocab_size = 20
    with pytest.raises(
        ConfigError,
        match=r"vocab_size 20 is smaller than the tokenizer's 30: the decoder does not belong to the tokenizer .*tokenizer'. "
        r"Name the one that does, --config.model.lm.preset=DIR --config.init.lm=DIR; .* set --config.model.lm.vocab_size=30.$",
    ):
        train.train(config, str(tmp_path))
    config = tiny.config(folder)
    config.model.compressor.stride, config.data.max_tokens = 1, 4
    with pytest.raises(ConfigError, match="1 x 4 visual tokens leave no room in max_tokens 4"):
        train.train(config, str(tmp_path))
