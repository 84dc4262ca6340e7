"""Two processes on this machine train as one does; asked to stop they stop together; when one dies the other says so."""

import signal
import socket
import time

import numpy as np
import pytest
import tiny
from forks import Forks

from vlm_jax.storage.run import last_step
from vlm_jax.training.telemetry import read_lines

STEPS, TIMEOUT = 24, 10
FIELDS = {
    "train__num_steps": STEPS, "train__save_every": 5, "train__log_every": 1, "train__peer_timeout": TIMEOUT,
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("processes") / "data")


@pytest.fixture(scope="module")
def pair(data):
    servers = [Forks(data, f"log{i}") for i in range(2)]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def want(pair, tmp_path_factory):
    """metrics.jsonl of one process with the same global batch."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    pair[0].start(workdir, **FIELDS)
    assert pair[0].wait() == 0, pair[0].log.read_text()
    return read_lines(workdir / "metrics.jsonl")


def check_equal(workdir, want):
    got = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose(
            [line[name] for line in got], [line[name] for line in want], rtol=1e-5
        )


def start(pair, workdir, **fields):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for i, server in enumerate(pair):
        server.start(workdir, address=address, process=i, processes=2, **FIELDS | fields)


def end(pair):
    """Exit statuses and last lines of both logs."""
    statuses = [server.wait(120) for server in pair]
    return statuses, [server.log.read_text() for server in pair]


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def after(workdir, more):
    done = lines(workdir)
    return lambda: lines(workdir) >= done + more


def test_two_processes_train_as_one_stop_together_and_survive_a_death(pair, want, tmp_path):
    two = tmp_path / "two"
    # One process begins, two go on: the position in the data is that of another number of processes.
    pair[0].start(two, **FIELDS)
    assert pair[0].send_when(signal.SIGTERM, after(two, 3))
    assert pair[0].wait() == 0 and lines(two) < STEPS - 10, pair[0].log.read_text()

    start(pair, two)
    assert pair[1].send_when(signal.SIGTERM, after(two, 2))  # one of the two is asked
    statuses, logs = end(pair)
    step = last_step(two)
    assert statuses == [0, 0], logs
    told = f"asked to stop: {two} has a checkpoint of step {step} of {STEPS}"
    assert all(told in log for log in logs) and lines(two) == step < STEPS, (step, logs)

    start(pair, two, train__save_every=STEPS)  # a death during a save has a test of its own
    assert pair[1].send_when(signal.SIGKILL, after(two, 2))
    died = time.monotonic()
    statuses, logs = end(pair)
    assert statuses[0] not in (0, -signal.SIGKILL) and statuses[1] == -signal.SIGKILL
    assert time.monotonic() - died < 3 * TIMEOUT
    assert "error: process 0 of 2 cannot go on: " in logs[0], logs[0]
    assert last_step(two) >= step

    start(pair, two)
    statuses, logs = end(pair)
    assert statuses == [0, 0], logs
    check_equal(two, want)


def test_a_death_during_a_save_is_not_called_a_full_disk(pair, tmp_path):
    two = tmp_path / "two"
    start(pair, two, train__save_every=1)

    def saving():
        return lines(two) >= 3 and any((two / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    assert pair[1].send_when(signal.SIGKILL, saving)
    statuses, logs = end(pair)
    assert statuses[0] not in (0, -signal.SIGKILL) and statuses[1] == -signal.SIGKILL
    # The run says it where a collective fails; where the process waits for the other one, jax itself ends it.
    told = "error: process 0 of 2 cannot go on: " in logs[0] or "another task died" in logs[0]
    assert told and "error: the checkpoint of" not in logs[0], logs[0]


def test_a_tensor_axis_across_processes_sees_every_row_of_the_batch(pair, want, tmp_path):
    start(pair, tmp_path / "two", mesh__data=1, mesh__tensor=2)
    statuses, logs = end(pair)
    assert statuses == [0, 0], logs
    check_equal(tmp_path / "two", want)


def test_processes_that_read_other_annotations_end_before_they_train(pair, data, tmp_path):
    other = tmp_path / "other.json"
    other.write_text((data / "data.json").read_text().replace("hello", "one"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for i, (server, path) in enumerate(zip(pair, (data / "data.json", other), strict=True)):
        fields = FIELDS | {"data__annotations": [str(path)]}
        server.start(tmp_path / "run", address=address, process=i, processes=2, **fields)
    statuses, logs = end(pair)
    assert statuses == [2, 2], logs
    for log in logs:
        assert "process 1 reads other content than process 0; give every machine the same" in log
    assert last_step(tmp_path / "run") is None
