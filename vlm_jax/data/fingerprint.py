"""What a run was trained on, by content: `data.json` of a workdir, compared when the run is resumed.

    {"annotations": [{"file": path, "bytes": n, "sha256": digest}, ...]}

The records determine the order of the samples and the number of steps, so a resumed run must read the same ones. Paths are
not compared and images are not read: a dataset that was moved as a whole counts as the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from vlm_jax.files import Path, local_file, stamp, to_path, write_whole
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import DataConfig

log = logging.getLogger(__name__)
FILE = "data.json"
CHUNK = 1 << 22  # bytes read at once


def of(cfg: DataConfig) -> list[dict[str, Any]]:
    """One entry per annotation file or tfds directory, read once: 0.7 s for 1 GB.

    Of a tfds directory its JSON files are hashed (they hold the number of records of each shard), and the sizes of all files.
    """
    return of_files(cfg.annotations)


def of_files(paths: Sequence[str]) -> list[dict[str, Any]]:
    """`of` for annotation files or directories."""
    return [dict(_entry(path, stamp_of(path))) for path in paths]


def digest(entries: list[dict[str, Any]]) -> bytes:
    """32 bytes that differ when the contents of the annotations differ."""
    return hashlib.sha256(json.dumps([_content(e) for e in entries]).encode()).digest()


def write(cfg: DataConfig, workdir: Path) -> None:
    """Saves what the run is trained on."""
    write_whole(workdir / FILE, json.dumps({"annotations": of(cfg)}, indent=1) + "\n")


def is_known(workdir: Path) -> bool:
    """Whether a workdir records what its run was trained on."""
    return (workdir / FILE).is_file()


def check(cfg: DataConfig, workdir: Path) -> None:
    """Raises ConfigError when the run in `workdir` was trained on other annotations, naming the first that differs."""
    path = workdir / FILE
    if not is_known(workdir):
        log.info(
            "%s does not say what its run was trained on (an older version made it): "
            "its annotations are taken to be unchanged",
            workdir,
        )
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        then = [_content(entry) for entry in before]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{str(path)!r} is damaged ({type(error).__name__}): it tells whether the annotations are those that the run "
            "began with; restore it, or delete it to go on without the comparison."
        ) from None
    if len(before) != len(cfg.annotations):
        raise ConfigError(
            f"data: the run in {str(workdir)!r} began with {len(before)} annotation files, now there are "
            f"{len(cfg.annotations)}; give those, or another --workdir."
        )
    for old, was, new in zip(before, then, of(cfg), strict=True):
        if was != _content(new):
            raise ConfigError(
                f"data: annotations {new['file']!r} changed since the run in {str(workdir)!r} began ({was[0]:,} bytes then, "
                f"{new['bytes']:,} now; sha256 {was[1][:8]} then, {new['sha256'][:8]} now), and with them the order of its "
                "samples; restore the file to go on, or give another --workdir to start anew."
            )
        if old.get("file") != new["file"]:
            log.info("%s is now read from %s: the same content", old.get("file"), new["file"])


def _content(entry: dict[str, Any]) -> tuple[int, str]:
    return entry["bytes"], entry["sha256"]


def stamp_of(path: str) -> tuple[tuple[str, int, str | int], ...]:
    """(name, bytes, time or version) of a file, or of all files of a directory."""
    place = to_path(path)
    found = sorted(place.iterdir()) if place.is_dir() else [place]
    stats = [(file.name, stamp(file)) for file in found if file.is_file()]
    return tuple((name, size, changed) for name, (changed, size) in stats)


@functools.lru_cache(16)
def _entry(path: str, files: tuple[tuple[str, int, str | int], ...]) -> tuple[tuple[str, Any], ...]:
    found = hashlib.sha256()
    place = to_path(path)
    if place.is_dir():
        for name, size, _ in files:
            found.update(f"{name} {size}\n".encode())
            if name.endswith(".json"):
                found.update((place / name).read_bytes())
    else:
        with local_file(place).open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
    size = sum(size for _, size, _ in files)
    return ("file", str(place.absolute())), ("bytes", size), ("sha256", found.hexdigest())
