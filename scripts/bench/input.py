#!/usr/bin/env python3
"""Images per second and core of the input pipeline, beside a torch DataLoader with the same Pillow work in the same run.

scripts/bench/input.py [--images 256] [--batch 32] [--rounds 3] [--workers 0,1,2] [--vit mini --lm mini-82k] [--steps 20]

Work per image: read, decode (JPEG 640 x 480, made on the spot), pad to a square, resize to 384 (bicubic), stack. "Per core"
divides by the CPU seconds of this process and its workers, so that a busy machine does not change it much. Every round times
data.decoder=exact, fast and torch's one after the other; the table has medians. Then real training steps: the loop's order of step and next batch
against the same steps on one repeated batch; the difference is what the step waits for its data.
"""

from __future__ import annotations

import argparse
import io
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vlm_jax.data import images

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


def settings(folder: Path, args: argparse.Namespace, workers: int, decoder: str = "exact") -> Any:
    from configs import default

    c = default.get_config()
    c.data.update(
        {
            "annotations": (str(folder / "data.json"),), "image_roots": (str(folder),), "max_tokens": 128,
            "tokenizer": str(folder / "tokenizer"), "batch_size": args.batch, "num_workers": workers, "decoder": decoder,
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


def ours(folder: Path, args: argparse.Namespace, workers: int, decoder: str) -> tuple[float, float]:
    from vlm_jax.data import pipeline
    from vlm_jax.storage import run as experiment

    exp = experiment.resolve(settings(folder, args, workers, decoder))
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
        "| workers | images/s | images/s per core | fast: images/s | fast: per core | fast / exact per core | torch: images/s | torch: per core | exact / torch per core |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for workers in map(int, args.workers.split(",")):
        rates: dict[str, list[tuple[float, float]]] = {}
        for _ in range(args.rounds):
            for decoder in images.DECODERS:
                rates.setdefault(decoder, []).append(ours(folder, args, workers, decoder))
            if not args.no_torch:
                rates.setdefault("torch", []).append(theirs(folder, args, workers))
        cells = []
        for name, beside in (("exact", ""), ("fast", "exact"), ("torch", "exact")):
            found = rates.get(name, [])
            cells += [f"{statistics.median(r[i] for r in found):.0f}" if found else "" for i in range(2)]  # fmt: skip
            if beside:
                ratios = [a[1] / b[1] for a, b in zip(found, rates[beside], strict=False)]
                ratio = statistics.median(ratios) if ratios else float("nan")
                cells.append(f"{ratio if name == 'fast' else 1 / ratio:.2f}")
        out.append(f"| {workers or 'threads'} | {' | '.join(cells)} |")
    out += ["", differences()]
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


def differences() -> str:
    """By how much the fast decoder's pixels differ from the exact ones, on photographs that ship inside scikit-image."""
    import skimage.data

    apart = []
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        picture = io.BytesIO()
        Image.fromarray(getattr(skimage.data, name)()).save(picture, "JPEG", quality=QUALITY)
        both = [images.load(picture.getvalue(), 336, "pad", (0.5,) * 3, 10**7, decoder=d).astype(int) for d in images.DECODERS]  # fmt: skip
        apart.append(np.abs(both[0] - both[1]))
    values = np.concatenate([x.ravel() for x in apart])
    return f"fast beside exact, {len(apart)} photographs at 336 pixels, of 255: mean difference {values.mean():.2f}, 99 % below {np.quantile(values, 0.99):.0f}"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
