"""The main road on real input: photographs on disk, stage 1, stage 2, evaluation, each a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import photos
import pytest

from vlm_jax import files
from vlm_jax.benchmarks import llava
from vlm_jax.laws import table

ROOT = Path(__file__).resolve().parents[1]

MODEL = {
    "vit.preset": "mini", "vit.dtype": "float32", "compressor.name": "quecc", "compressor.stride": 4,
    "compressor.num_heads": 4, "compressor.taps": "(0, 1)", "compressor.dtype": "float32", "lm.preset": "mini-131k",
    "lm.vocab_size": 512, "lm.dtype": "float32", "lm.remat": "none",
}  # fmt: skip
DATA = {
    "max_tokens": 96, "max_query_tokens": 16, "max_images": 2, "batch_size": 12, "system": photos.SYSTEM,
}  # fmt: skip


def call(module, config, workdir, fields):
    """Runs one command in a process and returns what it printed; `fields` override the config's."""
    words = [f"--config=configs/{config}.py", f"--workdir={workdir}"]
    words += [f"--config.{name}={value}" for name, value in fields.items()]
    done = subprocess.run(
        [sys.executable, "-m", f"vlm_jax.{module}", *words],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(workdir):
    return [
        json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def prepared(photographs, place, name):
    """The shards of an annotation file of `photographs`, written to `place`."""
    words = [
        str(place / name),
        "--annotations",
        str(photographs / f"{name}.json"),
        "--image-roots",
        str(photographs),
    ]
    words += ["--processes", "2", "--records-per-shard", "4"]
    done = subprocess.run(
        [sys.executable, "scripts/prepare_data.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {"data.annotations": f"('{place / name}',)", "data.image_roots": "('',)"}


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["disk", "bucket"])
def test_two_stages_overfit_real_photographs_and_evaluate_answers_every_question(
    tmp_path, storage, server
):
    """QueCC at 4 visual tokens, a 131k-parameter decoder; needs about 90 s of one core. bucket: shards, tokenizer, workdirs
    and the test's pictures lie there, and nothing on this disk is read."""
    data, place = tmp_path / "photos", tmp_path
    photos.write(data)
    if storage == "bucket":
        place = files.to_path("gs://bucket/real")
        files.upload(data, place / "photos")
        shards = [prepared(data, place, name) for name in ("captions", "dialogues")]
        shutil.rmtree(data)
        data = place / "photos"
    else:
        shards = [
            {"data.annotations": f"('{data}/{name}.json',)", "data.image_roots": f"('{data}',)"}
            for name in ("captions", "dialogues")
        ]
    common = {f"model.{k}": v for k, v in MODEL.items()} | {f"data.{k}": v for k, v in DATA.items()}
    common |= {"data.tokenizer": data / "tokenizer"}

    stage1 = shards[0] | {
        "train.num_steps": 30,
        "train.random_frozen": True,
    }  # nothing is pretrained here
    call("train", "stage1", place / "stage1", common | stage1)
    # Model, tokenizer, template and system prompt are stage 1's.
    stage2 = shards[1] | {"init.from": place / "stage1", "optim.learning_rate": 3e-3}
    stage2 |= {f"data.{name}": DATA[name] for name in ("max_tokens", "max_images", "batch_size")}
    call("train", "stage2", place / "stage2", stage2 | {"train.num_steps": 200})
    assert losses(place / "stage1")[0] > losses(place / "stage1")[-1]
    assert losses(place / "stage2")[-1] < 0.05

    ask = {
        "eval.checkpoint": place / "stage2",
        "eval.benchmarks": "('llava',)",
        "eval.batch_size": 8,
    }
    ask |= {"eval.annotations": f"('{data}/dialogues.json',)", "eval.max_new_tokens": 24}
    (score,) = json.loads(call("evaluate", "eval", place / "eval", ask))
    assert score == {"benchmark": "llava", "score": 1.0, "error": 0.0, "n": 18, "details": {}}
    lines = (place / "eval" / "llava" / "predictions.jsonl").read_text().splitlines()
    texts = {line["id"]: line["text"] for line in map(json.loads, lines)}
    assert texts == {row["id"]: row["answer"] for row in llava.rows(data / "dialogues.json")}
    (row,) = table.read(place / "eval" / "errors.csv")
    assert (row.error, row.lm, row.visual_tokens, row.compressor) == (0.0, "mini-131k", 4, "quecc")


def test_the_fixture_holds_what_real_data_holds(tmp_path):
    """Several sizes and shapes, grey pictures, several turns, two images, no image."""
    from PIL import Image

    photos.write(tmp_path / "photos")
    pictures = [Image.open(path) for path in sorted((tmp_path / "photos" / "images").iterdir())]
    assert {picture.format for picture in pictures} == {"JPEG"}
    assert {picture.mode for picture in pictures} == {"RGB", "L"}
    shapes = [picture.width / picture.height for picture in pictures]
    assert len(set(shapes)) >= 5 and min(shapes) < 1 < max(shapes)
    records = json.loads((tmp_path / "photos" / "dialogues.json").read_text())
    assert len(records) == 12
    assert max(len(record["conversations"]) for record in records) == 6
    assert sum("image" not in record for record in records) == 2
    assert sum("image" in record and isinstance(record["image"], list) for record in records) == 2
