#!/usr/bin/env python3
"""Images per second and core of the input pipeline, beside a torch DataLoader with the same Pillow work in the same run.

scripts/bench/input.py [--images 256] [--batch 32] [--rounds 3] [--workers 0,1,2] [--vit mini --lm mini-82k] [--steps 20]

Work per image: read, decode (JPEG 640 x 480, made on the spot), pad to a square, resize to 384 (bicubic), stack. "Per core"
divides by the CPU seconds of this process and its workers, so that a busy machine does not change it much. Every round times
ours and torch's one after the other; the table has medians. Then real training steps: the loop's order of step and next batch
against the same steps on one repeated batch; the difference is what the step waits for its data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PX, SIZE, QUALITY = 384, (640, 480), 90
VISUAL_TOKENS = 4
WARM = 2  # batches before the clock starts: threads and workers are up


def write_data(folder: Path, num: int) -> None:
    """JPEGs of about 60 kB (smooth shapes with grain, as in a photograph) and one question about each."""
    from vlm_jax.miniworld import generate

    rng = np.random.default_rng(0)
    records = []
    for i in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), np.int16)
        grain = rng.normal(0, 5, smooth.shape[:2])[..., None].astype(np.int16)
        picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{i}.jpg", quality=QUALITY)
        said = [("human", "<image>\n" + "what shape is left of the red circle ? " * 2), ("gpt", "square " * 12)]  # fmt: skip
        said = [{"from": who, "value": text} for who, text in said]
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": said})
    (folder / "data.json").write_text(json.dumps(records))
    generate.write_tokenizer(folder / "tokenizer")


def settings(folder: Path, args: argparse.Namespace, workers: int) -> Any:
    from configs import default

    c = default.get_config()
    c.data.update(
        {
            "annotations": (str(folder / "data.json"),), "image_roots": (str(folder),), "max_tokens": 128,
            "tokenizer": str(folder / "tokenizer"), "batch_size": args.batch, "num_workers": workers,
        }
    )  # fmt: skip
    c.model.vit.preset = args.vit
    if args.vit == "mini":
        c.model.vit.update({"image_px": PX, "patch_px": PX // 8})
    c.model.compressor.update({"name": "tokenpacker", "taps": (), "num_heads": 4, "stride": args.stride})  # fmt: skip
    c.model.lm.preset = args.lm
    c.train.num_steps = 10**6
    return c


def cpu_seconds() -> float:
    """Of this process and its living descendants (Linux)."""
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.name))
        used[int(entry.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    todo, total = [os.getpid()], 0.0
    while todo:
        pid = todo.pop()
        total += used.get(pid, 0.0)
        todo += children.get(pid, [])
    return total


def rate(batches: Iterator[Any], count: int, size: int) -> tuple[float, float]:
    """(images per second, images per CPU second) of `count` batches after the warm-up."""
    for _ in range(WARM):
        next(batches)
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        next(batches)
    images = count * size
    return images / (time.perf_counter() - wall), images / (cpu_seconds() - cpu)


def ours(folder: Path, args: argparse.Namespace, workers: int) -> tuple[float, float]:
    from vlm_jax.data import pipeline
    from vlm_jax.storage import run as experiment

    exp = experiment.resolve(settings(folder, args, workers))
    iterator = pipeline.train_iterator(exp.data, VISUAL_TOKENS, exp.model.vit)
    found = rate(iterator, args.images // args.batch, args.batch)
    iterator.close()
    return found


class Pictures:
    """The same work as a torch data set: LLaVA's expand2square, then the encoder's resize."""

    def __init__(self, folder: Path, length: int):
        self.paths, self.length = sorted(folder.glob("*.jpg")), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> np.ndarray:
        with Image.open(self.paths[index % len(self.paths)]) as file:
            image = file.convert("RGB")
        square = Image.new("RGB", (max(image.size),) * 2, (127, 127, 127))
        square.paste(image, tuple((max(image.size) - side) // 2 for side in image.size))
        return np.array(square.resize((PX, PX), Image.Resampling.BICUBIC))


def theirs(folder: Path, args: argparse.Namespace, workers: int) -> tuple[float, float]:
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(
        1
    )  # else collating in this process spins on all cores: half the speed per core
    count = args.images // args.batch
    pictures: Any = Pictures(folder, (count + WARM + 4) * args.batch)
    loader = DataLoader(pictures, args.batch, shuffle=True, num_workers=workers)
    return rate(iter(loader), count, args.batch)


def waiting(folder: Path, args: argparse.Namespace, workers: int) -> dict[str, float]:
    """Milliseconds per training step with new batches and on a repeated one, and those spent inside next()."""
    import jax

    from vlm_jax import sharding
    from vlm_jax.data import pipeline
    from vlm_jax.storage import run as experiment
    from vlm_jax.training import step

    exp = experiment.resolve(settings(folder, args, workers))
    visual_tokens = (exp.model.vit.grid // args.stride) ** 2
    plan = step.plan(exp, sharding.make_mesh(exp.mesh), exp.train.num_steps)
    state, function = step.fresh_state(plan), step.make_step(plan)
    iterator = pipeline.train_iterator(exp.data, visual_tokens, exp.model.vit)

    def run(draw: Callable[[], Any]) -> float:
        nonlocal state
        batch = draw()
        state, scalars = function(state, batch)
        jax.block_until_ready(scalars)
        start = time.perf_counter()
        for _ in range(args.steps):
            state, scalars = function(state, batch)
            batch = draw()  # as the loop does: while the device works
            jax.block_until_ready(scalars)
        return (time.perf_counter() - start) / args.steps * 1e3

    inside = 0.0

    def draw() -> Any:
        nonlocal inside
        start = time.perf_counter()
        batch = next(iterator)
        inside += time.perf_counter() - start
        return sharding.put(batch, plan.mesh)

    with sharding.use(plan.mesh):
        one = draw()
        repeated = run(lambda: one)
        inside = 0.0
        fresh = run(draw)
    iterator.close()
    return {"fresh": fresh, "repeated": repeated, "inside": inside / (args.steps + 1) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--images", type=int, default=256, help="timed per round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="0,1,2", help="worker processes; 0 = this process")
    parser.add_argument("--no-torch", action="store_true", help="where torch is not installed")
    parser.add_argument("--vit", default="mini")
    parser.add_argument("--stride", type=int, default=4, help="patches per visual token and side")
    parser.add_argument("--lm", default="mini-82k")
    parser.add_argument("--steps", type=int, default=20, help="training steps timed; 0 = none")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, min(args.images, 256))
        report(folder, args)


def report(folder: Path, args: argparse.Namespace) -> None:
    import jax

    cores = len(os.sched_getaffinity(0))
    kilobytes = statistics.mean(p.stat().st_size for p in folder.glob("*.jpg")) / 1e3
    out = [
        f"{cpu_name()}, {cores} cores; JPEG {SIZE[0]}x{SIZE[1]} ({kilobytes:.0f} kB) -> {PX}; batch {args.batch}, "
        f"median of {args.rounds} rounds of {args.images} images", "",
        "| workers | images/s | images/s per core | torch images/s | torch images/s per core | ours / torch per core |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for workers in map(int, args.workers.split(",")):
        rounds = []
        for _ in range(args.rounds):
            rounds.append((ours(folder, args, workers), None if args.no_torch else theirs(folder, args, workers)))  # fmt: skip
        wall, core = (statistics.median(r[0][i] for r in rounds) for i in range(2))
        cells = [f"{wall:.0f}", f"{core:.0f}", "", "", ""]
        if not args.no_torch:
            cells[2:4] = [f"{statistics.median(r[1][i] for r in rounds):.0f}" for i in range(2)]
            cells[4] = f"{statistics.median(r[0][1] / r[1][1] for r in rounds):.2f}"
        out.append(f"| {workers or 'threads'} | " + " | ".join(cells) + " |")
    if args.steps:
        out += [
            "", f"Training steps of {args.vit} at {PX} px + {args.lm} on {jax.devices()[0].device_kind}, batch {args.batch}, "
            f"{args.steps} steps", "",
            "| workers | ms/step | ms/step on one repeated batch | ms in next() | share of the step spent waiting |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
        for workers in map(int, args.workers.split(",")):
            found = waiting(folder, args, workers)
            share = max(0.0, 1 - found["repeated"] / found["fresh"])
            cells = [f"{found[key]:.1f}" for key in ("fresh", "repeated", "inside")]
            out.append(f"| {workers or 'threads'} | {' | '.join(cells)} | {share:.0%} |")
    sys.stdout.write("\n".join(out) + "\n")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
