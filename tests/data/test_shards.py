"""Prepared shards: the same batches as from the JSON, in the same order, and nothing lost when the preparation is killed."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
from array_record.python import array_record_module
from PIL import Image

from vlm_jax.data import pipeline, preparing, shards, sources
from vlm_jax.data.records import BadRecord
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment

spec = importlib.util.spec_from_file_location(
    "prepare_data", Path(__file__).parents[2] / "scripts" / "prepare_data.py"
)
prepare_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare_data)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny folder with two large noisy pictures (longer than a block of a shard), a damaged and a missing one."""
    directory = tiny.write(tmp_path_factory.mktemp("shards") / "data")
    records = json.loads((directory / "data.json").read_text())
    rng = np.random.default_rng(0)
    for name in ("noise1", "noise2", "cut"):
        noise = rng.integers(0, 256, (200, 250, 3), np.uint8)
        Image.fromarray(noise).save(directory / "images" / f"{name}.png")
        records.append(tiny.record(name, ["<image>\nWhat colour is this ?", "red"], f"images/{name}.png"))  # fmt: skip
    cut = directory / "images" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:50_000])
    records.append(
        tiny.record("gone", ["<image>\nWhat colour is this ?", "red"], "images/gone.png")
    )
    two = tiny.record("two", ["<image>\n<image>\nIs it bright ?", "No"])
    records.append(two | {"images": ["images/red.png", "images/noise1.png"]})
    (directory / "data.json").write_text(json.dumps(records))
    return directory


def prepare(world, out, *more):
    prepare_data.main([str(out), "--annotations", str(world / "data.json"), "--image-roots", str(world), "--processes", "1",
                       "--records-per-shard", "4", *more])  # fmt: skip


@pytest.fixture(scope="module")
def out(world):
    place = world.parent / "shards"
    prepare(world, place)
    return place


def data_config(world, **fields):
    cfg = tiny.config(world)
    cfg.data.update({"max_images": 2, "on_bad_record": "skip", "max_bad_records": 100} | fields)
    return experiment.resolve(cfg).data


def batches(cfg, count, state=None):
    vit = presets.vit("mini", image_px=16, patch_px=8)
    iterator = pipeline.train_iterator(cfg, 1, vit)
    if state:
        iterator.set_state(state)
    found = [next(iterator) for _ in range(count)]
    end = iterator.get_state()
    iterator.close()
    return found, end


def assert_same(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def good(world):
    """The same records without those that cannot be used."""
    records = json.loads((world / "data.json").read_text())
    path = world / "good.json"
    path.write_text(json.dumps([r for r in records if r["id"] not in ("cut", "gone")]))
    return str(path)


def test_what_cannot_be_used_is_listed_and_all_else_is_counted(world, out):
    index = json.loads((out / "index.json").read_text())
    assert (index["records"], index["bad"], len(index["shards"])) == (13, 2, 4)
    bad = [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]
    assert [one["record"] for one in bad] == ["cut", "gone"]
    assert "truncated" in bad[0]["reason"] and "No such file" in bad[1]["reason"]
    assert preparing.verify(str(out)) == 13


@pytest.mark.parametrize(
    "fields", [{}, {"sampling": "modality_length", "length_buckets": (24, 32)}]
)
def test_batches_from_shards_are_those_from_the_json_bit_for_bit_also_resumed(world, out, fields):
    cfg = data_config(world, annotations=(good(world),), **fields)
    prepared = data_config(world, annotations=(str(out),), image_roots=("",), **fields)
    theirs, _ = batches(cfg, 7)  # two epochs
    mine, _ = batches(prepared, 7)
    assert_same(mine, theirs)
    _, state = batches(prepared, 3)
    rest, _ = batches(prepared, 4, state)
    assert_same(rest, theirs[3:])


def test_other_readers_of_array_record_see_the_same_records(out):
    source = shards.PreparedSource(str(out))
    name = json.loads((out / "index.json").read_text())["shards"][2]["file"]
    reader = array_record_module.ArrayRecordReader(str(out / name))
    raws = [shards.unpack(data)[0]["id"] for data in reader.read_all()]
    assert raws == [source[i].id for i in range(7, 11)]
    assert max(len(data) for data in reader.read_all()) > 2 * shards.BLOCK


def test_a_killed_preparation_goes_on_with_what_is_missing(world, out, tmp_path):
    again = tmp_path / "again"
    prepare(world, again)
    (again / "index.json").unlink()
    with pytest.raises(
        ConfigError, match=r"no output of scripts/prepare_data\.py that is finished"
    ):
        sources.check_paths(data_config(world, annotations=(str(again),), image_roots=("",)))
    names = sorted(path.name for path in again.glob("part-*.json"))
    (again / names[1]).unlink()
    kept = os.stat(again / names[0].replace(".json", ".array_record")).st_mtime_ns
    prepare(world, again)
    assert os.stat(again / names[0].replace(".json", ".array_record")).st_mtime_ns == kept
    for name in ("index.json", *names):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    records = json.loads((world / "data.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(records[:-1]))
    prepare_data.main([str(again), "--annotations", str(tmp_path / "other.json"), "--image-roots", str(world),
                       "--processes", "1", "--records-per-shard", "4"])  # fmt: skip
    assert len(shards.PreparedSource(str(again))) == 12  # a shard of other records is written anew


def test_a_damaged_shard_is_a_bad_record_and_fails_the_verification(world, out, tmp_path):
    again = tmp_path / "again"
    prepare(world, again)
    name = json.loads((again / "index.json").read_text())["shards"][0]["file"]
    data = bytearray((again / name).read_bytes())
    start = int(np.load(again / name.replace(".array_record", ".spans.npy"))[1, 0])
    data[start + 24 + 40] ^= 1
    (again / name).write_bytes(data)
    source = shards.PreparedSource(str(again))
    assert source[0].id == "red"
    with pytest.raises(BadRecord, match="its checksum is another"):
        source[1]
    with pytest.raises(
        ConfigError, match=r"is damaged: its checksum is another; delete part-00000-of-00004\.json"
    ):
        preparing.verify(str(again))
