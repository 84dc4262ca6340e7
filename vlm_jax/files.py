"""Files of the user: reading text and JSON, replacing a file or a folder in one step, and locking a workdir.

Every failure is a ConfigError of one line that names the file. Paths are local; buckets would be added here.
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
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from vlm_jax.settings.checks import ConfigError

log = logging.getLogger(__name__)

ImageSource = (
    str | bytes | Callable[[], bytes]
)  # a path, an encoded image, or what reads one when it is called

# Byte-order marks. The one of UTF-32 begins with that of UTF-16 and is therefore looked for first.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or in the encoding that its byte-order mark names (UTF-8, UTF-16 or UTF-32).

    Raises ConfigError with the file's name when it cannot be read, and with the line number of an invalid byte.
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
    if "\0" in text:  # UTF-16 without a byte-order mark, or a binary file
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{path}:{line}: byte 0x00 is in no text; save the file as UTF-8.")
    return text


def parse_json(text: str | bytes, where: str) -> Any:
    """Parses JSON. Raises ConfigError that begins with `where` when the text is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply to be read as JSON.") from error
    except ValueError as error:  # also UnicodeDecodeError, and a number of too many digits
        raise ConfigError(f"{where} is not valid JSON: {error}.") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError with the file's name when the file holds something else."""
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replaces a file in one step: whoever reads it finds the old content or the new one, also after a crash.

    Text becomes UTF-8. A symbolic link stays one, and what is no regular file (/dev/stdout) is written directly. Raises
    ConfigError with the file's name when it cannot be written; the old content then stays.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if Path(path).exists() and not Path(path).is_file():
            Path(path).write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; give another path, or free or mend the disk."
        ) from error


def _replace(target: Path, data: bytes) -> None:
    partial = target.with_name(f"{target.name}.{os.urandom(4).hex()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(
                file.fileno()
            )  # else a crash of the machine may leave the new name with no content
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(out: Path) -> Generator[Path, None, None]:
    """A folder to fill, which becomes `out` when the block ends and is removed when the block raises.

    Raises ConfigError when `out` exists and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} exists and is not empty; choose another directory.")
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Locked(ConfigError):
    """Another process holds a workdir."""


@contextlib.contextmanager
def lock(workdir: Path) -> Generator[None, None, None]:
    """Locks `workdir` for this process. The system releases the lock when the process ends, even by kill -9.

    Raises Locked when another process holds it. On a file system without locks a warning is logged instead.
    """
    with writing(workdir):
        file = (workdir / "lock").open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise Locked(
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
    """Turns an OSError raised in the block into a ConfigError about `path`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {str(path)!r}: {reason(error)}; free or mend the disk, then give the same command again."
        ) from error


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError when `folder` is not writable, or its disk has fewer than `num_bytes` free."""
    with tempfile.TemporaryFile(dir=folder):
        free = shutil.disk_usage(folder).free
    if free < num_bytes:
        needed = f"{num_bytes / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({needed})")


def reason(error: Exception) -> str:
    """The system's description of an error of Python or tensorstore, such as "No space left on device"."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"


def shown(path: str | Path) -> str:
    """A path relative to the current directory where it lies inside it, otherwise the absolute path."""
    absolute = os.path.abspath(path)
    inside = os.path.relpath(absolute)
    return absolute if inside.startswith("..") else inside
