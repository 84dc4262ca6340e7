"""Length-grouped sampling: a batch holds image samples or text-only samples, never both, all of similar length.

Every process computes the modality and the width of every global batch by itself, without communication: the order of the
records is a pure function of the seed, and the width depends on the lengths of all records of the global batch, not only
on those of the process's own rows.

A training step is compiled once per modality (a text-only batch has no images, and the encoder is skipped) and length
bucket: at most 2 * max(1, number of buckets) times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from vlm_jax.data import fingerprint, sources
from vlm_jax.data.records import BadRecord
from vlm_jax.data.rows import Batch, CachedFeatures, EncodeChunk, Encoder, Stacked
from vlm_jax.data.shards import PreparedSource
from vlm_jax.settings.run import DataConfig

MEGA_BATCHES = 50  # shuffled batches sorted together, as in transformers' LengthGroupedSampler
TEXT_KEYS = ("tokens", "visual_index", "positions", "segments", "loss_mask")  # [T] of a row


class Sizes(NamedTuple):
    """The sizes of N records by which batches are grouped; both are 0 for a bad record."""

    # Separated by white space, in all turns: the length that LLaVA sorts by.
    words: Int32[np.ndarray, "N"]
    images: Int32[np.ndarray, "N"]


def measure(cfg: DataConfig) -> Sizes:
    """One pass over the annotations, once per process: 21 s of CPU time for 665,298 records (548 MB)."""
    return _measure(cfg, tuple(fingerprint.stamp_of(path) for path in cfg.annotations))


@functools.lru_cache(4)
def _measure(cfg: DataConfig, stamps: tuple) -> Sizes:
    del stamps  # a rewritten file is read again
    source = sources.open_source(cfg)
    words, images = np.zeros((2, len(source)), np.int32)
    known, start = np.zeros(len(source), bool), 0
    # Prepared data know their sizes; a field that is ignored would change them.
    for part in source.sources:
        if isinstance(part, PreparedSource) and not cfg.ignored_fields:
            words[start : start + len(part)], images[start : start + len(part)] = part.sizes()
            known[start : start + len(part)] = True
        start += len(part)
    for index in np.flatnonzero(~known).tolist():
        try:
            record = source[index]
        except BadRecord:
            continue  # training reports or counts it when it reads the record
        words[index] = sum(
            len(turn.question.split()) + len((turn.answer or "").split()) for turn in record.turns
        )
        images[index] = len(record.images)
    return Sizes(words, images)


class Order:
    """Maps a position of the endless stream to a record; positions kB .. kB + B - 1 are global batch k.

    An epoch is a permutation drawn from (seed, epoch). It contains every record at least once: the last batch of a modality
    is completed with up to B - 1 records of that modality, which are repeated.

    # Differs from haotian-liu/LLaVA@c121f04 get_modality_length_grouped_indices: there the two incomplete last batches
    # are merged into one with both modalities, and "similar length" holds within a device's part of the batch only.
    """

    def __init__(self, sizes: Sizes, visual_tokens: int, batch_size: int, seed: int):
        self.lengths = sizes.words + visual_tokens * sizes.images
        self.images, self.batch_size, self.seed = sizes.images, batch_size, seed
        self.batches_per_epoch = sum(math.ceil(len(g) / batch_size) for g in self.modalities())

    def modalities(self) -> tuple[np.ndarray, ...]:
        """Indices of the records with images, and of those without."""
        return np.flatnonzero(self.images > 0), np.flatnonzero(self.images == 0)

    def record(self, position: int) -> int:
        """The index of the record at a position of the stream."""
        batch, row = divmod(position, self.batch_size)
        epoch, number = divmod(batch, self.batches_per_epoch)
        return int(_epoch(self, epoch)[number, row])

    def has_images(self, batch: int) -> bool:
        return bool(self.images[self.record(batch * self.batch_size)] > 0)


@functools.lru_cache(4)
def _epoch(order: Order, epoch: int) -> Int32[np.ndarray, "N B"]:
    """Record indices of an epoch's batches: 0.1 s for 665,298 records."""
    rng = np.random.default_rng((order.seed, epoch))
    size = order.batch_size
    batches = []
    for group in order.modalities():
        rows = math.ceil(len(group) / size) * size
        shuffled = np.resize(rng.permutation(group), rows)
        for start in range(0, rows, MEGA_BATCHES * size):
            mega = shuffled[start : start + MEGA_BATCHES * size]
            longest_first = np.argsort(-order.lengths[mega], kind="stable")
            batches.append(mega[longest_first].reshape(-1, size))
    return rng.permutation(np.concatenate(batches)).astype(np.int32)


class EncodeGrouped(EncodeChunk):
    """Encodes the rows of one shard, by their numbers and in that order.

    Row r of shard s is the record at position r * num_shards + s of the stream. With length buckets, each encoded row also
    has `longest`: the number of tokens of the longest record at positions r * num_shards .. r * num_shards + num_shards - 1.
    The records of the other shards are tokenised for that, but their images are not decoded. The maximum of `longest` over a
    shard's rows is thus the length of the longest row of the global batch, the same on every process.

    A bad record is returned as a blank row with its error, so that the rows after it keep their positions.
    """

    def __init__(
        self,
        source: sources.Concatenated,
        encoder: Encoder,
        order: Order,
        shard: int,
        num_shards: int,
        measured: bool,
    ):
        """measured: whether the lengths of all shards are needed, as they are with several length buckets."""
        super().__init__(source, encoder)
        self.order, self.shard, self.num_shards, self.measured = order, shard, num_shards, measured

    def encode(self, index: int) -> Batch:
        first = index * self.num_shards
        own = first + self.shard
        row = super().encode(self.order.record(own))
        bad = "bad" in row
        if bad:
            row = self.encoder.blank() | row
        positions = range(first, first + self.num_shards) if self.measured else ()
        lengths = [self._length(position) for position in positions if position != own or bad]
        return row | {"longest": max([int((row["segments"] >= 0).sum()), *lengths])}

    def _length(self, position: int) -> int:
        """Tokens of the record at a position of the stream; 0 for a bad one."""
        try:
            return self.encoder.chat.row_length(self.source[self.order.record(position)])
        except BadRecord:
            return 0


def num_shapes(cfg: DataConfig) -> int:
    """The number of shapes that training batches can have, which bounds how often the training step is compiled."""
    if cfg.sampling == "shuffle":
        return 1
    return (2 if cfg.max_images else 1) * max(1, len(cfg.length_buckets))


def width(buckets: Sequence[int], max_tokens: int, longest: int) -> int:
    """Slots per row of a batch whose longest row has `longest` tokens."""
    return next((bucket for bucket in buckets if bucket >= longest), max_tokens)


class Grouped(Stacked):
    """A batch of one modality, cut to the smallest bucket that holds its longest row; see EncodeGrouped for `longest`."""

    def __init__(
        self, cfg: DataConfig, size: int, has_images: bool, features: CachedFeatures | None
    ):
        super().__init__(size, features)
        self.cfg, self.has_images, self.longest = cfg, has_images, 0

    def add(self, row: Batch) -> bool:
        self.longest = max(self.longest, row.pop("longest"))
        if not self.has_images:
            row = {name: row[name] for name in (*TEXT_KEYS, "ids")}
        return super().add(row)

    def finish(self) -> Batch:
        slots = width(self.cfg.length_buckets, self.cfg.max_tokens, self.longest)
        batch = super().finish()
        return batch | {name: batch[name][:, :slots] for name in TEXT_KEYS}
