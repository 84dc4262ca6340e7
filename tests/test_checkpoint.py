"""Saving, restoring, and taking parts of another run's parameters."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax import presets, weights
from vlm_jax.checkpoint import Checkpoints, load_params
from vlm_jax.config import CompressorConfig, ConfigError, VLMConfig


def state(scale=1.0):
    params = {
        "lm": {"embed": scale * jnp.arange(6.0).reshape(2, 3), "layers": {"norm": jnp.full((2,), scale, jnp.bfloat16)}},
        "projector": {"kernel": scale * jnp.ones((3, 2))},
    }  # fmt: skip
    labels = {
        "lm": {"embed": "muon", "layers": {"norm": "adamw"}},
        "projector": {"kernel": "adamw"},
    }
    optimizer = optax.partition(
        {"muon": optax.contrib.muon(1e-2), "adamw": optax.adamw(1e-2)}, labels
    )
    opt_state = jax.tree.map(lambda x: x + scale, optimizer.init(params))
    return {"step": jnp.int32(7), "params": params, "opt_state": opt_state}


def numbers():
    return iter(grain.MapDataset.range(100).seed(3).shuffle().repeat().to_iter_dataset().batch(2))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(workdir, step, tree, iterator):
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save(step, tree, iterator)
    checkpoints.close()


def test_state_and_iterator_come_back_exactly(tmp_path):
    iterator = numbers()
    next(iterator), next(iterator)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(2, state(), iterator)
    third = next(iterator)  # while the save is under way
    checkpoints.close()
    again, fresh = Checkpoints(tmp_path, keep=2), numbers()
    assert again.latest() == 2
    restored = again.restore(2, abstract(state()), fresh)
    again.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state())
    jax.tree.map(np.testing.assert_array_equal, restored, state())
    np.testing.assert_array_equal(next(fresh), third)


def test_a_donated_buffer_does_not_change_a_save_under_way(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 5, tree), donate_argnums=0)
    big, checkpoints = {"params": {"lm": jnp.ones((1024, 1024))}}, Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, big, numbers())
    for _ in range(5):
        big = bump(big)
    checkpoints.close()
    saved = load_params(tmp_path, abstract({"lm": jnp.ones((1024, 1024))}))
    assert float(saved["lm"].min()) == float(saved["lm"].max()) == 1


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(), numbers())
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_a_save_cut_short_is_never_seen(tmp_path):
    save(tmp_path, 1, state(), numbers())
    cut = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-17" / "state"
    cut.mkdir(parents=True)
    (cut / "half").write_text("x")
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() == 1
    checkpoints.save(2, state(2.0), numbers())
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_parts_come_from_the_newest_checkpoint_and_no_others_are_read(tmp_path):
    save(tmp_path, 1, state(1.0), numbers())
    save(tmp_path, 2, state(2.0), numbers())
    wanted = abstract(state()["params"])
    model = VLMConfig(presets.vit("mini"), CompressorConfig("identity"), presets.lm("mini-38k"))
    sources = {"lm": str(tmp_path), "projector": "", "vit": ""}
    loaded = weights.load_by_part(sources, model, wanted)
    np.testing.assert_array_equal(loaded["lm"]["embed"], 2 * np.arange(6.0).reshape(2, 3))
    assert loaded["lm"]["layers"]["norm"].dtype == jnp.bfloat16
    assert set(loaded) == {"lm"}
    with pytest.raises(ConfigError, match="this model has no part 'vit'"):
        weights.load_by_part({"vit": str(tmp_path)}, model, wanted)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"lm": {"embed": jnp.zeros((2, 4))}},
            r"parameter lm/embed has shape \(2, 3\) there but \(2, 4\) here",
        ),
        ({"lm": {"head": jnp.zeros((2, 4))}}, "has no parameter lm/head"),
    ],
)
def test_a_part_that_does_not_fit_is_named(tmp_path, params, message):
    save(tmp_path, 1, state(), numbers())
    with pytest.raises(ConfigError, match=message):
        load_params(tmp_path, abstract(params))


def test_a_workdir_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere' has no checkpoint"):
        load_params(tmp_path / "nowhere", abstract(state()["params"]))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="has no finished checkpoint"):
        load_params(tmp_path, abstract(state()["params"]))
