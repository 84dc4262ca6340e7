"""A cache of encoder features: written by the command, read by a run as if it encoded its images, refused when it is another's."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from paths import PYTHONPATH

from vlm_jax import features, sharding, train
from vlm_jax.data import feature_cache, feature_images, pipeline, rows
from vlm_jax.inference import features as inference
from vlm_jax.models.vlm import shapes
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment
from vlm_jax.storage import weights
from vlm_jax.storage.checkpoint import save_params
from vlm_jax.training import optim, step
from vlm_jax.training.losses import make_loss

CONFIG = """
from pathlib import Path
import tiny
from vlm_jax import compressors

def get_config(folder):
    c = tiny.config(Path(folder) / "data", num_steps=4)
    c.model.vit.update({"dtype": "bfloat16", "num_layers": 2})
    compressors.choose(c.model.compressor, "tokenpacker", taps=(1, 2))
    c.optim.trainable = "^(compressor|projector|lm)/"
    return c
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with data, an encoder's run in `encoder`, its cached features in `cached`, a config in `small.py`."""
    folder = tmp_path_factory.mktemp("features")
    tiny.write(folder / "data")
    (folder / "small.py").write_text(CONFIG)
    exp, rng = experiment.resolve(config(folder)), np.random.default_rng(0)
    vit = {"vit": nn.unbox(shapes(exp.model))["vit"]}
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), vit)
    save_params(folder / "encoder", drawn)
    experiment.write(exp, folder / "encoder")
    assert run(folder, "cached") == 0
    return folder


def config(folder, **data):
    c = cli.load_config(f"{folder / 'small.py'}:{folder}")
    c.data.update(data)
    return c


def run(folder, out: str, *flags: str) -> int:
    """The command's exit code."""
    words = [f"--config={folder / 'small.py'}:{folder}", f"--workdir={folder / out}"]
    words += [
        f"--config.init.vit={folder / 'encoder'}",
        "--config.data.tokenizer=",
    ]  # there is no text to read
    return features.main([*words, *flags])


def losses(folder, **data) -> list[float]:
    """Of the first batches of a run, before it has learnt anything."""
    exp = experiment.resolve(config(folder, **data))
    p = step.plan(exp, sharding.make_mesh(exp.mesh, jax.devices()[:1]), 3)
    params = optim.merge(step.fresh_state(p).trainable, p.state.frozen) | encoder_params(
        folder, exp
    )
    loss, iterator = jax.jit(make_loss(exp)), pipeline.train_iterator(exp.data, 1, exp.model.vit)
    found = []
    with contextlib.closing(iterator), sharding.use(p.mesh):
        for _ in range(3):
            batch = sharding.put(next(iterator), p.mesh)
            found.append(float(loss(params, batch, jnp.int32(0))[0]))
    return found


def test_a_run_on_cached_features_has_the_losses_of_one_that_encodes_its_images(world):
    plain = losses(world)
    assert losses(world, features_dir=str(world / "cached")) == plain
    assert len(set(plain)) == 3


def test_bfloat16_features_come_back_bit_by_bit(world):
    exp = experiment.resolve(config(world))
    table = rows.CachedFeatures(str(world / "cached"))
    assert table.last.dtype == table.taps.dtype == ml_dtypes.bfloat16
    assert np.load(world / "cached" / "last.npy").dtype == np.uint16
    params = encoder_params(world, exp)
    paths = feature_images.list_images(exp.data)
    ((names, images),) = feature_images.image_batches(paths, exp.data, exp.model.vit, 8)
    found = inference.encode(params, images, exp.model)
    batch = table.gather(np.array([[table.rows[name]] for name in names] + [[-1]]))
    for name, values in (("feature_last", found.last), ("feature_taps", found.taps)):
        assert batch[name].dtype == ml_dtypes.bfloat16 and not batch[name][-1].any()
        np.testing.assert_array_equal(batch[name][:8, 0].view(np.uint16), np.asarray(values).view(np.uint16))  # fmt: skip


def encoder_params(world, exp):
    one = sharding.make_mesh(exp.mesh, jax.devices()[:1])
    return weights.load(
        str(world / "encoder"), exp.model, {"vit": weights.abstract(exp.model, one)["vit"]}
    )


def test_the_encoders_weights_are_arguments_of_its_program(world):
    exp = experiment.resolve(config(world))
    images = jnp.zeros((1, 16, 16, 3), jnp.uint8)
    traced = jax.make_jaxpr(lambda p, x: inference.encode(p, x, exp.model))(encoder_params(world, exp), images)  # fmt: skip
    assert sum(np.size(const) for const in traced.consts) < 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.image_mode": "crop"}, "was made with data.image_mode = 'pad', this run has 'crop'; make a cache"),
        ({"model.vit.norm_eps": 1e-3}, "was made with model.vit.norm_eps = 1e-06, this run has 0.001"),
        ({"model.vit.dtype": "float32"}, "was made with model.vit.dtype = 'bfloat16', this run has 'float32'"),
        ({"model.vit.mean": (0.1, 0.5, 0.5)}, r"was made with model.vit.mean = \[0.5, 0.5, 0.5\]"),
        ({"model.compressor.taps": (1,)}, r"was made with model.compressor.taps = \(1, 2\), this run has \(1,\)"),
        ({"model.compressor.name": "prumerge", "model.compressor.neighbours": 3}, "a cache has no queries and keys, which prumerge looks at"),
        ({"init.vit": "", "train.seed": 1}, "holds the features of another encoder .*/encoder, fingerprint .*; set init.vit to the same"),
        ({"optim.trainable": "."}, "takes parameters of the encoder, whose features come from a cache; freeze it"),
    ],
)  # fmt: skip
def test_a_cache_that_is_not_this_runs_is_refused(world, tmp_path, change, message):
    c = config(world, features_dir=str(world / "cached"))
    c.init.vit = str(world / "encoder")
    c.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=message):
        train.train(c, str(tmp_path / "run"), given=tuple(change))


def test_settings_that_change_no_feature_do_not_matter(world):
    exp = experiment.resolve(config(world, max_image_pixels=10**6, batch_size=2))
    vit = dataclasses.replace(exp.model.vit, remat="full", sharded=True)
    feature_cache.check(str(world / "cached"), dataclasses.replace(exp.model, vit=vit), exp.data)


def test_the_command_finds_its_features_finished_and_keeps_others(world, capsys):
    before = (world / "cached" / "last.npy").read_bytes()
    assert run(world, "cached") == 0
    assert run(world, "cached", "--config.data.image_mode=crop") == 2
    assert "was made with data.image_mode = 'pad', this run has 'crop'" in capsys.readouterr().err
    assert run(world, "data") == 2
    assert "holds no index.json" in capsys.readouterr().err
    assert run(world, "other", "--config.init.vit=") == 2
    assert (
        "features: init.vit and init.from are empty; give the training run"
        in capsys.readouterr().err
    )
    assert (world / "cached" / "last.npy").read_bytes() == before
    assert not (world / "other").exists()


def test_an_image_that_cannot_be_read_leaves_nothing_behind(world, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(json.dumps([tiny.record("bad", ["<image>\nWhat ?", "red"], "tokenizer/tokenizer.json")]))  # fmt: skip
    found = f"--config.data.annotations=('{tmp_path / 'bad.json'}',)"
    before = sorted(path.name for path in world.iterdir())
    assert run(world, "spoilt", found) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: data: ") and "tokenizer/tokenizer.json" in line
    assert sorted(p.name for p in world.iterdir() if p.name != "spoilt") == before
    assert not list((world / "spoilt").iterdir())


@pytest.mark.parametrize("damage", ["missing", "cut", "older"])
def test_a_cache_that_does_not_say_what_made_it_is_refused(world, tmp_path, damage):
    for name in ("index.json", "last.npy"):
        (tmp_path / name).write_bytes((world / "cached" / name).read_bytes())
    made = (world / "cached" / "made.json").read_text()
    if damage != "missing":
        made = made[:100] if damage == "cut" else made.replace('"format": 1', '"format": 0')
        (tmp_path / "made.json").write_text(made)
    told = {"missing": "holds no made.json", "cut": "made.json cannot be read", "older": "has format 0, not 1"}  # fmt: skip
    exp = experiment.resolve(config(world))
    with pytest.raises(ConfigError, match=told[damage] + "; make a cache"):
        feature_cache.check(str(tmp_path), exp.model, exp.data)


def test_a_fingerprint_knows_every_bit_and_where_it_stands():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {"a": x, "b": x.astype(ml_dtypes.bfloat16)}
    first = weights.fingerprint(jax.tree.map(jnp.asarray, tree))
    bit = x.copy()
    bit.view(np.uint32)[1, 2] ^= 1
    others = [
        {**tree, "a": bit}, {**tree, "a": x[::-1]}, {**tree, "a": x.reshape(3, 2)}, {"a": tree["b"], "b": x},
        {"a": x, "c": tree["b"]}, {**tree, "a": x.astype(np.float16)},
    ]  # fmt: skip
    found = [weights.fingerprint(jax.tree.map(jnp.asarray, other)) for other in others]
    assert len({first, *found}) == 7
    assert weights.fingerprint(jax.tree.map(jnp.asarray, tree)) == first


@pytest.mark.slow
def test_two_processes_encode_each_their_share_of_the_images_into_one_cache(world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [
        sys.executable, "-m", "vlm_jax.features", f"--config={world / 'small.py'}:{world}", f"--workdir={world / 'two'}",
        f"--config.init.vit={world / 'encoder'}", "--config.data.tokenizer=",
    ]  # fmt: skip
    given = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": PYTHONPATH, "JAX_COORDINATOR_ADDRESS": address}
    running = [
        subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True,
            env=os.environ | given | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    one, two = world / "cached", world / "two"
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    for name in ("last.npy", "taps.npy"):
        np.testing.assert_array_equal(np.load(two / name), np.load(one / name))
    assert (two / "index.json").read_text() == (one / "index.json").read_text()


def test_each_share_of_a_batch_is_read_by_one_process_and_all_have_as_many_batches(world):
    exp = experiment.resolve(config(world))
    paths = feature_images.list_images(exp.data)
    whole = [n for n, _ in feature_images.image_batches(paths, exp.data, exp.model.vit, 4)]
    shares = [
        [n for n, _ in feature_images.image_batches(paths, exp.data, exp.model.vit, 4, i, 2)]
        for i in range(2)
    ]
    assert len(shares[0]) == len(shares[1]) == len(whole) > 1
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
