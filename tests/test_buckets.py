"""Runs in a bucket, against a real GCS server on this machine: the same numbers as on a disk, and every failure in one line."""

import json
from pathlib import Path

import pytest
import tiny
from gcs_server import Server

from configs import eval as eval_config
from vlm_jax import evaluate, files, train
from vlm_jax.laws import fit, table
from vlm_jax.storage import run as experiment

HELPER = Path(__file__).parent / "helpers" / "run.py"
BUCKET = "gs://bucket"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """With the bucket `bucket`; this process and those it starts talk to it."""
    root = tmp_path_factory.mktemp("gcs")
    (root / "bucket").mkdir()
    running = Server(root)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment().items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield running
    running.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory, server):
    """Data on a disk, and the same data in the bucket."""
    directory = tiny.write(tmp_path_factory.mktemp("world") / "data")
    files.upload(directory, files.to_path(f"{BUCKET}/data"))
    return directory


def in_bucket(world, **train_fields):
    """The config of a run whose inputs all lie in the bucket."""
    cfg = tiny.config(world, **train_fields)
    cfg.data.annotations, cfg.data.image_roots = (f"{BUCKET}/data/data.json",), (f"{BUCKET}/data",)
    cfg.data.tokenizer = f"{BUCKET}/data/tokenizer"
    return cfg


@pytest.fixture(scope="module")
def runs(world):
    """(workdir on the disk, in the bucket) of the same training."""
    local = world.parent / "run"
    train.train(tiny.config(world), str(local))
    train.train(in_bucket(world), f"{BUCKET}/run")
    return local, files.to_path(f"{BUCKET}/run")


@pytest.fixture(scope="module")
def evaluations(world, runs):
    """The same of the evaluation of both."""
    found = []
    for run, data in zip(runs, (str(world), f"{BUCKET}/data"), strict=True):
        cfg = eval_config.get_config()
        cfg.eval.update(
            {"checkpoint": str(run), "benchmarks": ("llava",), "annotations": (data,), "batch_size": 4, "max_new_tokens": 3}
        )  # fmt: skip
        out = run.with_name("eval")
        evaluate.evaluate(cfg, str(out))
        found.append(out)
    return found


def test_a_run_in_a_bucket_has_the_metrics_of_a_local_run_bit_for_bit(runs):
    local, bucket = runs
    for name in ("metrics.jsonl", "final.json"):
        assert (bucket / name).read_bytes() == (local / name).read_bytes() != b""
    assert experiment.last_step(bucket) == experiment.last_step(local) == 6
    assert experiment.read(str(bucket)).model == experiment.read(str(local)).model
    left = {path.name for path in bucket.iterdir()}
    assert left == {"checkpoints", "config.json", "data.json", "final.json", "metrics.jsonl", "tensorboard"}  # fmt: skip


def test_nothing_on_this_machine_is_named_like_a_bucket(runs, evaluations):
    assert not [path for path in (Path(), Path(__file__).parents[1]) if (path / "gs:").exists()]


def test_an_evaluation_in_a_bucket_gives_the_same_predictions_scores_and_rows(evaluations):
    local, bucket = evaluations
    for name in ("llava/predictions.jsonl", "scores.json", "questions.jsonl"):
        assert (bucket / name).read_bytes() == (local / name).read_bytes() != b""
    mine, theirs = table.read(local / "errors.csv"), table.read(str(bucket / "errors.csv"))
    assert [row.error for row in mine] == [row.error for row in theirs]
    assert not (bucket / "llava" / "predictions.jsonl.parts").exists()


def test_a_law_is_fitted_from_and_to_a_bucket(server, tmp_path, capsys):
    known = (Path(fit.__file__).parent / "data" / "paper_ocr.csv").read_bytes()
    files.write_whole(f"{BUCKET}/laws/errors.csv", known)
    (tmp_path / "errors.csv").write_bytes(known)
    laws = []
    for folder in (f"{BUCKET}/laws", str(tmp_path)):
        assert fit.main([f"{folder}/errors.csv", "--out", f"{folder}/law.json", "--draws", "100"]) == 0  # fmt: skip
        law = files.read_json(f"{folder}/law.json")
        laws.append(json.dumps(law).replace(folder, "DIR"))
    assert laws[0] == laws[1]
