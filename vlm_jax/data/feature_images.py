"""Every image of a dataset once, in batches: the input from which a frozen encoder's feature cache is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import logging
from jaxtyping import UInt8

from vlm_jax.data import sources
from vlm_jax.data.records import BadRecord, Record
from vlm_jax.data.rows import Pixels, make_pixels
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import ViTConfig
from vlm_jax.settings.run import DataConfig


def list_images(cfg: DataConfig) -> list[tuple[str, str]]:
    """All (relative path, root) that a config's records name, sorted, once each.

    Raises ConfigError if a path exists under two roots or images are stored inside a tfds dataset: the cache is keyed by
    relative path; BadRecord for unusable records, unless they are skipped.
    """
    found: dict[str, str] = {}
    source = sources.open_source(cfg)
    for index in range(len(source)):
        try:
            record = source[index]
        except BadRecord:
            if cfg.on_bad_record == "raise":
                raise
            continue
        for image in record.images:
            if not isinstance(image, str):
                raise ConfigError(
                    f"data: {record.file} holds its images itself; features_dir needs image files."
                )
            if found.setdefault(image, record.root) != record.root:
                raise ConfigError(
                    f"data: image {image!r} is named under {found[image]!r} and {record.root!r};"
                    " a feature cache needs distinct relative paths."
                )
    return sorted(found.items())


class _LoadImages(grain.transforms.Map):
    def __init__(self, pixels: Pixels, size: int, skip: bool):
        self.pixels, self.size, self.skip = pixels, size, skip

    def map(  # pyrefly: ignore[bad-override] (grain gives no types)
        self, element: list[tuple[str, str]]
    ) -> tuple[list[str], np.ndarray]:
        px = self.pixels.image_px
        out, names = np.zeros((self.size, px, px, 3), np.uint8), []
        for path, root in element:
            try:
                out[len(names)] = self.pixels.load(
                    Record(root, path, root, (path,), None, ()), path
                )
            except BadRecord as error:
                if not self.skip:
                    raise
                logging.warning("left out of the feature cache: %s", error)
                continue
            names.append(path)
        return names, out


def image_batches(
    paths: Sequence[tuple[str, str]],
    cfg: DataConfig,
    vit: ViTConfig,
    batch_size: int,
    shard: int = 0,
    num_shards: int = 1,
) -> Iterator[tuple[list[str], UInt8[np.ndarray, "B H W 3"]]]:
    """(relative paths [n <= B], pixels [B H W 3], zeros after the n-th) of what `list_images` gives, in order.

    Of each batch of `batch_size` images this is share `shard` of `num_shards` equal ones, B = batch_size / num_shards; every
    share has the same number of batches, the last of which may be empty. A bad image raises BadRecord, or is left out (and logged)
    if bad records are skipped.
    """
    size = batch_size // num_shards
    starts = range(shard * size, len(paths) + shard * size, batch_size)
    work = [list(paths[at : at + size]) for at in starts]
    load = _LoadImages(make_pixels(cfg, vit), size, cfg.on_bad_record == "skip")
    batches = grain.MapDataset.source(work).map(load)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)))
