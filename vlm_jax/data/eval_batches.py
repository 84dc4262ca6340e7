"""Questions as left-padded batches of few static shapes, for generation and for the likelihood of given replies.

The prefix that all prompts have in common (usually the system prompt) is in no batch: its keys and values are computed once
and shared. A batch has the entries of `pipeline` except loss_mask, and seeds int32 [B], hashes of the ids; its positions
start after the shared prefix. With replies, the last `reply_slots` columns hold them, each as a segment of its own that
attends to the prompt and to itself:

    prefix | - - v v What is ?  A </s> B </s> -
    segments  . 0 0  0   0  0   1  1   2  2  -1
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32

from vlm_jax.data.chat import Unit, common_length
from vlm_jax.data.records import Record, parse
from vlm_jax.data.rows import Batch, CachedFeatures, Encoder, make_encoder, open_features, stack
from vlm_jax.settings.model import ViTConfig
from vlm_jax.settings.run import DataConfig

BUCKET_STEP = 8
MAX_BUCKETS = 4
SHARED_AT_LEAST = BUCKET_STEP  # tokens: a shorter prefix saves less than the rounding of a bucket


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of an evaluation as batches."""

    prefix: Int32[np.ndarray, "P"]  # ids that all prompts begin with; empty: nothing is shared
    buckets: tuple[int, ...]  # widths of the batches, without prefix and replies
    reply_slots: int  # columns of replies behind each prompt; 0: answers are generated
    num_tokens: int  # of all prompts and replies, padding and the shared prefix left out
    batches: Iterator[Batch]  # of this process's rows; "ids" names those of all processes


def choose_buckets(
    lengths: Sequence[int], batch_size: int, most: int = MAX_BUCKETS
) -> tuple[int, ...]:
    """At most `most` batch widths, multiples of 8, at the quantiles of the lengths.

    The largest holds the longest prompt. Another one is kept only if it gets at least a whole batch of prompts and leaves one
    for the wider ones.
    """
    rounded = sorted(-(-n // BUCKET_STEP) * BUCKET_STEP for n in lengths)
    quantiles = [rounded[max(0, len(rounded) * k // most - 1)] for k in range(1, most + 1)]
    buckets: list[int] = []
    filled = 0  # rows that the buckets chosen so far hold
    for width in sorted(set(quantiles)):
        held = sum(n <= width for n in rounded)
        if width == rounded[-1] or (
            held - filled >= batch_size and len(rounded) - held >= batch_size
        ):
            buckets.append(width)
            filled = held
    return tuple(buckets)


def common_prefix(prompts: Sequence[Sequence[Unit]]) -> Int32[np.ndarray, "P"]:
    """The ids before the first image that all prompts share; none for a single prompt or fewer than SHARED_AT_LEAST."""
    heads = [_head(units) for units in prompts]
    shared = common_length(heads)
    if len(prompts) < 2 or shared < SHARED_AT_LEAST:
        shared = 0
    return np.array(heads[0][:shared], np.int32)


def _head(units: Sequence[Unit]) -> list[int]:
    """The ids before the first image. Without an image, all ids but the last, whose logits predict the answer."""
    head: list[int] = []
    for ids, _, _ in units:
        if ids is None:
            return head
        head += ids.tolist()
    return head[:-1]


def _without(units: Sequence[Unit], count: int) -> list[Unit]:
    """The units without their first `count` ids."""
    rest = []
    for unit in units:
        cut = 0 if unit.ids is None else min(count, len(unit.ids))
        count -= cut
        rest.append(unit if unit.ids is None else Unit(unit.ids[cut:], unit.loss[cut:]))
    return rest


def _laid_out(replies: Sequence[np.ndarray], slots: int, pad_id: int) -> list[Unit]:
    """The replies as one segment each, then padding up to `slots` columns."""
    lengths = [len(ids) for ids in replies]
    units = [Unit(ids, np.zeros(len(ids), bool), i) for i, ids in enumerate(replies, start=1)]
    gap = slots - sum(lengths)
    return [*units, Unit(np.full(gap, pad_id, np.int32), np.zeros(gap, bool), -1)]


class _MakeBatch(grain.transforms.Map):
    """(width, row numbers) -> one batch of this process's rows, with the ids of all."""

    def __init__(
        self,
        records: list[Record],
        units: list[list[Unit]],
        prefix: int,
        encoder: Encoder,
        features: CachedFeatures | None,
        size: int,
        local: slice,
    ):
        self.records, self.units, self.prefix, self.encoder = records, units, prefix, encoder
        self.features, self.size, self.local = features, size, local

    def map(self, element: tuple[int, list[int]]) -> Batch:  # pyrefly: ignore[bad-override] (grain gives no types)
        width, numbers = element
        filled = numbers + [numbers[-1]] * (self.size - len(numbers))
        made = {number: self._row(number, width) for number in set(filled[self.local])}
        rows = [made[number] for number in filled[self.local]]
        ids = [self.records[number].id for number in numbers] + [""] * (self.size - len(numbers))
        seeds = [zlib.crc32(name.encode()) for name in ids[self.local]]
        stacked = stack(rows, self.features)
        return {**stacked, "seeds": np.array(seeds, np.uint32).view(np.int32), "ids": ids}

    def _row(self, number: int, width: int) -> Batch:
        record = self.records[number]
        row = self.encoder.chat.lay_out(record, self.units[number], width, left=True)._asdict()
        del row["loss_mask"]
        row["positions"] += self.prefix
        return {**row, **self.encoder.visual(record)}


def prepare(
    records: Sequence[dict[str, Any]],
    image_root: str,
    cfg: DataConfig,
    visual_tokens: int,
    vit: ViTConfig,
    batch_size: int,
    *,
    file: str = "evaluation records",
    replies: Sequence[Sequence[str]] | None = None,
    most_buckets: int = MAX_BUCKETS,
    shard: int = 0,
    num_shards: int = 1,
) -> Prompts:
    """LLaVA records that end with a human turn, as batches [batch_size / num_shards, bucket + reply_slots], shortest first.

    file: where the records come from, for error messages. replies: per record, the texts whose likelihood as the answer is
    wanted; None: answers are generated. shard: which rows of each batch this process lays out; it decodes no image of the
    others. The last batch is completed with copies of its last row, whose ids are "", so that there are only len(buckets)
    shapes. Raises BadRecord whatever on_bad_record says: a dropped question would change the error that is
    measured.
    """
    features = open_features(cfg)
    encoder = make_encoder(cfg, visual_tokens, vit, features)
    chat = encoder.chat
    parsed = [
        parse(
            raw,
            file,
            image_root,
            f"#{i}",
            generate=True,
            ignored=cfg.ignored_fields,
        )
        for i, raw in enumerate(records)
    ]
    if not parsed:
        return Prompts(np.zeros(0, np.int32), (), 0, 0, iter(()))
    units = [chat.prompt(record) for record in parsed]
    prefix = common_prefix(units)
    units = [_without(prompt, len(prefix)) for prompt in units]
    lengths = [chat.length(prompt) for prompt in units]
    buckets, said = choose_buckets(lengths, batch_size, most_buckets), []
    if replies is not None:
        said = [chat.replies(r, texts) for r, texts in zip(parsed, replies, strict=True)]
    spoken = [sum(map(len, ids)) for ids in said]
    slots = max(spoken, default=0)
    for prompt, ids in zip(units, said, strict=False):
        prompt += _laid_out(ids, slots, chat.tokenizer.pad_id)
    order = sorted(range(len(parsed)), key=lengths.__getitem__)
    pieces = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    widths = [next(w for w in buckets if w >= lengths[piece[-1]]) for piece in pieces]
    work = [(width + slots, piece) for width, piece in zip(widths, pieces, strict=True)]
    rows = batch_size // num_shards
    local = slice(shard * rows, (shard + 1) * rows)
    make = _MakeBatch(parsed, units, len(prefix), encoder, features, batch_size, local)
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
    batches = grain.MapDataset.source(work).map(make).to_iter_dataset(options)
    return Prompts(prefix, buckets, slots, sum(lengths) + sum(spoken), iter(batches))
