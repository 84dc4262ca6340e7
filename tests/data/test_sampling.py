"""Length-grouped batches: one modality each, alike in length, the same for every number of processes."""

import json

import numpy as np
import packed
import pytest
import tiny
from packed import VIT, M

from vlm_jax.data import pipeline, sampling
from vlm_jax.data.records import BadRecord
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment
from vlm_jax.training import loop, step, telemetry

IMAGE_KEYS = {"images", "query_tokens", "query_mask"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return packed.write(tmp_path_factory.mktemp("sampling") / "data")


def config(folder, **fields):
    settings = {"sampling": "modality_length", "length_buckets": (16, 24, 64)}
    return packed.config(folder, **settings | fields)


def iterate(cfg, shard=0, num_shards=1):
    return pipeline.train_iterator(cfg, M, VIT, shard, num_shards)


def take(cfg, n, shard=0, num_shards=1, state=None):
    iterator = iterate(cfg, shard, num_shards)
    if state:
        iterator.set_state(state)
    batches = [next(iterator) for _ in range(n)]
    iterator.close()
    return batches


def sizes(n, seed=0):
    rng = np.random.default_rng(seed)
    return sampling.Sizes(
        rng.integers(1, 400, n).astype(np.int32), rng.integers(0, 2, n).astype(np.int32)
    )


def test_a_batch_has_images_in_every_row_or_no_image_entries_at_all(folder):
    kinds = set()
    for batch in take(config(folder), 16):
        found = {packed.has_image(name) for name in batch["ids"]}
        assert len(found) == 1
        (images,) = found
        assert (batch.keys() >= IMAGE_KEYS) == (IMAGE_KEYS & batch.keys() != set()) == images
        kinds |= found
    assert kinds == {True, False}


def test_every_epoch_holds_every_record_and_fills_up_within_a_modality_only(folder):
    # 17 records with a picture: 5 batches of 4 (3 drawn twice); 9 without: 3 batches (3 drawn twice).
    cfg = config(folder)
    assert pipeline.steps_per_epoch(cfg, M) == 8
    batches = take(cfg, 16)
    epochs = [[n for b in part for n in b["ids"]] for part in (batches[:8], batches[8:])]
    for names in epochs:
        assert set(names) == {f"r{i}" for i in range(packed.NUM)}
        twice = [name for name in set(names) if names.count(name) == 2]
        assert sorted(map(packed.has_image, twice)) == [False] * 3 + [True] * 3
        assert len(names) == 32
    assert epochs[0] != epochs[1]


def test_a_modality_smaller_than_a_batch_repeats_its_records():
    order = sampling.Order(
        sampling.Sizes(np.arange(9, dtype=np.int32), np.array([1] * 8 + [0], np.int32)), M, 4, 0
    )
    assert order.batches_per_epoch == 3
    batches = [[order.record(4 * k + i) for i in range(4)] for k in range(3)]
    assert [8, 8, 8, 8] in batches
    assert sorted(np.ravel(batches).tolist()) == [*range(8), 8, 8, 8, 8]


def test_rows_of_a_batch_are_alike_in_length_and_batches_come_in_no_order():
    order = sampling.Order(sizes(6400), M, 16, 0)
    lengths = order.lengths[[order.record(p) for p in range(16 * order.batches_per_epoch)]]
    grouped = lengths.reshape(-1, 16)
    shuffled = np.random.default_rng(0).permutation(lengths).reshape(-1, 16)
    assert (grouped.mean(axis=1) / grouped.max(axis=1)).mean() > 0.95  # share of slots filled
    assert (shuffled.mean(axis=1) / shuffled.max(axis=1)).mean() < 0.6
    means = grouped.mean(axis=1)
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.2


def test_the_order_is_a_function_of_seed_and_place():
    a, b, c = (sampling.Order(sizes(300), M, 8, seed) for seed in (1, 1, 2))
    places = np.random.default_rng(0).integers(0, 2000, 200).tolist()
    assert [a.record(p) for p in reversed(places)][::-1] == [b.record(p) for p in places]
    assert [a.record(p) for p in places] != [c.record(p) for p in places]


def test_images_count_as_visual_tokens_when_lengths_are_compared():
    found = sampling.Sizes(np.array([10, 40, 12, 42], np.int32), np.array([2, 1, 2, 1], np.int32))
    order = sampling.Order(found, 30, 2, 0)
    pairs = {tuple(order.record(2 * k + i) for i in range(2)) for k in range(2)}
    assert order.lengths.tolist() == [70, 70, 72, 72]
    assert {tuple(sorted(pair)) for pair in pairs} == {(0, 1), (2, 3)}


def test_a_batch_is_as_wide_as_the_smallest_bucket_that_holds_its_longest_row(folder):
    cfg = config(folder)
    wide = take(config(folder, length_buckets=()), 16)
    found = set()
    for batch, whole in zip(take(cfg, 16), wide, strict=True):
        longest = int((whole["segments"] >= 0).sum(axis=1).max())
        width = min(b for b in cfg.length_buckets if b >= longest)
        assert batch["ids"] == whole["ids"]
        for name in sampling.TEXT_KEYS:
            assert whole[name].shape == (4, 64) and batch[name].shape == (4, width)
            assert np.array_equal(batch[name], whole[name][:, :width])
        found.add((width, "images" in batch))
    assert {width for width, _ in found} >= {24, 64}
    assert len(found) <= pipeline.num_shapes(cfg) == 6
    assert pipeline.num_shapes(config(folder, length_buckets=())) == 2
    assert pipeline.num_shapes(config(folder, max_images=0)) == 3
    assert pipeline.num_shapes(packed.config(folder)) == 1


@pytest.mark.parametrize("processes", [2, 4])
def test_all_processes_share_the_global_batches_and_agree_on_their_shape(folder, processes):
    cfg = config(
        folder, length_buckets=tuple(range(10, 65, 2))
    )  # so fine that rows differ in theirs
    whole = take(cfg, 12)
    parts = [take(cfg, 12, shard, processes) for shard in range(processes)]
    shorter = 0
    for k, batch in enumerate(whole):
        names = [name for part in parts for name in part[k]["ids"]]
        assert sorted(names) == sorted(batch["ids"])
        for part in parts:
            assert part[k]["tokens"].shape == (4 // processes, batch["tokens"].shape[1])
            assert part[k].keys() == batch.keys()
            longest = (part[k]["segments"] >= 0).sum(axis=1).max()
            shorter += longest <= batch["tokens"].shape[1] - 2
    assert shorter > 0  # somewhere a process's own rows would have fitted into a smaller bucket


def test_resuming_goes_on_with_the_next_batch(folder):
    cfg = config(folder)
    straight = take(cfg, 12)
    iterator = iterate(cfg)
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"consumed": 20, "bad_records": 0, "num_shards": 1}
    for a, b in zip(take(cfg, 7, state=state), straight[5:], strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def spoilt(folder, tmp_path):
    """r1: its picture is missing; r3, the longest text: an empty answer."""
    records = json.loads((folder / "a.json").read_text())
    records[1]["image"] = "lost.png"
    records[3]["conversations"][1]["value"] = " "
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps(records))
    return (str(path),)


def test_a_skipped_record_leaves_an_empty_row_and_all_others_keep_their_batch(folder, tmp_path):
    cfg = config(
        folder, annotations=spoilt(folder, tmp_path), on_bad_record="skip", max_bad_records=9
    )
    whole = take(cfg, 8)
    parts = [take(cfg, 8, shard, 2) for shard in range(2)]
    blanks = 0
    for k, batch in enumerate(whole):
        assert len({packed.has_image(name) for name in batch["ids"] if name}) <= 1
        for row, name in enumerate(batch["ids"]):
            empty = not name
            blanks += empty
            assert (batch["segments"][row] < 0).all() == empty
            assert batch["loss_mask"][row].any() == (not empty)
        for part in parts:
            assert part[k]["tokens"].shape[1] == batch["tokens"].shape[1]
            assert part[k].keys() == batch.keys()
    assert 2 <= blanks <= 4  # each once, or twice where a modality was filled up
    iterator = iterate(cfg)
    for _ in range(8):
        next(iterator)
    assert iterator.get_state() == {"consumed": 32, "bad_records": blanks, "num_shards": 1}
    with pytest.raises(BadRecord, match=r"lost\.png|answer 0 is empty"):
        take(config(folder, annotations=spoilt(folder, tmp_path)), 8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"length_buckets": (32, 16, 64)}, "must ascend and end with max_tokens 64"),
        ({"length_buckets": (16, 32)}, "must ascend and end with max_tokens 64"),
        ({"sampling": "shuffle"}, "length_buckets (16, 24, 64) need sampling 'modality_length'"),
        ({"sampling": "length"}, "sampling 'length' is not one of ['modality_length', 'shuffle']"),
        ({"packing": True}, "packing fills rows with samples of any length"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder, fields, words):
    with pytest.raises(ConfigError) as error:
        config(folder, **fields)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_training_compiles_once_per_shape_and_empty_rows_are_harmless(
    folder, tmp_path, monkeypatch
):
    c = tiny.config(folder, num_steps=12, save_every=12)
    c.data.update(
        {
            "annotations": spoilt(folder, tmp_path), "image_roots": (str(folder / "images"),), "max_tokens": 64,
            "sampling": "modality_length", "on_bad_record": "skip",
        }
    )  # fmt: skip
    exp = experiment.resolve(c)
    steps = []
    monkeypatch.setattr(loop, "make_step", lambda p: steps.append(step.make_step(p)) or steps[0])
    final = loop.run(exp, experiment.open_workdir(str(tmp_path / "run")))
    assert steps[0]._cache_size() == pipeline.num_shapes(exp.data) == 2
    assert final["bad_records"] >= 2 and 0 < final["fill"] <= 1
    losses = [line["loss"] for line in telemetry.read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert np.isfinite(losses).all() and np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5
