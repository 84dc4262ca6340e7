"""Whole runs in a bucket, against a real GCS server on this machine: the miniature, a model directory, and two processes."""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import hf_models
import numpy as np
import pytest
import tiny
from forks import Forks
from gcs_server import Named, free_port, saving

import vlm_jax
from vlm_jax import files, train
from vlm_jax.laws import table
from vlm_jax.storage import frozen
from vlm_jax.storage import run as experiment
from vlm_jax.training.telemetry import read_lines

BUCKET = "gs://bucket"
ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


# --- the miniature -------------------------------------------------------------------------------------------------------


def sweep(workdir):
    words = ["--config=configs/mini_smoke.py", f"--workdir={workdir}", "--config.sweep.processes=1"]
    done = subprocess.run(
        [sys.executable, "-m", "vlm_jax.sweep", *words], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def names(workdir):
    """The files of a sweep, but for those that orbax and TensorBoard name, and for locks, which stay on a disk."""
    every = (path.relative_to(workdir) for path in files.to_path(workdir).rglob("*") if path.is_file())  # fmt: skip
    return {
        str(path) for path in every if not {"checkpoints", "tensorboard", "lock"} & set(path.parts)
    }


def test_the_miniature_with_every_path_in_a_bucket_is_the_local_one_bit_for_bit(server, tmp_path):
    """World, encoder, cached features, cells, answers, table, law, figures and report."""
    local, bucket = tmp_path / "mini", files.to_path(f"{BUCKET}/mini")
    sweep(local)
    sweep(bucket)
    written = names(local)
    assert names(bucket) == written
    compared = [name for name in written if name.endswith(("metrics.jsonl", "predictions.jsonl", "questions.jsonl", ".png"))]  # fmt: skip
    count = collections.Counter(Path(name).name for name in compared)
    assert count["metrics.jsonl"] >= 7 and count["predictions.jsonl"] >= 8, count
    for name in compared:
        assert (local / name).read_bytes() == (bucket / name).read_bytes() != b"", name
    rows = [table.read(files.to_path(place) / "errors.csv") for place in (local, bucket)]
    assert [(r.key, r.error) for r in rows[0]] == [(r.key, r.error) for r in rows[1]]
    laws = [files.read_text(files.to_path(place) / "law.json") for place in (local, bucket)]
    assert laws[0].replace(str(local), "DIR") == laws[1].replace(str(bucket), "DIR")


# --- model directories ---------------------------------------------------------------------------------------------------


def test_model_directories_in_a_bucket_are_read_and_read_again(world, server, tmp_path):
    """A run leaves its frozen encoder out of its checkpoints; answering finds it in the bucket."""
    for name in ("llama, many shards", "clip tower"):
        hf_models.build(name, tmp_path / "models" / name)
    files.upload(tmp_path / "models", files.to_path(f"{BUCKET}/models"))
    picture, losses = world / "images" / "red.png", []
    for models, run in ((tmp_path / "models", tmp_path / "run"), (f"{BUCKET}/models", f"{BUCKET}/built")):  # fmt: skip
        train.train(tiny.with_models(world, models), str(run))
        assert {leaf.source for leaf in frozen.read(str(run)).values()} == {f"{models}/clip tower"}
        losses.append(vlm_jax.load(run).loss(picture, "What colour is this ?", "red"))
    metrics = [files.read_bytes(files.to_path(run) / "metrics.jsonl") for run in (tmp_path / "run", f"{BUCKET}/built")]  # fmt: skip
    assert metrics[0] == metrics[1] and losses[0] == losses[1]


# --- kills and outages ---------------------------------------------------------------------------------------------------

KILLS = 20
FIELDS = {
    "train__num_steps": 60, "train__save_every": 4, "train__log_every": 1, "train__peer_timeout": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(world, server):
    forks = [Forks(world, f"log{i}") for i in range(2)]
    yield forks
    for fork in forks:
        fork.close()


def start(pair, workdir):
    address = f"127.0.0.1:{free_port()}"
    for i, fork in enumerate(pair):
        fork.start(workdir, address=address, process=i, processes=2, **FIELDS)


def done(workdir):
    try:
        return files.read_grown(files.to_path(f"{workdir}/metrics.jsonl")).count(b"\n")
    except OSError:
        return 0


def end(pair):
    return [fork.wait(120) for fork in pair], [fork.log.read_text() for fork in pair]


@pytest.fixture(scope="module")
def want(pair, tmp_path_factory):
    """metrics.jsonl of two processes on a disk that nothing ends."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    start(pair, workdir)
    statuses, logs = end(pair)
    assert statuses == [0, 0], logs
    return (workdir / "metrics.jsonl").read_bytes()


def test_two_processes_killed_twenty_times_end_with_the_curve_of_an_uninterrupted_run(
    pair, want, tmp_path
):
    """One or both are killed, after a random number of steps and a random time or in the middle of a save."""
    rng, kills, during_saves, runs = random.Random(0), 0, 0, 0
    while kills < KILLS:
        workdir, statuses = Named(f"{BUCKET}/pair{runs}", tmp_path), []
        runs += 1
        while statuses != [0, 0]:
            start(pair, workdir)
            ahead, wait = done(workdir) + rng.randint(0, 3), rng.uniform(0, 0.2)
            in_a_save, victims = rng.random() < 0.4, rng.choice((pair[:1], pair[1:], pair))
            while pair[0].running() and done(workdir) < ahead:
                time.sleep(0.02)
            while in_a_save and pair[0].running() and not saving(workdir):
                time.sleep(0.002)
            if not in_a_save:
                time.sleep(wait)
            if kills < KILLS and all(fork.running() for fork in pair):
                for fork in victims:
                    fork.send(signal.SIGKILL)
                kills, during_saves = kills + 1, during_saves + in_a_save
            statuses, logs = end(pair)
            assert all("Traceback" not in log for log in logs), logs
        path = files.to_path(f"{workdir}/metrics.jsonl")
        assert path.read_bytes() == want and not path.with_name("metrics.jsonl.parts").exists()
    assert during_saves, (kills, runs)


@pytest.mark.parametrize("in_a_save", [False, True])
def test_a_server_that_is_gone_for_good_is_one_line_and_the_last_checkpoint_is_whole(
    in_a_save, pair, want, tmp_path, server
):
    fork, workdir = pair[0], Named(f"{BUCKET}/gone{in_a_save}", tmp_path)
    fork.start(workdir, **FIELDS)
    while fork.running() and (done(workdir) < 9 or (in_a_save and not saving(workdir))):
        time.sleep(0.002 if in_a_save else 0.05)
    server.stop()
    status = fork.wait(400)
    server.start()
    log = fork.log.read_text()
    told = [line for line in log.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(told) == 1 and "Traceback" not in log, log
    assert f"'{workdir}" in told[0] and "cannot be reached" in told[0]
    assert experiment.last_step(str(workdir)) >= 4  # that of step 8 was being written
    fork.start(workdir, **FIELDS)
    assert fork.wait() == 0, fork.log.read_text()
    lines = [json.loads(line) for line in want.splitlines()]
    found = read_lines(files.to_path(f"{workdir}/metrics.jsonl"))
    assert [line["step"] for line in found] == [line["step"] for line in lines]
    np.testing.assert_allclose([x["loss"] for x in found], [x["loss"] for x in lines], rtol=1e-5)
