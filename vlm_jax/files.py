"""The one door to what users' paths name: text and JSON that are read or refused in one line, and the workdir as a disk.

One run at a time works in a workdir, and what cannot be written is told in one line.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from vlm_jax.settings.checks import ConfigError

log = logging.getLogger(__name__)

# Byte-order marks; UTF-32's begins with UTF-16's, so it comes first.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or in the encoding that its byte-order mark names (UTF-8, UTF-16 or UTF-32).

    Raises ConfigError with the file's name when it cannot be read, and with the line of a byte that is no text.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte, name = (
            data[error.start : error.start + 1].hex(),
            encoding.upper().removesuffix("-SIG"),
        )
        raise ConfigError(
            f"{path}:{line}: byte 0x{byte} is no character in {name}; save the file as UTF-8."
        ) from error
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{path}:{line}: byte 0x00 is in no text; save the file as UTF-8.")
    return text


def parse_json(text: str | bytes, where: str) -> Any:
    """What JSON says. Raises ConfigError that begins with `where` when it is not valid or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply to be read as JSON.") from error
    except ValueError as error:  # also UnicodeDecodeError, and a number of too many digits
        raise ConfigError(f"{where} is not valid JSON: {error}.") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ConfigError with the file's name when it holds none."""
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file in UTF-8. Raises ConfigError with its name when it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; give another path."
        ) from error


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
