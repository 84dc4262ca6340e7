"""Sequence packing: several samples in one row of max_tokens, so that few slots are padding.

    tokens     a a a b b b b - -      two samples of 3 and 4 tokens in a row of 9
    samples    0 0 0 1 1 1 1 0 0
    positions  0 1 2 0 1 2 3 0 0
    segments   0 0 0 0 0 0 0 - -      -: -1, padding

Samples are packed by first fit into the rows of one batch, in the order of the stream; the first sample that fits into no
row begins the next batch. The position in the data is therefore one number, and resuming is exact. Each process packs its
own shard: with packing the contents of a global batch depend on the number of processes, without it they do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vlm_jax.data import sources
from vlm_jax.data.records import BadRecord
from vlm_jax.data.rows import Batch, CachedFeatures, Encoder, make_chat
from vlm_jax.settings.run import DataConfig

SAMPLED = 2048  # records tokenised to estimate how many samples a batch holds
SIMULATED_BATCHES = 4  # at least, from the sampled records drawn again and again


class FirstFit:
    """Tokens and image slots that are still free in each row."""

    def __init__(self, rows: int, tokens: int, images: int):
        self.tokens, self.images = np.full(rows, tokens), np.full(rows, images)

    def place(self, tokens: int, images: int) -> int | None:
        """Reserves room for a sample in the first row that has enough and returns that row; None if no row has."""
        fits = (self.tokens >= tokens) & (self.images >= images)
        row = int(fits.argmax())
        if not fits[row]:
            return None
        self.tokens[row] -= tokens
        self.images[row] -= images
        return row


class Packed:
    """The rows of one batch, filled sample by sample. `finish` gives ids as one list per row."""

    full = False  # known only when the next sample does not fit

    def __init__(
        self, cfg: DataConfig, rows: int, encoder: Encoder, features: CachedFeatures | None
    ):
        self.cfg, self.encoder, self.features = cfg, encoder, features
        self.rows: list[list[Batch]] = [[] for _ in range(rows)]
        self.room = FirstFit(rows, cfg.max_tokens, cfg.image_slots)

    def add(self, row: Batch) -> bool:
        """False if the encoded sample (a row of `pipeline`) fits nowhere: the batch is complete."""
        at = self.room.place(*_sizes(row, self.encoder.chat.visual_tokens))
        if at is not None:
            self.rows[at].append(row)
        return at is not None

    def finish(self) -> Batch:
        batch = self._text()
        batch["ids"] = [[sample["ids"] for sample in row] for row in self.rows]
        if not self.cfg.max_images:
            return batch
        for name, empty in self.encoder.empty_slot().items():
            slots = [self._slots([sample[name] for sample in row], row, empty) for row in self.rows]
            batch[name] = np.stack(slots)
        if self.features is not None:
            batch.update(self.features.gather(batch.pop("feature_rows")))
        return batch

    def _text(self) -> Batch:
        shape = (len(self.rows), self.cfg.max_tokens)
        batch: Batch = {
            "tokens": np.full(shape, self.encoder.chat.tokenizer.pad_id, np.int32),
            "visual_index": np.full(shape, -1, np.int32),
            "positions": np.zeros(shape, np.int32),
            "segments": np.full(shape, -1, np.int32),
            "loss_mask": np.zeros(shape, bool),
        }
        samples = np.zeros(shape, np.int32)
        for number, row in enumerate(self.rows):
            at = image = 0
            for k, sample in enumerate(row):
                tokens, images = _sizes(sample, self.encoder.chat.visual_tokens)
                here = np.s_[number, at : at + tokens]
                for name, column in batch.items():
                    column[here] = sample[name][:tokens]
                visual = batch["visual_index"][here]
                visual[visual >= 0] += image * self.encoder.chat.visual_tokens
                samples[here] = k
                at, image = at + tokens, image + images
        return batch | {"samples": samples}

    def _slots(
        self, values: Sequence[np.ndarray], row: list[Batch], empty: np.ndarray
    ) -> np.ndarray:
        """One array per image slot of a packed row: those of its samples' images, then `empty`."""
        out = np.broadcast_to(empty, (self.cfg.image_slots, *empty.shape)).copy()
        at = 0
        for value, sample in zip(values, row, strict=True):
            images = _sizes(sample, self.encoder.chat.visual_tokens)[1]
            out[at : at + images] = value[:images]
            at += images
        return out


def _sizes(row: Batch, visual_tokens: int) -> tuple[int, int]:
    """Tokens and images of an encoded sample; an image that was cut off at max_tokens takes no slot."""
    shown = int(row["visual_index"].max()) + 1
    return int((row["segments"] >= 0).sum()), shown // visual_tokens


def estimate_batches(cfg: DataConfig, visual_tokens: int) -> int:
    """Estimates the packed batches of one epoch: simulates first fit on the lengths of at most 2,048 records.

    The records are spread evenly over the data and drawn in a seeded order. The estimate does not depend on the number of
    processes, although each of several packs fewer rows at once and leaves a little more padding.
    """
    source, chat = sources.open_source(cfg), make_chat(cfg, visual_tokens)
    sizes = []
    for index in np.linspace(0, len(source) - 1, min(len(source), SAMPLED)).astype(int).tolist():
        try:
            row = chat.encode(source[index])._asdict()
        except BadRecord:
            continue
        sizes.append(_sizes(row, visual_tokens))
    rng = np.random.default_rng(cfg.seed)
    room, batches, samples = FirstFit(cfg.batch_size, cfg.max_tokens, cfg.image_slots), 0, 0
    while sizes and batches < SIMULATED_BATCHES:
        for at in rng.permutation(len(sizes)).tolist():
            if room.place(*sizes[at]) is None:
                batches += 1
                room = FirstFit(cfg.batch_size, cfg.max_tokens, cfg.image_slots)
                room.place(*sizes[at])
            samples += 1
    filled = batches + float(1 - room.tokens.mean() / cfg.max_tokens)  # the open batch in part
    return max(1, math.ceil(len(source) * filled / max(samples, 1)))
