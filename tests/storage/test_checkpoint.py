"""Saving, restoring, and taking parts of another run's parameters."""

import json
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from compressor import compressor_config

from vlm_jax.data import pipeline
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig
from vlm_jax.storage import checksums, weights
from vlm_jax.storage import run as experiment
from vlm_jax.storage.checkpoint import Checkpoints, load_params


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
    experiment.write(experiment.resolve(tiny.config(tmp_path)), tmp_path)
    wanted = abstract(state()["params"])
    model = VLMConfig(presets.vit("mini"), compressor_config("identity"), presets.lm("mini-38k"))
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


def test_the_position_in_the_data_carries_over_to_another_number_of_shards(tmp_path):
    exp = experiment.resolve(tiny.config(tiny.write(tmp_path / "data")))

    def batches(shard, count, number):
        iterator = pipeline.train_iterator(exp.data, 1, exp.model.vit, shard, count)
        return iterator, [next(iterator)["ids"] for _ in range(number)]

    _, straight = batches(0, 1, 4)
    halves = [batches(shard, 2, 3)[0] for shard in range(2)]
    folder = tmp_path / "checkpoints" / "3" / "iterator"
    folder.mkdir(parents=True)
    for i, half in enumerate(halves):
        (folder / f"process_{i}-of-2.json").write_text(json.dumps(half.get_state()))
    whole, _ = batches(0, 1, 1)
    checkpoints = Checkpoints(tmp_path, keep=2)
    whole.set_state(checkpoints._position(3, whole))
    assert next(whole)["ids"] == straight[3]

    next(halves[1])  # one shard is ahead, as if it had skipped a record
    (folder / "process_1-of-2.json").write_text(json.dumps(halves[1].get_state()))
    with pytest.raises(ConfigError, match=r"2 shards stopped at different samples .* as many"):
        checkpoints._position(3, whole)
    checkpoints.close()


def test_a_position_kept_by_a_process_that_now_loads_other_rows_is_not_taken_as_it_is(tmp_path):
    exp = experiment.resolve(tiny.config(tiny.write(tmp_path / "data")))
    half = pipeline.train_iterator(exp.data, 1, exp.model.vit, 0, 2)
    next(half)
    folder = tmp_path / "checkpoints" / "1" / "iterator"
    folder.mkdir(parents=True)
    (folder / "process_0-of-1.json").write_text(json.dumps(half.get_state()))
    whole, checkpoints = (
        pipeline.train_iterator(exp.data, 1, exp.model.vit),
        Checkpoints(tmp_path, keep=2),
    )
    assert half.get_state()["consumed"] == 2
    assert checkpoints._position(1, whole)["consumed"] == 4
    checkpoints.close()


def hurt_arrays(folder):
    for path in (folder / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:3])


def hurt_files(name):
    def hurt(folder):
        (path,) = folder.glob(name)
        path.unlink() if path.is_file() else shutil.rmtree(path)

    return hurt


def hurt_text(name):
    def hurt(folder):
        (path,) = folder.glob(name)
        path.write_bytes(path.read_bytes()[:5] + b"\xff")

    return hurt


HURT = {
    "array files cut short": hurt_arrays,
    "no array files": lambda folder: [path.unlink() for path in (folder / "state").rglob("d/*")],
    "no state/_METADATA": hurt_files("state/_METADATA"),
    "state/_METADATA cut short": hurt_text("state/_METADATA"),
    "no state/manifest": hurt_files("state/manifest.ocdbt"),
    "manifest cut short": hurt_text("state/manifest.ocdbt"),
    "no state": hurt_files("state"),
    "no iterator": hurt_files("iterator"),
    "iterator cut short": hurt_text("iterator/process_0-of-1.json"),
    "sums cut short": hurt_text("sums/metadata"),
    "empty": lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()],
}


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for step in (4, 6):
        save(folder, step, state(), numbers())
    return folder


@pytest.mark.parametrize("kind", HURT)
def test_a_damaged_newest_checkpoint_names_the_step_to_go_on_from(two_saved, tmp_path, kind):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "6"
    HURT[kind](newest)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() == 6
    said = f"the checkpoint of step 6 is damaged; delete {newest} to go on from step 4. It says: "
    with pytest.raises(ConfigError) as caught:
        checkpoints.restore(6, abstract(state()), numbers())
    checkpoints.close()
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    if "iterator" not in kind:
        with pytest.raises(ConfigError) as caught:
            load_params(tmp_path, abstract(state()["params"]))
        assert str(caught.value).startswith(said.replace("go on from", "use"))
    shutil.rmtree(newest)
    checkpoints = Checkpoints(tmp_path, keep=2)
    restored = checkpoints.restore(checkpoints.latest(), abstract(state()), numbers())
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state())


def test_a_damaged_only_checkpoint_says_that_the_run_starts_anew(tmp_path):
    save(tmp_path, 6, state(), numbers())
    hurt_arrays(tmp_path / "checkpoints" / "6")
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(ConfigError, match="to start anew: there is no older one"):
        checkpoints.restore(6, abstract(state()), numbers())
    checkpoints.close()


def test_bytes_that_changed_inside_an_array_file_are_noticed(tmp_path):
    """Random values, which the file stores as they are: nothing else would fail."""
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    tree = {"params": {"lm": {"embed": jnp.asarray(values)}}}
    for step in (4, 6):
        save(tmp_path, step, tree, numbers())
    newest = tmp_path / "checkpoints" / "6"
    largest = max((newest / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    (said,) = {
        damaged
        for at in range(len(content) // 2, len(content) // 2 + 16)
        if (damaged := flipped(tmp_path, largest, content, at, tree)) is not None
        and "checksum" in damaged
    }
    assert said == (
        f"the checkpoint of step 6 is damaged; delete {newest} to go on from step 4. "
        "It says: ValueError: params/lm/embed is not what was saved: its checksum is another"
    )


def flipped(workdir, path, content, at, tree):
    """What reading says with one bit of a file turned; None if it restores the values that were saved all the same."""
    path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    checkpoints = Checkpoints(workdir, keep=2)
    try:
        restored = checkpoints.restore(6, abstract(tree), numbers())
        jax.tree.map(np.testing.assert_array_equal, restored, tree)
    except ConfigError as error:
        return str(error)
    finally:
        checkpoints.close()
    return None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_a_checksum_is_the_sum_of_an_array_s_words_on_the_host_and_on_devices(dtype):
    values = np.random.default_rng(0).integers(0, 2**31, (8, 6)).astype(jnp.dtype(dtype))
    words = values.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[values.itemsize])
    total = int(words.astype(object).sum() % 2**32)
    x = jnp.asarray(values)
    for _ in range(2):  # it leaves the array as it is
        assert checksums.of({"a": x}) == {"a": [dtype, total]}
        assert int(checksums._on_devices([x])[0]) == total
