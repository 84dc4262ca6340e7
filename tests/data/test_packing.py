"""Packed batches: each sample arrives as it would alone, first fit in stream order, exact resume."""

import dataclasses
import json

import numpy as np
import packed
import pytest
from packed import VIT, M

from vlm_jax.data import packing, pipeline
from vlm_jax.data.records import BadRecord
from vlm_jax.settings.checks import ConfigError

TEXT = ("tokens", "positions", "segments", "loss_mask")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return packed.write(tmp_path_factory.mktemp("packing") / "data")


def config(folder, **fields):
    return packed.config(folder, **{"packing": True, "packed_images": 4, "batch_size": 2} | fields)


def iterate(cfg, shard=0, num_shards=1):
    return pipeline.train_iterator(cfg, M, VIT, shard, num_shards)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def samples(batch):
    """(id, arrays without padding, images and queries) of each packed sample, row by row."""
    for row, names in enumerate(batch["ids"]):
        at = image = 0
        for k, name in enumerate(names):
            real = (batch["samples"][row] == k) & (batch["segments"][row] >= 0)
            (slots,) = np.nonzero(real)
            assert slots.tolist() == list(range(at, at + len(slots)))  # side by side, no gap
            visual = batch["visual_index"][row, slots]
            shown = len(visual[visual >= 0]) // M
            found = {key: batch[key][row, slots] for key in TEXT}
            found["visual_index"] = np.where(visual >= 0, visual - image * M, -1)
            for key in ("images", "query_tokens", "query_mask", "feature_last"):
                if key in batch:
                    found[key] = batch[key][row, image : image + shown]
            yield name, found
            at, image = at + len(slots), image + shown
        assert (batch["segments"][row, at:] == -1).all() and not batch["loss_mask"][row, at:].any()
        assert (batch["visual_index"][row, at:] == -1).all()
        if "images" in batch:
            assert not batch["images"][row, image:].any()


@pytest.mark.parametrize("turns", ["dialogue", "independent"])
def test_every_packed_sample_equals_the_row_it_would_have_alone(folder, turns):
    alone = {}
    for batch in take(iterate(packed.config(folder, turns=turns, batch_size=13)), 2):
        for i, name in enumerate(batch["ids"]):
            alone[name] = {key: batch[key][i] for key in batch if key != "ids"}
    seen = set()
    for batch in take(iterate(config(folder, turns=turns)), 12):
        for name, found in samples(batch):
            tokens = len(found["tokens"])
            shown = int((alone[name]["visual_index"].max() + 1) // M)
            assert (alone[name]["segments"] >= 0).sum() == tokens and len(found["images"]) == shown
            assert found["positions"][0] == 0 and not found["loss_mask"][0]
            for key, value in found.items():
                size = tokens if key in (*TEXT, "visual_index") else shown
                assert np.array_equal(value, alone[name][key][:size]), (name, key)
            seen.add(name)
    assert len(seen) == packed.NUM
    if turns == "independent":
        assert (
            max(batch["segments"].max() for batch in take(iterate(config(folder, turns=turns)), 3))
            == 2
        )


def test_a_packed_batch_has_the_promised_names_shapes_and_dtypes(folder):
    batch = next(iterate(config(folder)))
    found = {k: (v.shape, v.dtype.name) for k, v in batch.items() if k != "ids"}
    row, px = ((2, 64), "int32"), packed.PX
    assert found == {
        "tokens": row, "visual_index": row, "positions": row, "segments": row, "samples": row,
        "loss_mask": ((2, 64), "bool"), "images": ((2, 4, px, px, 3), "uint8"),
        "query_tokens": ((2, 4, 6), "int32"), "query_mask": ((2, 4, 6), "bool"),
    }  # fmt: skip
    empty = batch["query_mask"][:, -1].sum(
        axis=1
    )  # a slot without an image asks "image", as in `rows`
    assert empty.tolist() == [2, 2]
    assert json.loads(json.dumps(batch["ids"])) == batch["ids"]
    text = next(iterate(config(folder, annotations=text_only(folder), max_images=0)))
    assert set(text) == {*TEXT, "visual_index", "samples", "ids"}


def text_only(folder):
    records = [r for r in json.loads((folder / "a.json").read_text()) if "image" not in r]
    path = folder / "text.json"
    path.write_text(json.dumps(records))
    return (str(path),)


@pytest.mark.parametrize("slots", [1, 4])
def test_samples_are_placed_first_fit_in_stream_order_and_none_is_lost(folder, slots):
    cfg = config(folder, packed_images=slots)
    plain = dataclasses.replace(cfg, packing=False, batch_size=1)
    stream, sizes = [], {}
    for batch in take(iterate(plain), 3 * packed.NUM):
        (name,) = batch["ids"]
        stream.append(name)
        sizes[name] = (
            int((batch["segments"] >= 0).sum()),
            int(batch["visual_index"].max() + 1) // M,
        )
    expected, rows = [], [[], []]
    for name in stream:  # the slow twin
        for row in rows:
            tokens = sum(sizes[n][0] for n in row) + sizes[name][0]
            if tokens <= 64 and sum(sizes[n][1] for n in row) + sizes[name][1] <= slots:
                row.append(name)
                break
        else:
            expected.append(rows)
            rows = [[name], []]
    assert [b["ids"] for b in take(iterate(cfg), len(expected))] == expected
    if slots == 1:
        assert all(sum(map(packed.has_image, row)) <= 1 for rows in expected for row in rows)


def test_resume_is_exact_and_the_state_is_one_number(folder):
    cfg = config(folder)
    straight = take(iterate(cfg), 9)
    first = iterate(cfg)
    handed = sum(len(row) for batch in take(first, 4) for row in batch["ids"])
    state = json.loads(json.dumps(first.get_state()))
    assert state == {"consumed": handed, "bad_records": 0, "num_shards": 1}
    fresh = iterate(cfg)
    take(fresh, 1)
    fresh.set_state(state)
    for a, b in zip(take(fresh, 5), straight[4:], strict=True):
        assert a["ids"] == b["ids"]
        assert all(np.array_equal(a[key], b[key]) for key in a if key != "ids")


def test_shards_pack_their_own_samples(folder):
    parts = [take(iterate(config(folder), shard, 2), 12) for shard in range(2)]
    plain = dataclasses.replace(config(folder), packing=False, batch_size=1)
    stream = [batch["ids"][0] for batch in take(iterate(plain), 40)]
    for shard, batches in enumerate(parts):
        assert {len(batch["tokens"]) for batch in batches} == {1}
        names = [name for batch in batches for row in batch["ids"] for name in row]
        assert names[:20] == stream[shard::2]  # one row: first fit keeps the order


def test_bad_records_are_dropped_and_counted(folder, tmp_path):
    records = json.loads((folder / "a.json").read_text())
    records[4]["image"] = "lost.png"
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps(records))
    cfg = config(folder, annotations=(str(path),), on_bad_record="skip", max_bad_records=9)
    iterator = iterate(cfg)
    batches = take(iterator, 12)
    names = [name for batch in batches for row in batch["ids"] for name in row]
    assert "r4" not in names and set(names) == {f"r{i}" for i in range(packed.NUM)} - {"r4"}
    bad = iterator.bad_records
    assert bad >= 1 and iterator.get_state() == {
        "consumed": len(names) + bad,
        "bad_records": bad,
        "num_shards": 1,
    }
    with pytest.raises(BadRecord, match=r"record r4: image 'lost\.png'"):
        take(iterate(dataclasses.replace(cfg, on_bad_record="raise")), 12)


def test_cached_features_fill_the_image_slots(folder, tmp_path):
    cache = tmp_path / "features"
    cache.mkdir()
    last = np.random.default_rng(0).standard_normal((packed.NUM, 9, 3)).astype(np.float32)
    np.save(cache / "last.npy", last)
    (cache / "index.json").write_text(json.dumps({f"{i}.png": i for i in range(packed.NUM)}))
    for batch in take(iterate(config(folder, features_dir=str(cache))), 6):
        assert "images" not in batch and batch["feature_last"].shape == (2, 4, 9, 3)
        for name, found in samples(batch):
            expected = last[[int(name[1:])]] if packed.has_image(name) else last[:0]
            assert np.array_equal(found["feature_last"], expected)


def test_packing_fills_the_rows_that_single_samples_leave_empty(folder):
    whole, alone = iterate(config(folder, batch_size=8)), iterate(packed.config(folder))
    fills = []
    for batch in take(whole, 4):
        fills.append(float((batch["segments"] >= 0).mean()))
    assert whole.fill == fills[-1]
    next(alone)
    assert np.mean(fills) > 0.8 and alone.fill < 0.6


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_length_of_an_epoch_is_estimated(folder, batch_size):
    cfg = config(folder, batch_size=batch_size)
    consumed, batches = 0, 0
    iterator = iterate(cfg)
    while consumed < 20 * packed.NUM:
        next(iterator)
        batches += 1
        consumed = iterator.get_state()["consumed"]
    real = batches * packed.NUM / consumed
    assert abs(pipeline.steps_per_epoch(cfg, M) - real) <= max(1, 0.15 * real)


def test_an_image_behind_the_cut_takes_no_slot(folder):
    rows = {"segments": np.zeros(8, int), "visual_index": np.array([-1, 0, 1, 2, 3, -1, -1, -1])}
    assert packing._sizes(rows, M) == (8, 1)
    assert packing._sizes(rows | {"visual_index": np.full(8, -1)}, M) == (8, 0)


def test_too_few_image_slots_are_refused(folder):
    with pytest.raises(ConfigError, match="packed_images 1 must be at least max_images 2"):
        config(folder, packed_images=1, max_images=2)
