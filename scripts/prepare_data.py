#!/usr/bin/env python3
"""LLaVA records and their pictures, on a disk or in a bucket, to array_record shards that training reads.

scripts/prepare_data.py OUT --annotations A.json .. --image-roots DIR ..   then: --config.data.annotations=OUT --config.data.image_roots=''
scripts/prepare_data.py OUT --verify                                       reads all shards and compares their checksums

Killed or interrupted, the same command goes on with the shards that are missing. Records that cannot be used are listed in
OUT/bad.jsonl and left out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import logging
import multiprocessing
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package, from a checkout

from vlm_jax import files
from vlm_jax.data import fingerprint, preparing, sources
from vlm_jax.progress import Bar
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError, check_positive

log = logging.getLogger("vlm_jax.prepare_data")


def main(argv: list[str]) -> None:
    args = arguments().parse_args(argv)
    if args.verify:
        log.info("%s: %d records, every shard as it was written", args.out, preparing.verify(args.out))  # fmt: skip
        return
    check_positive("prepare_data", processes=args.processes, records_per_shard=args.records_per_shard)  # fmt: skip
    if not args.annotations or len(args.annotations) != len(args.image_roots):
        raise ConfigError(
            f"prepare_data: {len(args.annotations)} --annotations but {len(args.image_roots)} --image-roots; give one folder "
            "per file ('' where it names no picture)."
        )
    for path in args.annotations:
        sources.check_exists("prepare_data: annotations", path, "give a .json or .jsonl file")
    sources.check_image_roots("prepare_data", args.image_roots)
    out = files.to_path(args.out)
    with files.writing(out):
        files.check_writable(out)
    total = len(sources.of_json(args.annotations, args.image_roots))
    if not total:
        raise ConfigError(f"prepare_data: {', '.join(args.annotations)}: no record.")
    digests = [entry["sha256"] for entry in fingerprint.of_files(args.annotations)]
    count = -(-total // args.records_per_shard)
    given = (args.out, args.annotations, args.image_roots)
    entries = {}
    # spawn: a process that is forked while threads of a bucket's client run may never end.
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(min(args.processes, count), context) as pool,
        Bar("shards", count) as bar,
    ):
        running = {pool.submit(preparing.prepare_part, *given, i, count, digests): i for i in range(count)}  # fmt: skip
        for future in concurrent.futures.as_completed(running):
            entries[running[future]] = future.result()
            bar.advance(1)
    index = preparing.finish(args.out, [entries[i] for i in range(count)])
    size = sum(shard["bytes"] for shard in index["shards"])
    log.info(
        "%s: %d records in %d shards, %.1f MB; %d of %d left out%s",
        args.out, index["records"], count, size / 1e6, index["bad"], total,
        f", listed in {args.out}/{preparing.BAD}" if index["bad"] else "",
    )  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    parser = cli.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", metavar="OUT", help="directory of the shards")
    add("--annotations", nargs="+", default=[], help=".json or .jsonl files, in this order")
    add("--image-roots", nargs="+", default=[], help="one folder per file")
    add("--records-per-shard", type=int, default=4096, help="records of a shard (default: 4096, 250 MB of LLaVA's)")  # fmt: skip
    add("--processes", type=int, default=os.cpu_count() or 1, help="shards written at once (default: one per CPU)")  # fmt: skip
    add("--verify", action="store_true", help="only read OUT and compare the checksums")
    return parser


if __name__ == "__main__":
    sys.exit(cli.run(main))
