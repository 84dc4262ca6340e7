"""A file of lines that grows at its end, also on a bucket, where nothing can be appended to.

On a bucket each flush writes the new lines as an object of their own, <file>.parts/<position in the file, in bytes>. After
MOST of them the whole file is written anew and the parts are deleted, as when it is closed: one readable file stands at the
end, and a kill loses at most what was not flushed. A part that the file already holds is known by its position.
"""

from __future__ import annotations

import os
import re
from typing import Any

from vlm_jax.files.buckets import BucketPath
from vlm_jax.files.paths import Path, write_whole, writing

MOST = 64


class Lines:
    """Appends to a file. What `flush` has written stays, even after kill -9.

    OSErrors become ConfigErrors about the file.
    """

    def __init__(self, path: Path, whole: bytes | None = None):
        """whole: what the file is to hold at first; None = what it holds now, nothing if it does not exist."""
        self._path = path
        if isinstance(path, BucketPath):
            with writing(path):
                if whole is None:
                    whole = read_grown(path) if path.exists() else b""
                self._put_whole(bytearray(whole))
            return
        if whole is not None:
            write_whole(path, whole)
        with writing(path):
            self._file = path.open("ab")

    def write(self, text: str) -> None:
        """Adds text, which is on disk or in the bucket after the next flush. A lone surrogate becomes its JSON escape."""
        data = text.encode("utf-8", "backslashreplace")
        if isinstance(self._path, BucketPath):
            self._new += data
            return
        with writing(self._path):
            self._file.write(data)

    def flush(self) -> None:
        """Returns when everything that was written is safe."""
        with writing(self._path):
            if not isinstance(self._path, BucketPath):
                self._file.flush()
                os.fsync(self._file.fileno())
            elif self._new and len(self._parts) >= MOST:
                self._put_whole(self._data + self._new)
            elif self._new:
                part = _parts(self._path) / f"{len(self._data):015d}"
                part.write_bytes(self._new)
                self._parts.append(part)
                self._data += self._new
                self._new = b""

    def close(self) -> None:
        with writing(self._path):
            if not isinstance(self._path, BucketPath):
                self._file.close()
            elif self._new or self._parts:
                self._put_whole(self._data + self._new)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _put_whole(self, data: bytearray) -> None:
        assert isinstance(self._path, BucketPath)
        self._path.write_bytes(data)
        self._data, self._new, self._parts = data, b"", []
        for part in _found_parts(self._path):
            part.unlink(missing_ok=True)


def read_grown(path: Path) -> bytes:
    """The bytes of a file that `Lines` writes or wrote, the parts on a bucket included. Raises OSError."""
    data = path.read_bytes()
    if isinstance(path, BucketPath):
        for part in _found_parts(path):
            if int(part.name) == len(data):
                data += part.read_bytes()
    return data


def _parts(path: BucketPath) -> BucketPath:
    return path.with_name(f"{path.name}.parts")


def _found_parts(path: BucketPath) -> list[BucketPath]:
    try:
        return [part for part in _parts(path).iterdir() if re.fullmatch(r"\d{15}", part.name)]
    except FileNotFoundError:
        return []
