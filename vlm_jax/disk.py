"""The workdir as a disk: one run at a time in it, and one clear line when nothing more can be written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Generator
from pathlib import Path

from vlm_jax.config import ConfigError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def lock(workdir: Path) -> Generator[None, None, None]:
    """Holds `workdir` for this process. The lock dies with the process, also by kill -9, so none is ever stale.

    Raises ConfigError when another process holds it. A file system without locks is told in the log and not locked.
    """
    with writing(workdir):
        file = (workdir / "lock").open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"--workdir: {file.read().strip() or 'another process'} is training in {str(workdir)!r}; wait for it, stop "
                "it, or give another workdir."
            ) from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): start one run there only", workdir, error)
        with writing(workdir):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


@contextlib.contextmanager
def writing(path: Path) -> Generator[None, None, None]:
    """Turns an OSError inside into a ConfigError about `path`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {str(path)!r}: {reason(error)}; free or mend the disk, then give the same command again."
        ) from error


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError when no file can be made in `folder` or fewer than `num_bytes` are free on its disk."""
    with tempfile.TemporaryFile(dir=folder):
        free = shutil.disk_usage(folder).free
    if free < num_bytes:
        needed = f"{num_bytes / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({needed})")


def reason(error: Exception) -> str:
    """The system's words for what went wrong ("No space left on device"), from Python's errors and tensorstore's."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
