"""Ended at any moment, by kill -9, SIGTERM or Ctrl-C, the same command goes on to the same losses, bit for bit."""

import json
import random
import signal
import time

import numpy as np
import pytest
import tiny
from forks import Forks

from vlm_jax.storage.run import last_step
from vlm_jax.training.telemetry import read_lines

KILLS, STEPS = 21, 30
FIELDS = {"train__num_steps": STEPS, "train__save_every": 4, "train__log_every": 1}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    server = Forks(tiny.write(tmp_path_factory.mktemp("resume") / "data"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def want(forks, tmp_path_factory):
    """metrics.jsonl of a run that nothing ends."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    forks.start(workdir, **FIELDS)
    assert forks.wait() == 0, forks.log.read_text()
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return lines


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def saving(workdir):
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("tmp" in entry.name for entry in folder.iterdir())


def moment(rng, workdir, kind):
    """Whether it has come: at a time from the start on, after some steps, or inside a save, and a little later."""
    start, done = time.monotonic(), lines(workdir)
    wait = rng.uniform(0, 4) if kind == "time" else rng.uniform(0, 0.04)
    ahead, come = rng.randint(1, 8), []

    def happened():
        if kind == "save":
            now = lines(workdir) != done and saving(workdir)
        else:
            now = kind == "time" or lines(workdir) >= done + ahead
        if now and not come:
            come.append(time.monotonic() if kind != "time" else start)
        return bool(come) and time.monotonic() >= come[0] + wait

    return happened


def test_a_run_killed_at_random_moments_continues_to_the_same_losses_bit_for_bit(
    forks, want, tmp_path
):
    rng, kills, cut, finished = random.Random(0), 0, 0, 0
    workdir = tmp_path / "0"
    for _ in range(2 * KILLS):
        saved = last_step(workdir)
        forks.start(workdir, **FIELDS)
        if forks.send_when(
            signal.SIGKILL, moment(rng, workdir, ("time", "step", "save")[kills % 3])
        ):
            assert forks.wait() in (-signal.SIGKILL, 0)
        if forks.wait() == 0:
            assert read_lines(workdir / "metrics.jsonl") == want
            finished += 1
            workdir = tmp_path / str(finished)
            continue
        assert forks.wait() == -signal.SIGKILL, forks.log.read_text()
        kills, cut = kills + 1, cut + saving(workdir)
        assert saved is None or last_step(workdir) >= saved  # no checkpoint was lost
        if kills == KILLS:
            break
    assert kills == KILLS and cut >= 3, (kills, cut)
    forks.start(workdir, **FIELDS)
    assert forks.wait() == 0, forks.log.read_text()
    assert read_lines(workdir / "metrics.jsonl") == want  # json keeps every bit of a float
    assert json.loads((workdir / "final.json").read_text()) == want[-1]


def test_a_run_asked_to_stop_saves_says_where_and_goes_on(forks, want, tmp_path):
    workdir = tmp_path / "run"
    for kind in (signal.SIGTERM, signal.SIGINT):
        before = lines(workdir)
        forks.start(workdir, **FIELDS)
        assert forks.send_when(kind, lambda done=before: lines(workdir) >= done + 3)
        assert forks.wait() == 0, forks.log.read_text()
        step = last_step(workdir)
        assert before + 3 <= step == lines(workdir) < STEPS
        assert forks.log.read_text().splitlines()[-1] == (
            f"asked to stop: {workdir} has a checkpoint of step {step} of {STEPS}; the same command goes on from there."
        )
        assert not (workdir / "final.json").exists()
    forks.start(workdir, **FIELDS)
    assert forks.wait() == 0, forks.log.read_text()
    assert read_lines(workdir / "metrics.jsonl") == want


def test_a_run_goes_on_with_other_numbers_of_devices_to_the_same_losses(forks, want, tmp_path):
    workdir = tmp_path / "run"
    cube = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    for devices, mesh in ((1, {}), (8, cube), (4, {})):
        before = lines(workdir)
        forks.start(workdir, devices=devices, **mesh, **FIELDS)
        if devices != 4:
            assert forks.send_when(signal.SIGTERM, lambda done=before: lines(workdir) >= done + 3)
        assert forks.wait() == 0, forks.log.read_text()
        assert lines(workdir) >= before + 3
    got = [line["loss"] for line in read_lines(workdir / "metrics.jsonl")]
    np.testing.assert_allclose(got, [line["loss"] for line in want], rtol=1e-4)
