"""Parts of an experiment: their order, the workers they run in, and how they end."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import toy_parts

from vlm_jax.settings import machine
from vlm_jax.settings.checks import ConfigError, RunEnded
from vlm_jax.sweeps import parts
from vlm_jax.sweeps.parts import Part


def part(tmp_path, name, call, *arguments, needs=(), cost=0.0):
    return Part(name, call, arguments, tmp_path / "logs" / f"{name}.txt", needs, cost)


def noting(tmp_path, name, needs=(), cost=0.0):
    return part(
        tmp_path, name, toy_parts.note, tmp_path, name, name.upper(), needs=needs, cost=cost
    )


def diamond(tmp_path):
    return [
        noting(tmp_path, "world"),
        noting(tmp_path, "eye", ("world",)),
        noting(tmp_path, "text", ("world",)),
        noting(tmp_path, "cell", ("eye", "text")),
    ]


def test_what_most_waits_for_is_begun_first(tmp_path):
    plan = [
        noting(tmp_path, "world"),
        noting(tmp_path, "eye", ("world",), 3.0),
        noting(tmp_path, "text", ("world",), 4.0),
        noting(tmp_path, "features", ("eye",)),
        noting(tmp_path, "short", ("features", "text"), 1.0),
        noting(tmp_path, "long", ("features",), 2.0),
    ]
    order = [p.name for p in parts.longest_first(plan)]
    assert order == ["world", "eye", "text", "features", "long", "short"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_part_is_run_once_those_it_needs_are_finished(tmp_path, processes):
    done = list(parts.run(diamond(tmp_path), processes, tmp_path))
    values = {d.part.name: d.value for d in done}
    order = (tmp_path / "order").read_text().split()
    assert sorted(order) == ["cell", "eye", "text", "world"]
    assert order[0] == "world" and order[-1] == "cell"
    assert [values[name][0] for name in order] == [name.upper() for name in order]
    pids = {pid for _, pid in values.values()}
    if processes == 1:
        assert pids == {os.getpid()}
    else:
        assert os.getpid() not in pids and len(pids) <= 2
        assert (tmp_path / "logs" / "eye.txt").read_text() == "eye says\n"


def test_a_crash_is_told_by_name_and_costs_only_what_needs_the_part(tmp_path, caplog):
    plan = [
        part(tmp_path, "eye", toy_parts.crash, cost=9.0),
        part(tmp_path, "ear", toy_parts.fall),
        noting(tmp_path, "text"),
        noting(tmp_path, "cell", ("eye", "text")),
        noting(tmp_path, "other", ("text",)),
    ]
    found = []
    with caplog.at_level(logging.ERROR), pytest.raises(RunEnded) as end:
        for done in parts.run(plan, 2, tmp_path):
            found.append(done.part.name)
    assert found == ["text", "other"] and end.value.exit_code == 1
    assert sorted(str(end.value).split(" failed; ")[0].split(", ")) == ["ear", "eye"]
    assert "2 of 5 parts are finished; the same command goes on" in str(end.value)
    assert "eye failed: its process ended (killed by SIGKILL); its log is" in caplog.text
    assert "ear failed: ZeroDivisionError: by nothing" in caplog.text
    assert "Traceback" in (tmp_path / "logs" / "ear.txt").read_text()


def test_a_mistake_of_the_user_ends_the_run_with_its_words(tmp_path):
    plan = [
        part(tmp_path, "cell", toy_parts.refuse),
        noting(tmp_path, "next", ("cell",)),
    ]
    with pytest.raises(ConfigError, match=r"^cell: the setting x is wrong; use y\.$"):
        list(parts.run(plan, 2, tmp_path))
    assert not (tmp_path / "order").exists()


@pytest.mark.parametrize("kind", parts.SIGNALS)
def test_a_request_to_stop_lets_trainings_save_and_begins_nothing_new(tmp_path, kind):
    def ask():
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), kind)

    before = [signal.getsignal(kind) for kind in parts.SIGNALS]
    threading.Thread(target=ask, daemon=True).start()
    plan = [
        part(tmp_path, "training", toy_parts.train, tmp_path),
        noting(tmp_path, "next", ("training",)),
    ]
    with pytest.raises(RunEnded, match="asked to stop: 0 of 2 parts are finished") as end:
        list(parts.run(plan, 2, tmp_path))
    assert end.value.exit_code == 0
    assert (tmp_path / "checkpoint").read_text() == "saved"
    assert not (tmp_path / "order").exists()
    assert [signal.getsignal(kind) for kind in parts.SIGNALS] == before


def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    code = (
        "import pathlib, sys, toy_parts\n"
        "from vlm_jax.sweeps import parts\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    plan = [parts.Part('training', toy_parts.train, (folder,), folder / 'log')]\n"
        "    list(parts.run(plan, 2, folder))\n"
    )
    script = tmp_path / "main.py"
    script.write_text(code)
    paths = [str(Path(parts.__file__).parents[1]), str(Path(toy_parts.__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    begun = tmp_path / "begun"
    while not (begun.exists() and begun.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    worker = Path("/proc") / begun.read_text()
    deadline = time.monotonic() + 60  # hung, not slow
    while worker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists() and not (tmp_path / "checkpoint").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_a_worker_computes_with_one_thread_and_keeps_what_it_compiled(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    plan = [part(tmp_path, "one", toy_parts.compile_and_count)]
    assert [done.value for done in parts.run(plan, 2, tmp_path / "compiled")] == [1]
    assert any(path.is_file() for path in (tmp_path / "compiled").rglob("jit_*"))
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ and "NPROC" not in os.environ


def test_there_are_as_many_processes_as_cores_but_no_more_than_are_useful(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 6)
    assert [parts.how_many(0, useful) for useful in (1, 4, 13)] == [1, 4, 6]
    assert [parts.how_many(asked, 4) for asked in (1, 3, 9)] == [1, 3, 4]
    assert parts.how_many(5, 0) == 1
    with pytest.raises(ConfigError, match="sweep: processes must be at least 1, or 0 for one per"):
        parts.how_many(-1, 4)
