"""Files of the user, on a disk or in a bucket: reading text and JSON, replacing a file or a folder in one step.

Every failure is a ConfigError of one line that names the file. `to_path` is where text becomes a path.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fnmatch
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vlm_jax.files.buckets import BucketPath, told
from vlm_jax.settings.addresses import scheme
from vlm_jax.settings.checks import ConfigError

Path = pathlib.Path | BucketPath

ImageSource = (
    str | bytes | Callable[[], bytes]
)  # a path, an encoded image, or what reads one when it is called

# Byte-order marks. The one of UTF-32 begins with that of UTF-16 and is therefore looked for first.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def to_path(path: str | os.PathLike[str]) -> Path:
    """The path that a text names: of this machine, or for gs://bucket/name and s3://bucket/name of a bucket.

    Raises ConfigError when the package for that bucket is not installed.
    """
    text = os.fspath(path)
    return pathlib.Path(text) if scheme(text) is None else BucketPath(text)


def is_file(path: str | Path) -> bool:
    return to_path(path).is_file()


def is_dir(path: str | Path) -> bool:
    return to_path(path).is_dir()


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; raises OSError."""
    return to_path(path).read_bytes()


def read_span(path: str | Path, start: int, end: int) -> bytes:
    """The bytes [start, end) of a file; raises OSError."""
    place = to_path(path)
    if isinstance(place, BucketPath):
        return place.read_range(start, end)
    # Read and not mapped: a file cut short under a mapping kills the process (SIGBUS). Opened anew (10 us), so that threads
    # share no file.
    with place.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), end - start, start)


def stamp(path: str | Path) -> tuple[str | int, int]:
    """(time or version, bytes) of a file: differs once it was written again. Raises OSError."""
    place = to_path(path)
    if isinstance(place, BucketPath):
        return place.stamp()
    status = place.stat()
    return status.st_mtime_ns, status.st_size


def local_file(path: str | Path) -> pathlib.Path:
    """The file itself where it is local; else a copy of it in the cache of this machine, which all processes share.

    For libraries that only read disks, and for files that are read at many places in no order. Raises OSError.
    """
    place = to_path(path)
    if not isinstance(place, BucketPath):
        return place
    return _copied(str(place.parent), ((place.name, place.stamp()),)) / place.name


def local_copy(folder: str | Path, patterns: Sequence[str]) -> str:
    """`folder` itself where it is local; else a folder of the cache with its files of these names. Raises OSError."""
    place = to_path(folder)
    if not isinstance(place, BucketPath):
        return os.fspath(folder)
    names = [p.name for p in place.iterdir() if any(fnmatch.fnmatch(p.name, x) for x in patterns)]
    return str(_copied(str(place), tuple((name, (place / name).stamp()) for name in names)))


@functools.lru_cache(64)
def _copied(folder: str, found: tuple[tuple[str, tuple[str, int]], ...]) -> pathlib.Path:
    """~/.cache/vlm_jax/buckets/<digest of addresses and versions>, filled once: another process sees all of it or nothing."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(repr((folder, found)).encode()).hexdigest()[:32]
    target = pathlib.Path(home) / "vlm_jax" / "buckets" / digest
    if target.is_dir():
        return target
    partial = target.with_name(f"{digest}.{os.urandom(4).hex()}.partial")
    partial.mkdir(parents=True)
    place = BucketPath(folder)

    def copy(name: str) -> None:
        told(place / name, lambda: place.system.get_file(str(place / name), str(partial / name)))

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(copy, (name for name, _ in found)))
        with contextlib.suppress(OSError):  # another process was faster
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or in the encoding that its byte-order mark names (UTF-8, UTF-16 or UTF-32).

    Raises ConfigError with the file's name when it cannot be read, and with the line number of an invalid byte.
    """
    try:
        data = to_path(path).read_bytes()
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
    place = to_path(path)
    try:
        if isinstance(place, BucketPath) or (place.exists() and not place.is_file()):
            place.write_bytes(data)
        else:
            _replace(pathlib.Path(os.path.realpath(path)), data)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; give another path, or free or mend the disk."
        ) from error


def _replace(target: pathlib.Path, data: bytes) -> None:
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
def whole_file(path: Path) -> Generator[pathlib.Path, None, None]:
    """A local file to write, which becomes `path` when the block ends and is removed when the block raises."""
    with tempfile.TemporaryDirectory(dir=None if isinstance(path, BucketPath) else path.parent) as folder:  # fmt: skip
        local = pathlib.Path(folder) / path.name
        yield local
        if isinstance(path, BucketPath):
            told(path, lambda: path.system.put_file(str(local), str(path)))
        else:
            local.replace(path)


@contextlib.contextmanager
def whole_folder(out: Path) -> Generator[pathlib.Path, None, None]:
    """A local folder to fill, which becomes `out` when the block ends and is removed when the block raises.

    In a bucket its files are written when the block ends, config.json, by which a model is known, as the last one.

    Raises ConfigError when `out` exists and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} exists and is not empty; choose another directory.")
    if isinstance(out, BucketPath):
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)
            upload(pathlib.Path(folder), out)
        return
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


@contextlib.contextmanager
def writing(path: Path) -> Generator[None, None, None]:
    """Turns an OSError raised in the block into a ConfigError about `path`."""
    try:
        yield
    except OSError as error:
        mend = "mend that" if isinstance(path, BucketPath) else "free or mend the disk"
        raise ConfigError(
            f"cannot write {str(path)!r}: {reason(error)}; {mend}, then give the same command again."
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Generator[None, None, None]:
    """Turns an OSError or UnicodeDecodeError raised in the block into a ConfigError about `path`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: {error.reason}; restore it, or delete it."
        ) from error


def upload(source: str | pathlib.Path, target: BucketPath) -> None:
    """Writes the files of a local folder, at any depth, below `target`; config.json as the last one."""
    source = pathlib.Path(source)
    found = sorted(path for path in source.rglob("*") if path.is_file())

    def put(path: pathlib.Path) -> None:
        there = target / str(path.relative_to(source))
        told(there, functools.partial(target.system.put_file, str(path), str(there)))

    with writing(target), ThreadPoolExecutor(16) as pool:
        list(pool.map(put, (path for path in found if path.name != "config.json")))
        list(pool.map(put, (path for path in found if path.name == "config.json")))


def can_hold(folder: str | Path) -> bool:
    """Whether a file can be written into `folder` as it is: it exists, or it is of a bucket, where none has to be made."""
    place = to_path(folder)
    return isinstance(place, BucketPath) or place.is_dir()


def copy(source: Path, target: pathlib.Path) -> None:
    """Copies a file, which may lie in a bucket, to the local `target`."""
    if isinstance(source, BucketPath):
        told(source, lambda: source.system.get_file(str(source), str(target)))
    else:
        shutil.copy(source, target)


def check_writable(folder: Path) -> None:
    """Raises OSError when nothing can be written to `folder`, which is made if it is missing."""
    if isinstance(folder, BucketPath):
        probe = folder / f"probe.{os.urandom(4).hex()}"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError when `folder` is not writable, or its disk has fewer than `num_bytes` free; a bucket has no limit."""
    if isinstance(folder, BucketPath):
        return
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
    if scheme(os.fspath(path)):
        return str(path)
    absolute = os.path.abspath(path)
    inside = os.path.relpath(absolute)
    return absolute if inside.startswith("..") else inside
