"""One record to one row of arrays: text by `chat`, pixels by `images` or rows of a feature cache."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from vlm_jax import files
from vlm_jax.data import fast_images, images, tokenizer
from vlm_jax.data.chat import Chat
from vlm_jax.data.records import BadRecord, ImageSource, Record, Turn
from vlm_jax.data.sources import Concatenated
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import ViTConfig
from vlm_jax.settings.run import DataConfig

Batch = dict[str, Any]
# Fills a row or an image slot that has no sample.
BLANK = Record("", "", "", (), None, (Turn(0, "", ""),))


@functools.lru_cache(8)
def _tokenizer(directory: str, stamp: Any) -> tokenizer.Tokenizer:
    del stamp  # a rewritten directory is read again
    return tokenizer.load(directory)


@functools.lru_cache(64)
def _chat(
    directory: str,
    stamp: Any,
    template: str,
    system: str | None,
    turns: str,
    sizes: tuple[int, int, int, int],
    query: str,
) -> Chat:
    return Chat(_tokenizer(directory, stamp), template, system, turns, *sizes, query)


def make_chat(cfg: DataConfig, visual_tokens: int) -> Chat:
    """The Chat of a config. The same settings give the same object, so that its caches are shared."""
    tokenizer.check_directory(cfg.tokenizer)
    stamp = _stamp(cfg.tokenizer)
    sizes = (visual_tokens, cfg.max_tokens, cfg.max_query_tokens, cfg.max_images)
    return _chat(cfg.tokenizer, stamp, cfg.template, cfg.system, cfg.turns, sizes, cfg.query)


def _stamp(directory: str) -> Any:
    """Differs when a file was added to a directory, or on a bucket when one was written again."""
    place = files.to_path(directory)
    if isinstance(place, files.BucketPath):
        return tuple((path.name, path.stamp()) for path in place.iterdir())
    return place.stat().st_mtime


class CachedFeatures:
    """The tables of a cache of encoder features, memory-mapped; `feature_cache` describes its files."""

    def __init__(self, directory: str):
        self.directory = directory
        taps = os.path.join(directory, "taps.npy")
        try:
            index = files.read_bytes(os.path.join(directory, "index.json"))
            self.rows: dict[str, int] = json.loads(index.decode("utf-8"))
            self.last = _open(os.path.join(directory, "last.npy"))
            self.taps = _open(taps) if files.is_file(taps) else None
            whole = all(isinstance(row, int) for row in self.rows.values())
        except (OSError, ValueError, EOFError, RecursionError, AttributeError) as error:
            raise ConfigError(
                f"data: features_dir {directory!r} cannot be read: {type(error).__name__}: {error!s:.200}; write the cache again."
            ) from None
        if not whole:
            raise ConfigError(f"data: {directory}: index.json must hold a whole number per image.")
        if self.rows and max(self.rows.values()) >= len(self.last):
            raise ConfigError(
                f"data: {directory}: index.json points past the {len(self.last)} rows of last.npy."
            )

    def gather(self, rows: np.ndarray) -> Batch:
        """Features of rows int [B I]; zeros for -1."""
        last = _take(self.last, rows)
        taps = last if self.taps is None else _take(self.taps, rows)
        return {"feature_last": last, "feature_taps": taps}


class _Table:
    """A .npy file on a bucket; rows are read when they are asked for, those of a batch at once."""

    def __init__(self, path: files.BucketPath):
        self._path = path
        head = io.BytesIO(path.read_range(0, 4096))
        version = np.lib.format.read_magic(head)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)  # fmt: skip
        self.shape, fortran, stored = read(head)
        if fortran or path.stamp()[1] != head.tell() + math.prod(self.shape) * stored.itemsize:
            raise ValueError(f"{path} is no whole table of rows")
        self._start, self._stored = head.tell(), stored
        self.dtype = np.dtype(ml_dtypes.bfloat16 if stored == np.uint16 else stored)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        wanted, back = np.unique(np.asarray(rows), return_inverse=True)
        size = math.prod(self.shape[1:]) * self._stored.itemsize
        at = [self._start + int(row) * size for row in wanted]
        data = b"".join(self._path.read_ranges([(start, start + size) for start in at]))
        found = np.frombuffer(data, self._stored).view(self.dtype).reshape(-1, *self.shape[1:])
        return found[back].reshape(*np.shape(rows), *self.shape[1:])


def _open(path: str) -> np.ndarray | _Table:
    """A memory-mapped table; bits of bfloat16, which NumPy cannot store by name, become numbers again."""
    place = files.to_path(path)
    if isinstance(place, files.BucketPath):
        return _Table(place)
    table = np.load(path, mmap_mode="r")
    return table.view(ml_dtypes.bfloat16) if table.dtype == np.uint16 else table


def _take(table: np.ndarray | _Table, rows: np.ndarray) -> np.ndarray:
    out = np.asarray(table[np.maximum(rows, 0)])
    out[rows < 0] = 0
    return out


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Settings with which an image file is decoded, squared and resized; see `images.load`."""

    image_px: int
    mode: str
    mean: tuple[float, ...]
    max_pixels: int
    resample: str
    exif_rotation: bool = False
    decoder: str = "exact"

    def load(self, record: Record, image: ImageSource) -> UInt8[np.ndarray, "H W 3"]:
        source = os.path.join(record.root, image) if isinstance(image, str) else image
        name = f"image {image[:200]!r}: " if isinstance(image, str) else ""
        try:
            return images.load(
                source,
                self.image_px,
                self.mode,
                self.mean,
                self.max_pixels,
                self.resample,
                self.exif_rotation,
                self.decoder,
            )
        except images.ImageError as error:
            raise record.bad(f"{name}{error}") from None


def make_pixels(cfg: DataConfig, vit: ViTConfig) -> Pixels:
    """Raises ConfigError where cfg.decoder is fast and its libraries are not installed."""
    if cfg.decoder == "fast":
        fast_images.libraries()
    return Pixels(
        vit.image_px,
        cfg.image_mode,
        vit.mean,
        cfg.max_image_pixels,
        vit.resample,
        cfg.exif_rotation,
        cfg.decoder,
    )


class Encoder:
    """Record -> one row of arrays without the batch axis. Picklable: worker processes get a copy."""

    def __init__(self, chat: Chat, pixels: Pixels, feature_rows: dict[str, int] | None):
        self.chat, self.pixels, self.feature_rows = chat, pixels, feature_rows

    def __call__(self, record: Record) -> Batch:
        return {**self.chat.encode(record)._asdict(), "ids": record.id, **self.visual(record)}

    def visual(self, record: Record) -> Batch:
        """Queries and pixels (or rows of the feature cache) of a record's images."""
        slots = self.chat.max_images
        if slots == 0:
            return {}
        query_tokens, query_mask = self.chat.query_arrays(record)
        row: Batch = {"query_tokens": query_tokens, "query_mask": query_mask}
        if self.feature_rows is not None:
            rows = [_feature_row(self.feature_rows, record, image) for image in record.images]
            row["feature_rows"] = np.array(rows + [-1] * (slots - len(rows)), np.int64)
            return row
        px = self.pixels.image_px
        found = [self.pixels.load(record, image)[None] for image in record.images]
        empty = np.zeros((slots - len(found), px, px, 3), np.uint8)
        # One image in the only slot, the usual case, is not copied: 5 % of the CPU time.
        row["images"] = found[0] if found and slots == 1 else np.concatenate([*found, empty])
        return row

    def blank(self) -> Batch:
        """A row without a token: padding that belongs to no turn, empty image slots, id ""."""
        row = self.chat.lay_out(BLANK, [], self.chat.max_tokens)._asdict()
        return {**row, "ids": "", **self.visual(BLANK)}

    def empty_slot(self) -> Batch:
        """The entries of an empty image slot, without batch and slot axis."""
        return {name: np.asarray(values[0]) for name, values in self.visual(BLANK).items()}


def _feature_row(index: dict[str, int], record: Record, image: ImageSource) -> int:
    if not isinstance(image, str) or image not in index:
        name = image if isinstance(image, str) else "<bytes>"
        raise record.bad(f"image {name!r} is not in the index of features_dir")
    return index[image]


def open_features(cfg: DataConfig) -> CachedFeatures | None:
    return CachedFeatures(cfg.features_dir) if cfg.features_dir and cfg.max_images else None


def make_encoder(
    cfg: DataConfig, visual_tokens: int, vit: ViTConfig, features: CachedFeatures | None
) -> Encoder:
    rows = None if features is None else features.rows
    return Encoder(make_chat(cfg, visual_tokens), make_pixels(cfg, vit), rows)


class EncodeChunk:
    """Record indices [n] -> n encoded rows. A bad record becomes a row that holds its error: the consumer counts them."""

    def __init__(self, source: Concatenated, encoder: Encoder):
        self.source, self.encoder = source, encoder

    def __call__(self, indices: np.ndarray) -> list[Batch]:
        return [self.encode(int(index)) for index in indices]

    def encode(self, index: int) -> Batch:
        try:
            return self.encoder(self.source[index])
        except BadRecord as error:
            return {"bad": (error.file, error.record_id, error.reason)}


@runtime_checkable
class Assembly(Protocol):
    """A batch under construction: encoded rows are added until it is full or the next one does not fit."""

    @property
    def full(self) -> bool: ...

    def add(self, row: Batch) -> bool:
        """Adds the row and returns True; returns False and changes nothing if the row does not fit."""
        ...

    def finish(self) -> Batch: ...


class Stacked:
    """One sample per row."""

    def __init__(self, size: int, features: CachedFeatures | None):
        self.size, self.features = size, features
        self.rows: list[Batch] = []

    @property
    def full(self) -> bool:
        return len(self.rows) == self.size

    def add(self, row: Batch) -> bool:
        self.rows.append(row)
        return True

    def finish(self) -> Batch:
        return stack(self.rows, self.features)


def stack(rows: Sequence[Batch], features: CachedFeatures | None) -> Batch:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    batch: Batch = {
        key: column if key == "ids" else np.stack(column) for key, column in columns.items()
    }
    if "feature_rows" in batch:
        assert features is not None  # the encoder took its index from there
        batch.update(features.gather(batch.pop("feature_rows")))
    return batch
