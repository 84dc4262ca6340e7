"""Two runs in one workdir are noticed: by a lock of the file system, or on a bucket by an object that is renewed.

gs://: the object `lock` of a workdir names its holder, who writes it anew every BEAT seconds, each time on the condition that
it is still the version he wrote before. A start finds it: renewed within DEAD seconds (by the bucket's clock) it is held, and
the start ends after waiting at most that long; older, or of a process of this machine that is gone, it is taken over, which
only one of several can do. A holder that was cut off for longer than DEAD and replaced meanwhile notices at its next beat.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

from vlm_jax.files.buckets import BucketPath, plain, told
from vlm_jax.files.paths import Path, writing
from vlm_jax.settings.checks import ConfigError

log = logging.getLogger(__name__)
BEAT, DEAD = 10.0, 30.0  # seconds


class Locked(ConfigError):
    """Another process holds a workdir."""


def _locked(holder: str, workdir: Path) -> Locked:
    return Locked(
        f"--workdir: {holder or 'another process'} is training in {str(workdir)!r}; wait for it, stop "
        "it, or give another workdir."
    )


@contextlib.contextmanager
def lock(workdir: Path) -> Generator[Callable[[], None], None, None]:
    """Locks `workdir` for this process; gives a function that raises Locked once another process has taken it over.

    A local lock is released by the system when the process ends, even by kill -9; that of a bucket is then free after DEAD
    seconds, on the same machine at once. Raises Locked when another process holds it. Where nothing can be locked (a file
    system without locks, s3://) a warning is logged instead.
    """
    if isinstance(workdir, BucketPath):
        with _Lease(workdir) if str(workdir).startswith("gs://") else _unlocked(workdir) as check:
            yield check
        return
    with writing(workdir):
        file = (workdir / "lock").open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise _locked(file.read().strip(), workdir) from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): start one run there only", workdir, error)
        with writing(workdir):
            file.truncate(0)
            file.write(f"{_name()}\n")
            file.flush()
        yield lambda: None


@contextlib.contextmanager
def _unlocked(workdir: Path) -> Generator[Callable[[], None], None, None]:
    log.warning("%s cannot be locked: start one run there only", workdir)
    yield lambda: None


def _name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class _Lease:
    """The object `lock` of a workdir on GCS, held while the block runs."""

    def __init__(self, workdir: BucketPath):
        self._workdir, self._path = workdir, workdir / "lock"
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "id": secrets.token_hex(8)}
        self._lost: str | None = None
        self._end = threading.Event()

    def __enter__(self) -> Callable[[], None]:
        from google.cloud import storage  # what gcsfs itself needs

        bucket, _, name = str(self._path).removeprefix("gs://").partition("/")
        with writing(self._workdir):
            self._bucket = told(self._workdir, lambda: storage.Client()).bucket(bucket)
            self._name = name
            self._generation = self._take()
        threading.Thread(target=self._beat, daemon=True, name="lease").start()
        return self.check

    def __exit__(self, *_: object) -> None:
        self._end.set()
        with contextlib.suppress(Exception):  # the next start takes it over after DEAD seconds
            self._bucket.blob(self._name).delete(if_generation_match=self._generation, timeout=5, retry=None)  # fmt: skip

    def check(self) -> None:
        """Raises Locked when another process has taken the workdir over."""
        if self._lost is not None:
            raise Locked(
                f"--workdir: {self._lost} took {str(self._workdir)!r} over while this process could not reach the bucket; "
                "it goes on there, this one ends."
            )

    def _take(self) -> int:
        generation, seen = self._put(0), None
        while generation is None:
            current = told(self._path, lambda: self._bucket.get_blob(self._name))
            if current is None:
                generation = self._put(0)
                continue
            holder = self._read(current)
            if holder.get("id") == self._mine["id"]:  # our own write, whose answer was lost
                return int(current.generation or 0)
            if seen not in (None, current.generation):
                raise _locked(_shown(holder), self._workdir)
            left = 0.0 if self._is_gone(holder) else DEAD - self._age(current)
            if left <= 0:
                generation = self._put(int(current.generation or 0))
                continue
            if seen is None:
                log.info("%s is held by %s: waiting up to %.0f s for a sign of life", self._workdir, _shown(holder), left)  # fmt: skip
            seen = current.generation
            time.sleep(min(left, 1.0))
        return generation

    def _put(self, generation: int) -> int | None:
        """Writes the object if its version is `generation` (0: there is none). The new version; None if it is another."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        text = json.dumps(self._mine)
        try:
            blob.upload_from_string(text, if_generation_match=generation)
        except PreconditionFailed:
            return None
        except Exception as error:
            raise plain(error, self._path) from error
        return int(blob.generation or 0)

    def _read(self, blob: Any) -> dict[str, Any]:
        try:
            found = json.loads(blob.download_as_bytes())
        except Exception:  # deleted or replaced meanwhile, or not ours: looked at again
            return {}
        return found if isinstance(found, dict) else {}

    def _is_gone(self, holder: dict[str, Any]) -> bool:
        """Whether the holder was a process of this machine that does not exist any more."""
        if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def _age(self, blob: Any) -> float:
        """Seconds since the object was written, by the bucket's clock: that of an object written now."""
        probe = self._bucket.blob(f"{self._name}.{self._mine['id']}")
        told(self._path, lambda: probe.upload_from_string("now"))
        now = probe.updated
        told(self._path, probe.delete)
        return (now - blob.updated).total_seconds()

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            try:
                generation = self._put(self._generation)
            except OSError as error:
                log.warning("%s: %s", self._path, error.strerror)  # tried again at the next beat
                continue
            if generation is not None:
                self._generation = generation
                continue
            holder = self._find()
            if holder.get("id") != self._mine["id"]:
                self._lost = _shown(holder)
                return

    def _find(self) -> dict[str, Any]:
        """Who holds the object now; also takes over the version of an own write whose answer was lost."""
        blob = self._bucket.get_blob(self._name)
        holder = self._read(blob) if blob else {}
        if blob and holder.get("id") == self._mine["id"]:
            self._generation = int(blob.generation or 0)
        return holder


def _shown(holder: dict[str, Any]) -> str:
    if not {"pid", "host"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on {holder['host']}"
