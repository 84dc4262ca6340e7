"""Runs in a bucket, against a real GCS server on this machine: the same numbers as on a disk, and every failure in one line."""

import http.server
import importlib.util
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from forks import Forks
from gcs_server import Named, Server, saving
from safetensors import SafetensorError
from safetensors.numpy import save_file

from configs import eval as eval_config
from vlm_jax import evaluate, files, train
from vlm_jax.files import buckets, lease
from vlm_jax.hf import stored
from vlm_jax.laws import fit, table
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment

BUCKET = "gs://bucket"


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


# --- what is refused, and how it is said -------------------------------------------------------------------------------


def said(capsys, act):
    """The one line of a command that fails."""
    assert cli.run(lambda argv: act()) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, told
    return told[0]


def test_safetensors_are_read_by_byte_ranges_and_again_once_they_were_written_again(
    tmp_path, server
):
    rng = np.random.default_rng(0)
    there = files.to_path(f"{BUCKET}/model/model.safetensors")

    def write():
        tensors = {
            "a": rng.normal(size=(5, 3)).astype(np.float32), "b": rng.normal(size=(4,)).astype(ml_dtypes.bfloat16),
            "c": np.array(rng.normal(), np.float32),
        }  # fmt: skip
        save_file(tensors, tmp_path / "model.safetensors")
        there.write_bytes((tmp_path / "model.safetensors").read_bytes())
        return tensors

    write()
    assert stored.header(there) == stored.header(tmp_path / "model.safetensors")
    tensors = write()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(stored.read(there, name), tensor)
    np.testing.assert_array_equal(stored.read(there, "a", (1, 4)), tensors["a"][1:4])
    there.write_bytes(there.read_bytes()[:50])
    with pytest.raises(SafetensorError, match="a header of"):
        stored.header(there)


def test_a_bucket_that_does_not_exist_is_one_line(world, capsys):
    line = said(capsys, lambda: train.train(tiny.config(world), "gs://no-such-bucket/run") and None)
    assert line.startswith("error: --workdir: cannot write to 'gs://no-such-bucket/run'")
    assert "no bucket gs://no-such-bucket" in line
    cfg = in_bucket(world)
    cfg.data.annotations = ("gs://no-such-bucket/data.json",)
    line = said(capsys, lambda: train.train(cfg, f"{BUCKET}/never") and None)
    assert "'gs://no-such-bucket/data.json' does not exist" in line


def test_a_missing_package_names_the_command_that_installs_it(world, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "gcsfs" else find(n, *a))  # fmt: skip
    assert cli.run(lambda argv: None, ["--workdir=gs://bucket/run"]) == 2
    assert "pip install 'vlm_jax[gcs]'" in capsys.readouterr().err


@pytest.fixture
def proxy(server):
    """A proxy before the server whose `answers` are given instead: a list of HTTP codes, one per request; [0] = forward."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def pass_on(self):
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size) if size else None
            code = self.server.codes.pop(0) if self.server.codes else self.server.then
            self.server.count += 1
            if code:
                self.answer(code, b'{"error": {"code": %d, "message": "made up"}}' % code, {})
                return
            kept = {
                k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")
            }
            request = urllib.request.Request(
                server.address + self.path, body, kept, method=self.command
            )
            try:
                with urllib.request.urlopen(request) as reply:
                    self.answer(reply.status, reply.read(), dict(reply.headers))
            except urllib.error.HTTPError as error:
                self.answer(error.code, error.read(), dict(error.headers))

        def answer(self, code, data, headers):
            self.send_response(code)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = pass_on

        def log_message(self, *_):
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *request):
            """A client that hung up before its answer is no line on the standard error that a test reads."""
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(*request)

    running = Quiet(("127.0.0.1", 0), Handler)
    running.codes, running.then, running.count = [], 0, 0
    running.address = f"http://127.0.0.1:{running.server_address[1]}"
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


@pytest.fixture
def through(proxy, monkeypatch):
    """This process's requests go through the proxy."""
    import gcsfs

    buckets.file_system.cache_clear()
    for name, value in Server(Path()).environment(proxy.address).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        gcsfs.GCSFileSystem, "_location", property(lambda self: proxy.address), raising=True
    )
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield proxy
    buckets.file_system.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_a_passing_503_is_retried_and_a_403_is_one_line(through, capsys):
    through.codes = [503, 429]
    files.write_whole(f"{BUCKET}/x/a.txt", "text")
    assert through.count >= 3 and files.read_text(f"{BUCKET}/x/a.txt") == "text"
    through.then = 403
    with pytest.raises(ConfigError) as caught:
        files.write_whole(f"{BUCKET}/x/a.txt", "other")
    assert "gs://bucket/x/a.txt cannot be written: the bucket refuses access" in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"cannot write to 'gs://bucket/run2' \(the bucket refuses"
    ):
        experiment.open_workdir(f"{BUCKET}/run2")
    with pytest.raises(OSError, match="refuses access"):  # not "there is none"
        experiment.last_step(f"{BUCKET}/run")
    path = files.to_path(f"{BUCKET}/x/a.txt")
    assert cli.run(lambda _: int(path.read_bytes()), []) == 2
    assert re.fullmatch(rf"error: {path}: the bucket refuses access .*\n", capsys.readouterr().err)
    through.then = 0
    assert files.read_text(f"{BUCKET}/x/a.txt") == "text"


# --- lines ---------------------------------------------------------------------------------------------------------------


def test_a_growing_file_is_whole_after_each_flush_and_takes_few_objects(server):
    path = files.to_path(f"{BUCKET}/grown/metrics.jsonl")
    lines, want, most = files.Lines(path, b"first\n"), b"first\n", 0
    for number in range(300):
        lines.write(f"{number}\n")
        lines.flush()
        want += f"{number}\n".encode()
        if number % 29 == 0:  # what a reader sees who comes after a kill -9
            assert files.read_grown(path) == want
            most = max(most, len(list((path.with_name("metrics.jsonl.parts")).iterdir())))
    assert 1 < most <= 64
    lines.close()
    assert path.read_bytes() == want and [p.name for p in path.parent.iterdir()] == [
        "metrics.jsonl"
    ]


def test_a_kill_between_the_whole_file_and_the_deletion_of_its_parts_doubles_no_line(server):
    path = files.to_path(f"{BUCKET}/killed/metrics.jsonl")
    lines = files.Lines(path, b"")
    for word in ("a\n", "b\n"):
        lines.write(word)
        lines.flush()
    path.write_bytes(b"a\nb\n")  # the parts are still there
    assert files.read_grown(path) == b"a\nb\n"
    again = files.Lines(path)
    again.write("c\n")
    again.flush()
    assert files.read_grown(path) == b"a\nb\nc\n"


# --- two runs ------------------------------------------------------------------------------------------------------------


def test_a_second_run_in_a_workdir_is_refused_while_the_first_renews_its_lease(server, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "DEAD", 5.0)
    workdir = files.to_path(f"{BUCKET}/leased")
    with files.lock(workdir) as held:
        told = r"process \d+ on .* is training in 'gs://bucket/leased'"
        with pytest.raises(files.Locked, match=told), files.lock(workdir):
            raise AssertionError("both hold it")
        held()
    assert not (workdir / "lock").exists()


def test_a_lease_of_a_dead_process_is_taken_over_once_and_its_holder_notices(server, monkeypatch):
    workdir = files.to_path(f"{BUCKET}/dead")
    monkeypatch.setattr(lease, "BEAT", 1e6)  # a holder that gives no sign of life
    monkeypatch.setattr(lease, "DEAD", 1.0)
    with files.lock(workdir) as silent:
        monkeypatch.setattr(lease, "BEAT", 0.1)
        with files.lock(workdir) as holder:
            holder()
            silent()  # it does not know yet
    monkeypatch.setattr(lease, "BEAT", 0.3)
    with files.lock(workdir) as first:
        (workdir / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 3, "id": "other"}))
        end = time.monotonic() + 30
        with pytest.raises(
            files.Locked, match="process 3 on elsewhere took 'gs://bucket/dead' over"
        ):
            while time.monotonic() < end:
                first()
                time.sleep(0.05)


def test_the_lease_of_a_killed_process_of_this_machine_does_not_delay_a_start(server):
    workdir = files.to_path(f"{BUCKET}/gone")
    with subprocess.Popen(["true"]) as process:
        process.wait()
    (workdir / "lock").write_text(
        json.dumps({"host": socket.gethostname(), "pid": process.pid, "id": "x"})
    )
    start = time.monotonic()
    with files.lock(workdir):
        assert time.monotonic() - start < lease.DEAD / 2  # it would wait DEAD otherwise


# --- kills and outages ---------------------------------------------------------------------------------------------------

STEPS = 30
FIELDS = {"train__num_steps": STEPS, "train__save_every": 4, "train__log_every": 1}


@pytest.fixture(scope="module")
def fork(world):
    server = Forks(world, "log0")
    yield server
    server.close()


@pytest.fixture(scope="module")
def want(fork, tmp_path_factory):
    """metrics.jsonl of a run on a disk that nothing ends."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    fork.start(workdir, **FIELDS)
    assert fork.wait() == 0, fork.log.read_text()
    return (workdir / "metrics.jsonl").read_bytes()


def begin(fork, name, log, **fields):
    fork.start(Named(f"{BUCKET}/{name}", log), **FIELDS | fields)


def done(name):
    try:
        return files.read_grown(files.to_path(f"{BUCKET}/{name}/metrics.jsonl")).count(b"\n")
    except OSError:
        return 0


def kill_until_finished(fork, name, folder, kills, seed):
    """Starts the run again and again and kills it after a random number of steps and a random time; returns the kills."""
    rng, killed = random.Random(seed), 0
    for _ in range(3 * kills + 3):
        begin(fork, name, folder)
        if killed < kills:
            ahead, wait = done(name) + rng.randint(1, 5), rng.uniform(0, 0.3)
            while fork.running() and done(name) < ahead:
                time.sleep(0.02)
            time.sleep(wait)
            if fork.running():
                fork.send(signal.SIGKILL)
                killed += 1
        if fork.wait() == 0:
            return killed
    raise AssertionError(fork.log.read_text())


def check_curve(name, want):
    path = files.to_path(f"{BUCKET}/{name}/metrics.jsonl")
    assert path.read_bytes() == want and not path.with_name("metrics.jsonl.parts").exists()


def test_a_run_killed_at_random_moments_ends_with_the_same_metrics(fork, want, tmp_path):
    assert kill_until_finished(fork, "kills", tmp_path, 2, 0) == 2
    check_curve("kills", want)


@pytest.mark.slow
def test_a_server_that_stops_for_ten_seconds_is_waited_for(fork, want, tmp_path, server):
    # Without a save under way: this server forgets the uploads that it had begun, which a real one keeps for a week.
    begin(fork, "outage", tmp_path, train__save_every=STEPS)
    while done("outage") < 5:
        time.sleep(0.05)
    server.stop()
    time.sleep(10)
    server.start()
    assert fork.wait() == 0, fork.log.read_text()
    check_curve("outage", want)


@pytest.mark.slow
def test_ten_seconds_of_503_in_the_middle_of_a_save_are_waited_for(
    world, want, tmp_path, server, proxy, monkeypatch
):
    with monkeypatch.context() as patched:
        for name, value in server.environment(proxy.address).items():
            patched.setenv(name, value)
        fork = Forks(world, "log0")
    try:
        begin(fork, "busy", tmp_path)
        while fork.running() and not (done("busy") > 5 and saving(f"{BUCKET}/busy")):
            time.sleep(0.002)
        proxy.then, asked = 503, proxy.count
        time.sleep(10)
        proxy.then = 0
        refused = proxy.count - asked
        assert fork.wait() == 0, fork.log.read_text()
    finally:
        fork.close()
    assert refused
    check_curve("busy", want)
