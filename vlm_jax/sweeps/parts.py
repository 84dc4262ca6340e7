"""The parts of a long experiment, some of which need others: one after the other, or side by side in worker processes.

A worker runs one part after the other on one thread: many small programs on a core each get more done than one program
that splits its small products over all cores. Python, jax and compiled programs are loaded once per worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Literal, NamedTuple

from vlm_jax import files
from vlm_jax.progress import Bar
from vlm_jax.settings import logs, machine
from vlm_jax.settings.checks import ConfigError, RunEnded

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOK_EVERY = (
    1.0  # seconds between looks for a request to stop, and between the requests that are passed on
)
# XLA's CPU client takes the number of its threads from NPROC (measured with jax 0.10; the others are for NumPy).
ONE_THREAD = {"NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True)
class Part:
    """A call of a function of a module, whose result is also on disk, so that it returns at once when it was finished."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    log: files.Path  # where a worker writes what the part logs
    needs: tuple[str, ...] = ()  # names of parts of the same run that must be finished before
    cost: float = 0.0  # in any unit; the longest are begun first


class Done(NamedTuple):
    part: Part
    value: Any  # what its call returned
    seconds: float


class Outcome(NamedTuple):
    """How a part ended in a worker: with a result, a ConfigError, a request to stop, or anything else."""

    kind: Literal["done", "refused", "stopped", "failed"]
    value: Any  # what the call returned, or one line of text


class Clock:
    """Wall-clock seconds of each part, kept in a file for when the sweep is resumed. others: the files of other machines."""

    def __init__(self, path: files.Path, others: Sequence[files.Path] = ()):
        self.path = path
        self.seconds: dict[str, float] = {}
        for known in (*others, path):
            if known.is_file():
                self.seconds |= files.read_json(known)

    def note(self, name: str, seconds: float) -> None:
        """Keeps the first time of a part, which did its work."""
        self.seconds.setdefault(name, round(seconds, 1))
        files.write_whole(self.path, json.dumps(self.seconds, indent=1))


def how_many(asked: int, useful: int) -> int:
    """The number of worker processes: `asked`, or if that is 0 one per usable CPU core, 1 on other devices; at most `useful`.

    Raises ConfigError for a negative number. 0 loads jax where there are several cores.
    """
    if asked < 0:
        raise ConfigError(
            f"sweep: processes must be at least 1, or 0 for one per CPU core; got {asked}."
        )
    most = min(asked or machine.cores(), useful)
    if asked or most <= 1:
        return max(most, 1)
    import jax  # here, not above: it takes seconds, and a number needs none of it

    return most if jax.default_backend() == "cpu" else 1  # one process holds a GPU or TPU


def run(parts: Sequence[Part], processes: int, folder: files.Path) -> Generator[Done, None, None]:
    """Runs every part once, after those it needs, and yields each as soon as it is finished.

    processes: 1 runs the parts in this process, in their order. With more, each runs in a worker of one thread and writes what
    it logs to its own file; SIGINT and SIGTERM (in the main thread) end the workers, whose trainings save a checkpoint first.
    folder: keeps compiled programs, which the workers share, unless JAX_COMPILATION_CACHE_DIR is set.

    Raises what a part raises; with several processes ConfigError for the first part that raises it, when the others have
    stopped; and RunEnded after a request to stop, or at the end when parts failed in another way, which does not keep parts
    that do not need them from being run.
    """
    if processes > 1:
        yield from _side_by_side(parts, processes, folder)
        return
    for part in parts:
        log.info("%s ...", part.name)
        start = time.monotonic()
        value = part.call(*part.arguments)
        yield Done(part, value, time.monotonic() - start)


def longest_first(parts: Sequence[Part]) -> list[Part]:
    """The parts by the cost of the longest chain that begins with them: what much waits for comes first."""
    chains: dict[str, float] = {}
    for part in reversed(parts):  # a part stands after those it needs
        after = (chains[other.name] for other in parts if part.name in other.needs)
        chains[part.name] = part.cost + max(after, default=0.0)
    return sorted(parts, key=lambda part: -chains[part.name])


def _side_by_side(
    parts: Sequence[Part], processes: int, folder: files.Path
) -> Generator[Done, None, None]:
    waiting = longest_first(parts)
    left = {part.name for part in parts}  # not finished
    failed: list[str] = []
    refused = ""
    with (
        _Request() as request,
        _Crew(min(processes, len(parts)), folder) as crew,
        Bar("parts", len(parts)) as bar,
    ):
        while True:
            while not (request.made or refused) and crew.has_room:
                part = next((p for p in waiting if left.isdisjoint(p.needs)), None)
                if part is None:
                    break
                waiting.remove(part)
                crew.begin(part)
            if not crew.running:
                break
            bar.update(len(parts) - len(left), ", ".join(crew.running))
            for part, outcome, seconds in crew.ended(LOOK_EVERY):
                if outcome.kind == "done":
                    left.remove(part.name)
                    yield Done(part, outcome.value, seconds)
                elif outcome.kind == "refused":
                    refused = refused or f"{part.name}: {outcome.value}"
                elif outcome.kind == "stopped":
                    request.made = True
                else:
                    failed.append(part.name)
                    log.error("%s failed: %s; its log is %s", part.name, outcome.value, part.log)
            if request.made or refused:
                crew.stop()
    done = f"{len(parts) - len(left)} of {len(parts)} parts are finished"
    _conclude(refused, request.made, failed, done)


def _conclude(refused: str, asked_to_stop: bool, failed: Sequence[str], done: str) -> None:
    """Raises what `run` raises at the end; nothing when all went well."""
    goes_on = f"{done}; the same command goes on from there."
    if refused:
        raise ConfigError(refused)
    if asked_to_stop:
        raise RunEnded(f"asked to stop: {goes_on}", exit_code=0)
    if failed:
        raise RunEnded(f"{', '.join(failed)} failed; {goes_on}", exit_code=1)


class _Request:
    """A context manager that notes SIGINT and SIGTERM; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.made = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Request:
        self._before = {kind: signal.signal(kind, self._note) for kind in SIGNALS}
        return self

    def __exit__(self, *reason: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _note(self, kind: int, frame: FrameType | None) -> None:
        if self.made and kind == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.made:
            log.info("stopping: trainings save a checkpoint first; Ctrl-C again ends them at once")
        self.made = True


# --- workers, seen from the process that starts them ------------------------------------------------------------------


@dataclasses.dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    part: Part | None = None  # that it runs
    start: float = 0.0  # of that part, time.monotonic


class _Crew:
    """Up to `size` worker processes; a context manager that ends them, at once when its block raises."""

    def __init__(self, size: int, folder: files.Path):
        self._size = size
        cache = {
            # By machine: the instructions of a compiled program are those of the processor it was compiled on.
            "JAX_COMPILATION_CACHE_DIR": str(folder / platform.node()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        chosen = "JAX_COMPILATION_CACHE_DIR" in os.environ
        self._environment = ONE_THREAD if chosen else ONE_THREAD | cache
        self._workers: list[_Worker] = []

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, kind: object, *reason: object) -> None:
        for worker in self._workers:
            if kind is None:
                worker.connection.close()  # a worker that waits for a part ends
            else:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    @property
    def running(self) -> list[str]:
        """The names of the parts under way."""
        return [worker.part.name for worker in self._workers if worker.part]

    @property
    def has_room(self) -> bool:
        return len(self.running) < self._size

    def begin(self, part: Part) -> None:
        """Gives the part to a worker that has none; there must be room for it."""
        idle = [worker for worker in self._workers if worker.part is None]
        worker = idle[0] if idle else self._hire()
        worker.part, worker.start = part, time.monotonic()
        worker.connection.send(part)

    def ended(self, timeout: float) -> list[tuple[Part, Outcome, float]]:
        """The parts that ended within `timeout` seconds, with how and after how many seconds. Waits for one only."""
        ready = wait([worker.connection for worker in self._workers if worker.part], timeout)
        found = []
        for worker in [worker for worker in self._workers if worker.connection in ready]:
            part, worker.part = worker.part, None
            assert part is not None
            try:
                outcome = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join()
                self._workers.remove(worker)
                outcome = Outcome("failed", f"its process ended ({_exit(worker.process.exitcode)})")
            found.append((part, outcome, time.monotonic() - worker.start))
        return found

    def stop(self) -> None:
        """Asks every part to end. A training saves a checkpoint and ends; anything else takes no notice and is finished."""
        for worker in self._workers:
            if worker.part:
                worker.process.terminate()

    def _hire(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        own, its = context.Pipe()
        process = context.Process(target=_work, args=(its,))
        # Signals wait until the worker has its own way with them, and jax reads the environment when it is imported.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with _environment(self._environment):
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        its.close()
        worker = _Worker(process, own)
        self._workers.append(worker)
        return worker


def _exit(code: int | None) -> str:
    return f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Generator[None, None, None]:
    """Environment variables for processes that are started in the block."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- inside a worker --------------------------------------------------------------------------------------------------


def _work(connection: Connection) -> None:
    """Runs the parts that come through `connection` and sends back their outcomes, until it is closed.

    Both signals are ignored but in a training, which handles them itself (training/interrupt.py): who started the worker asks
    again until the part has ended.
    """
    for kind in SIGNALS:
        signal.signal(kind, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logs.start()
    while True:
        try:
            part = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(part))


def _attempt(part: Part) -> Outcome:
    if not isinstance(part.log, files.BucketPath):
        return _logged(part, part.log)
    with tempfile.NamedTemporaryFile() as local:  # a log on a bucket is there when the part ends
        outcome = _logged(part, files.to_path(local.name))
        sys.stdout.flush()
        sys.stderr.flush()
        with files.Lines(part.log) as lines:
            lines.write(files.read_bytes(local.name).decode("utf-8", "replace"))
        return outcome


def _logged(part: Part, path: files.Path) -> Outcome:
    try:
        _write_to(path)
        return Outcome("done", part.call(*part.arguments))
    except ConfigError as error:
        log.error("%s", error)
        return Outcome("refused", str(error))
    except RunEnded as end:
        log.error("%s", end)
        return Outcome("failed" if end.exit_code else "stopped", str(end))
    except Exception as error:
        traceback.print_exc()
        return Outcome("failed", " ".join(f"{type(error).__name__}: {error}".split())[:300])


def _write_to(path: files.Path) -> None:
    """From now on everything this process writes, XLA's own lines too, is appended to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even by kill -9: two must not train in one workdir."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
