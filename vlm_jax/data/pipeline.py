"""The grain pipeline from annotation files to fixed-shape NumPy batches of training.

A batch is a dict. B rows, T = max_tokens, I = max_images, Q = max_query_tokens, M visual tokens per image:

    tokens         int32 [B T]
    visual_index   int32 [B T]        -1 for text; i * M + m for visual token m of image i
    positions      int32 [B T]
    segments       int32 [B T]        -1 for padding, 0 for what all turns share, n for the n-th independent turn
    loss_mask      bool [B T]         True for supervised targets
    ids            list               of record ids
    query_tokens   int32 [B I Q]      only with max_images > 0, like all entries below; Q = 0 for query = none
    query_mask     bool [B I Q]
    images         uint8 [B I H W 3]  or, from a feature cache, feature_last [B I P C] and feature_taps [B I P Z]

With packing (see `packing`) I is packed_images, i counts the image slots of the row, positions and segments start anew in
each sample, ids is one list per row, and samples int32 [B T] numbers the samples of a row (any value for padding).
With sampling = modality_length (see `sampling`) a text-only batch has no image entries, and T is a length bucket.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import grain
from absl import flags, logging

from vlm_jax.data import packing, sampling, sources
from vlm_jax.data.records import BadRecord
from vlm_jax.data.rows import Assembly, Batch, EncodeChunk, Stacked, make_encoder, open_features
from vlm_jax.settings import machine
from vlm_jax.settings.addresses import scheme
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import ViTConfig
from vlm_jax.settings.run import DataConfig

# Records encoded per task when no image is decoded: starting a task takes longer than encoding one short record.
TEXT_CHUNK = 32
MOST_THREADS = 16  # that read and decode images
# Arrays of a worker that are smaller are pickled, because a block of shared memory costs 0.3 ms each.
SHARED_BYTES = 1 << 16


# --- training ---------------------------------------------------------------------------------------------------------


class TrainIterator(grain.DatasetIterator):
    """Endless batches; `get_state`/`set_state` resume exactly, whatever the number of workers.

    The sample stream is a pure function of its index, so the state is one number: how many samples of this shard were
    consumed. bad_records counts those dropped under `skip` (it is part of the state); fill is the share of the last
    batch's slots that hold a token. Call `close` when done.
    """

    def __init__(
        self,
        cfg: DataConfig,
        stream: grain.MapDataset,
        encode: EncodeChunk,
        rows: int,
        begin: Callable[[int], Assembly],
        num_records: int,
    ):
        """begin: the number of samples consumed so far -> the next batch, still empty. num_records: in all annotation files."""
        super().__init__()
        self.num_records = num_records
        self._cfg, self._stream, self._encode = cfg, stream, encode
        self._rows, self._begin = rows, begin
        self._consumed = self.bad_records = 0
        self.fill = 0.0
        self._chunks: grain.DatasetIterator | None = None
        self._pending: Iterator[Batch] = iter(())

    def __next__(self) -> Batch:
        self._assert_not_closed()
        assembly = self._begin(self._consumed)
        while not assembly.full:
            row = self._next_row()
            bad = row.pop("bad", None)
            if bad is None and not assembly.add(row):
                self._pending = itertools.chain([row], self._pending)
                break
            self._consumed += 1
            if bad is not None:
                self._drop(BadRecord(*bad))
                if row:  # a blank row: the rows after it keep their positions
                    assembly.add(row)
        batch = assembly.finish()
        self.fill = float((batch["segments"] >= 0).mean())
        return batch

    def _next_row(self) -> Batch:
        while (row := next(self._pending, None)) is None:
            if self._chunks is None:
                self._chunks = self._open()
            self._pending = iter(next(self._chunks))
        return row

    def _drop(self, error: BadRecord) -> None:
        if self._cfg.on_bad_record == "raise":
            raise error
        self.bad_records += 1
        logging.warning(
            "skipped (%d of at most %d): %s", self.bad_records, self._cfg.max_bad_records, error
        )
        if self.bad_records > self._cfg.max_bad_records:
            raise ConfigError(
                f"data: {self.bad_records} bad records, more than max_bad_records {self._cfg.max_bad_records};"
                f" mend the data or raise the limit. The last one: {error}"
            )

    def _open(self) -> grain.DatasetIterator:
        """Chunks of encoded rows, starting at the first sample that was not consumed."""
        decodes = self._cfg.max_images > 0 and not self._cfg.features_dir
        chunk = 1 if decodes else min(TEXT_CHUNK, self._rows)
        threads = image_threads(self._cfg) if decodes else 1
        rest = self._stream[self._consumed :].batch(chunk).map(self._encode)
        buffered = max(threads, -(-2 * self._rows // chunk))  # two batches ahead
        chunks = rest.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffered)
        )
        if self._cfg.num_workers:
            _parse_flags()
            chunks = grain.experimental.WithOptionsIterDataset(
                chunks, grain.experimental.DatasetOptions(min_shm_size=SHARED_BYTES)
            )
            chunks = chunks.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._cfg.num_workers)
            )
        return iter(chunks)

    def start_prefetch(self) -> None:
        self._assert_not_closed()
        if self._chunks is None:
            self._chunks = self._open()
        self._chunks.start_prefetch()

    def get_state(self) -> dict[str, int]:
        return {
            "consumed": self._consumed, "bad_records": self.bad_records, "num_shards": self.num_shards,
        }  # fmt: skip

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._consumed, self.bad_records = int(state["consumed"]), int(state["bad_records"])

    @property
    def num_shards(self) -> int:
        return self._cfg.batch_size // self._rows

    def state_at(self, step: int, states: Sequence[dict[str, int]]) -> dict[str, int]:
        """The state of this shard after `step` batches, for a run that was saved with another number of shards.

        states: those of the old shards. Raises ConfigError when the old shards had consumed different numbers of samples: no
        position of the new shards corresponds to that.
        """
        old = states[0]["num_shards"]
        if any(state["consumed"] * old != step * self._cfg.batch_size for state in states):
            raise ConfigError(
                f"data: {old} shards stopped at different samples (bad records were skipped, or samples packed), which "
                f"{self.num_shards} shards cannot go on from; start with as many processes as before."
            )
        return {"consumed": step * self._rows, "bad_records": 0}

    def _stop(self) -> None:
        if self._chunks is not None:
            self._chunks.close()
        self._chunks, self._pending = None, iter(())

    def close(self) -> None:
        self._stop()
        super().close()


def image_threads(cfg: DataConfig) -> int:
    """How many threads of a process read and decode images: two per core, shared among the workers, 16 for images on a bucket.

    More than one per core hides the reads of a disk; many more wait for each other's Python, which `data.decoder=fast` notices
    most (scripts/bench/input.py). Most of a bucket's time is waiting for the network.
    """
    if any(scheme(place) for place in (*cfg.annotations, *cfg.image_roots)):
        return MOST_THREADS
    return min(max(2 * machine.cores() // max(cfg.num_workers, 1), 2), MOST_THREADS)


def _parse_flags() -> None:
    """grain's workers read absl flags, which must be parsed first; a program that does not use absl.app never parses them."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def train_iterator(
    cfg: DataConfig, visual_tokens: int, vit: ViTConfig, shard: int = 0, num_shards: int = 1
) -> TrainIterator:
    """Endless shuffled batches of shard `shard`: batch_size / num_shards rows each, a new order each epoch.

    visual_tokens: M per image. vit: gives the size, mean colour and filter of images. Rows of all shards together are
    the same for every num_shards. Raises ConfigError for missing files or sizes that do not fit; iterating raises
    BadRecord (on_bad_record = raise) or ConfigError after more than max_bad_records (skip).
    """
    if cfg.batch_size % num_shards:
        raise ConfigError(
            f"data: batch_size {cfg.batch_size} is not divisible by the {num_shards} processes that load data."
        )
    source, features = sources.open_source(cfg), open_features(cfg)
    sources.log_unread_fields(source)
    encoder, rows = make_encoder(cfg, visual_tokens, vit, features), cfg.batch_size // num_shards
    if cfg.sampling == "modality_length":
        order = _order(cfg, visual_tokens)
        measured = len(cfg.length_buckets) > 1
        grouped = sampling.EncodeGrouped(source, encoder, order, shard, num_shards, measured)

        def begin_grouped(consumed: int) -> Assembly:
            return sampling.Grouped(cfg, rows, order.has_images(consumed // rows), features)

        return TrainIterator(
            cfg, grain.MapDataset.range(2**40), grouped, rows, begin_grouped, len(source)
        )
    stream = (
        grain.MapDataset.range(len(source))
        .seed(cfg.seed)
        .shuffle()
        .repeat(2**32)[shard::num_shards]
    )

    def begin(consumed: int) -> Assembly:
        if cfg.packing:
            return packing.Packed(cfg, rows, encoder, features)
        return Stacked(rows, features)

    return TrainIterator(cfg, stream, EncodeChunk(source, encoder), rows, begin, len(source))


def _order(cfg: DataConfig, visual_tokens: int) -> sampling.Order:
    return sampling.Order(sampling.measure(cfg), visual_tokens, cfg.batch_size, cfg.seed)


def steps_per_epoch(cfg: DataConfig, visual_tokens: int) -> int:
    """Batches until every record was read once, rounded up; with packing, an estimate."""
    if cfg.packing:
        return packing.estimate_batches(cfg, visual_tokens)
    if cfg.sampling == "modality_length":
        return _order(cfg, visual_tokens).batches_per_epoch
    return math.ceil(len(sources.open_source(cfg)) / cfg.batch_size)


def num_shapes(cfg: DataConfig) -> int:
    """The number of shapes that training batches can have, which bounds how often the step is compiled."""
    return sampling.num_shapes(cfg)
