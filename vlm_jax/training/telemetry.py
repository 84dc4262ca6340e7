"""What a run reports: metrics.jsonl with every step, TensorBoard, a progress bar or plain lines, and the MFU."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2  # the types in it are made when it is imported
from tensorboardX.summary import scalar

from vlm_jax import files
from vlm_jax.files import Path, to_path
from vlm_jax.progress import Bar

log = logging.getLogger(__name__)

UPLOAD = 60.0  # seconds between two writes of TensorBoard's file to a bucket
Notice = Callable[[Mapping[str, Any], Sequence[str]], None]


class Metrics:
    """The scalars of every step. They stay on the device until a block of them is written, so that no step waits for the host."""

    def __init__(
        self,
        workdir: Path,
        last_step: int,
        writes: bool,
        notice: Notice,
        still_ours: Callable[[], None] = lambda: None,
    ):
        """Continues the files of `workdir` after `last_step`; later lines are of an interrupted run and are dropped.

        writes: False on all processes but the first. notice: called with the line and the record ids of each step that
        was skipped, once all lines of its block are on disk. still_ours: called before each write; raises when another run
        has taken the workdir over.
        """
        self._pending: list[tuple[int, Mapping[str, Any], Sequence[str]]] = []
        self._file: files.Lines | None = None
        self._board: Board | None = None
        self._still_ours = still_ours
        self._notice, self._path = notice, workdir / "metrics.jsonl"
        self.last: dict[str, float] = {"skipped": 0}
        kept = [line for line in read_lines(self._path) if line["step"] <= last_step]
        if kept:
            self.last |= kept[-1]
        if writes:
            with files.writing(self._path):
                whole = "".join(json.dumps(line) + "\n" for line in kept)
                self._file = files.Lines(self._path, whole.encode())
                self._board = Board(workdir / "tensorboard", last_step + 1)

    def append(self, step: int, scalars: Mapping[str, Any], ids: Sequence[str]) -> None:
        """Adds a step without waiting for its scalars. scalars: name -> device scalar or number, including "skipped".

        ids: the records of this process's rows.
        """
        for value in scalars.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._pending.append((step, scalars, ids))

    def flush(self, up_to: int) -> None:
        """Writes the steps <= up_to, waiting until they are computed and on disk.

        "skipped" becomes the number of steps skipped so far. Raises ConfigError when the disk is full, and what `notice`
        raises.
        """
        ready = [entry for entry in self._pending if entry[0] <= up_to]
        self._pending = self._pending[len(ready) :]
        left_out: list[tuple[dict[str, float], Sequence[str]]] = []
        self._still_ours()
        with files.writing(self._path):
            for step, scalars, ids in ready:
                line = {"step": step} | {name: _number(value) for name, value in scalars.items()}
                if line["skipped"]:
                    left_out.append((line, ids))
                line["skipped"] = int(self.last["skipped"] + line["skipped"])
                self.last = line
                if self._file is not None and self._board is not None:
                    self._file.write(json.dumps(line) + "\n")
                    self._board.write("train", step, line)
            if self._file is not None:
                self._file.flush()
        for line, ids in left_out:
            self._notice(line, ids)

    def board(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes numbers to TensorBoard alone: those that differ from run to run, such as tokens per second."""
        if self._board is not None:
            with files.writing(self._path):
                self._board.write("speed", step, scalars)
                self._board.flush()

    def close(self) -> None:
        if self._file is not None and self._board is not None:
            with files.writing(self._path):
                self._file.close()  # where this fails, TensorBoard's file would fail as well, after as long a wait
                self._board.close()


class Board:
    """A TensorBoard file, written in the calling thread: the thread of tensorboardX dies when the disk is full, and adding a
    number then blocks for ever."""

    def __init__(self, folder: Path, purge_step: int):
        """folder: on a bucket, gets the file anew every UPLOAD seconds and at the end.

        purge_step: TensorBoard ignores this and later steps in the older files of `folder`.
        """
        self._bucket = folder if isinstance(folder, files.BucketPath) else None
        self._uploaded = time.monotonic()
        self._scratch = tempfile.TemporaryDirectory() if self._bucket else None
        self._local = str(folder) if self._scratch is None else self._scratch.name
        to_path(self._local).mkdir(exist_ok=True)
        self._events = EventsWriter(f"{self._local}/events")
        log_type = event_pb2.SessionLog  # pyrefly: ignore[missing-attribute]
        self._add(purge_step, file_version="brain.Event:2")
        self._add(purge_step, session_log=log_type(status=log_type.START))

    def write(self, group: str, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._add(step, summary=scalar(f"{group}/{name}", value))

    def _add(self, step: int, **field: Any) -> None:
        event = event_pb2.Event(step=step, wall_time=time.time(), **field)  # pyrefly: ignore[missing-attribute]
        self._events.write_event(event)

    def flush(self) -> None:
        self._events.flush()
        if self._bucket is not None and time.monotonic() - self._uploaded > UPLOAD:
            files.upload(self._local, self._bucket)
            self._uploaded = time.monotonic()

    def close(self) -> None:
        self._events.close()
        if self._bucket is not None and self._scratch is not None:
            with self._scratch:
                files.upload(self._local, self._bucket)


def _number(value: Any) -> float | int:
    return np.asarray(value).item()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, without a last line that a crash cut short."""
    if not path.is_file():
        return []
    with files.reading(path):
        text = files.read_grown(path).decode()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [files.parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


class Display:
    """The progress of a run: a bar on a terminal, elsewhere one log line per report."""

    def __init__(self, total: int, done: int, shows: bool):
        self._total = total
        self._last_time, self._last_step = time.perf_counter(), done
        self._work: list[
            tuple[int, int, float]
        ] = []  # step, tokens, FLOPs of the steps not yet counted
        self._bar = Bar("train", total, done, "compiling", shows)
        self.held_out: float | None = None  # the newest held-out loss
        self._shows = shows

    def add(self, step: int, tokens: int, flops: float) -> None:
        """Notes the tokens and FLOPs of a step that was just dispatched."""
        self._work.append((step, tokens, flops))

    def first(self, scalars: Mapping[str, float]) -> None:
        """Shows the loss of the first step without a speed, because its time is mostly compilation."""
        seconds = time.perf_counter() - self._last_time
        step = int(scalars["step"])
        self.speed(step, None)  # the next speed starts here
        self._tell(step, f"loss {scalars['loss']:.4f}", f"first step after {_duration(seconds)}")

    def speed(self, step: int, peak: float | None) -> dict[str, float]:
        """Speed since the last call up to `step`, which is now computed: steps/s, tokens/s and, if `peak` is given, MFU.

        peak: FLOP/s of all chips. MFU lies in [0, 1]. The result is empty when no step was computed since the last call.
        """
        if step == self._last_step:
            return {}
        now = time.perf_counter()
        seconds = max(now - self._last_time, 1e-9)
        done = [entry for entry in self._work if entry[0] <= step]
        self._work = self._work[len(done) :]
        found = {
            "steps_per_second": (step - self._last_step) / seconds,
            "tokens_per_second": sum(tokens for _, tokens, _ in done) / seconds,
        }
        self._last_time, self._last_step = now, step
        return found | ({"mfu": sum(flops for *_, flops in done) / seconds / peak} if peak else {})

    def report(self, scalars: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """Shows one step. scalars: its line of metrics.jsonl. speed: what `speed` returned."""
        step = int(scalars["step"])
        text = f"loss {scalars['loss']:.4f}  {speed['tokens_per_second']:,.0f} tokens/s"
        if self.held_out is not None:
            text += f"  held out {self.held_out:.4f}"
        if "mfu" in speed:
            text += f"  MFU {speed['mfu']:.1%}"
        if scalars["bad_records"]:
            text += f"  {scalars['bad_records']} bad records"
        if scalars["skipped"]:
            text += f"  {scalars['skipped']} steps left out"
        left = (self._total - step) / speed["steps_per_second"]
        self._tell(step, text, f"{_duration(left)} left")

    def _tell(self, step: int, text: str, time_text: str) -> None:
        """time_text: shown in the log line only; a bar estimates the time itself."""
        if self._bar.is_shown:
            self._bar.update(step, text)
        elif self._shows:
            log.info("step %d/%d  %s  %s", step, self._total, text, time_text)

    def close(self) -> None:
        self._bar.close()


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
