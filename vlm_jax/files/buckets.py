"""Paths on object storage: gs://bucket/name and s3://bucket/name, through fsspec (packages gcsfs and s3fs).

A bucket has whole objects only: an object is replaced in one step, nothing can be appended to or renamed, a folder is no
more than a common beginning of names. Requests that fail in passing (503, 429, a lost connection) are repeated with growing
pauses, up to a minute and a half in all, before an error is raised.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from etils import epath

from vlm_jax.settings.addresses import BUCKETS, check_usable, scheme
from vlm_jax.settings.checks import ConfigError

T = TypeVar("T")


class BucketError(OSError):
    """A bucket refused or could not be reached; `strerror` says why."""


@functools.lru_cache(8)
def file_system(kind: str) -> Any:
    """The fsspec file system of "gs" or "s3", one per process. Raises ConfigError when its package is not installed."""
    check_usable("path", f"{kind}://bucket")
    package = BUCKETS[kind][0]
    # Asks a second service about each bucket before it is used, for folders that are objects, which nothing here needs.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger(package).setLevel(logging.CRITICAL)  # logs the traceback of each error
    import fsspec  # a tenth of a second, only for those who use a bucket

    # Listings are not cached: other processes write there too.
    return fsspec.filesystem(kind, use_listings_cache=False)


def plain(error: Exception, path: object) -> OSError:
    """An error of fsspec, of the cloud's library or of aiohttp as an OSError with a reason in plain words."""
    if isinstance(error, OSError) and error.strerror and isinstance(error, _NAMED):
        return error
    text = " ".join(str(error).split())
    code = str(getattr(error, "code", "") or getattr(error, "status", ""))
    if isinstance(error, FileNotFoundError):
        bucket = re.match(r"[a-z0-9]+://[^/]+", str(path))
        reason = f"no such object, or no bucket {bucket[0] if bucket else path}"
        return FileNotFoundError(errno.ENOENT, reason, str(path))
    if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
        return type(error)(errno.EEXIST, "exists already", str(path))
    if "Forbidden" in text or code in ("401", "403") or "credentials" in text.lower():
        return BucketError(errno.EACCES, f"the bucket refuses access ({text[:200]})", str(path))
    name = type(error).__name__
    return BucketError(
        errno.EIO, f"the bucket cannot be reached or fails: {name} {text[:200]}", str(path)
    )


_NAMED = (FileNotFoundError, FileExistsError, BucketError)


def told(path: object, act: Callable[[], T]) -> T:
    """act(), whose errors become those of `plain`."""
    try:
        return act()
    except (ConfigError, AttributeError, TypeError, MemoryError):
        raise
    except Exception as error:  # the clouds' libraries share no base class
        raise plain(error, path) from error


class BucketPath(type(epath.Path("gs://bucket"))):
    """An epath.Path whose failures are OSErrors, and which reads and writes whole objects in one request each."""

    @property
    def system(self) -> Any:
        return file_system(scheme(str(self)) or "")

    def _do(self, name: str, *arguments: Any, **options: Any) -> Any:
        return told(self, lambda: getattr(self.system, name)(str(self), *arguments, **options))

    def absolute(self) -> BucketPath:
        return self

    def resolve(self, strict: bool = False) -> BucketPath:
        return self

    def _kind(self) -> str:
        """What is there: "file", "directory" or "". fsspec's own questions also answer no where access is refused."""
        try:
            return self._do("info")["type"]
        except FileNotFoundError:
            return ""

    def exists(self) -> bool:
        return self._kind() != ""

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def iterdir(self) -> Iterator[BucketPath]:
        for name in sorted(
            {p.rstrip("/").rsplit("/", 1)[-1] for p in self._do("ls", detail=False)}
        ):
            yield self / name

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        kind = scheme(str(self))
        found = told(self, lambda: self.system.glob(f"{self}/{pattern}"))
        return (type(self)(f"{kind}://{name}") for name in sorted(found))

    def rglob(self, pattern: str) -> Iterator[BucketPath]:
        return self.glob(f"**/{pattern}")

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there as soon as it holds something."""

    def stat(self) -> Any:
        return told(self, super().stat)

    def stamp(self) -> tuple[str, int]:
        """(version, bytes): differs when the object was written again."""
        info = self._do("info")
        version = (
            info.get("generation") or info.get("ETag") or info.get("etag") or info.get("mtime")
        )
        return str(version), int(info["size"])

    def read_bytes(self) -> bytes:
        return self._do("cat_file")

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes [start, end)."""
        return self._do("cat_file", start=start, end=end) if end > start else b""

    def read_ranges(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges, requested at once."""
        starts, ends = [a for a, _ in spans], [b for _, b in spans]
        names = [str(self)] * len(spans)
        return told(self, lambda: self.system.cat_ranges(names, starts, ends, on_error="raise"))

    def write_bytes(self, data: Any) -> int:
        self._do("pipe_file", bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def open(  # pyrefly: ignore[bad-override]
        self, mode: str = "r", *, encoding: str | None = None, errors: str | None = None, **_: Any
    ) -> Any:
        if set(mode) & set("ax+"):
            raise ValueError(f"{self}: an object cannot be appended to; mode {mode!r}")
        return told(self, lambda: self.system.open(str(self), mode))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._do("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        try:
            self._do("rm", recursive=True)
        except FileNotFoundError:
            if not missing_ok:
                raise
