#!/usr/bin/env python3
"""Time and FLOPs per image of each compressor at CLIP-L/14-336 size, QueCC and TokenPacker beside torch in the same run.

scripts/bench/compressors.py [--batch 8] [--rounds 7] [--torch] [--dtype bfloat16] [--decoder-width 4096]

Compressor and projector, forward, features on the device. Every round times each case once, torch's right after ours, so that
a busy machine is busy for both; the table has the median, and the median of the round-by-round ratios ours / torch.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import compressors
from vlm_jax.layers import Scores
from vlm_jax.models.projector import Projector
from vlm_jax.settings.model import CompressorConfig

WIDTH, GRID = 1024, 24
TAPS = (12, 16, 22, 23)
CASES = [
    ("identity", compressors.settings("identity")),
    ("pool s=4", compressors.settings("pool", stride=4)),
    ("tokenpacker s=2", compressors.settings("tokenpacker", stride=2, taps=TAPS)),
    ("tokenpacker s=4", compressors.settings("tokenpacker", stride=4, taps=TAPS)),
    ("quecc s=4", compressors.settings("quecc", stride=4, taps=TAPS)),
    ("quecc s=24", compressors.settings("quecc", stride=24, taps=TAPS)),
    ("m3 36", compressors.settings("m3", visual_tokens=36)),
    ("mqt 256", compressors.settings("mqt", num_heads=16)),
    ("mqt 36", compressors.settings("mqt", num_heads=16, visual_tokens=36)),
    ("prumerge 32", compressors.settings("prumerge", max_kept=31)),
    ("prumerge_plus 145", compressors.settings("prumerge_plus", prune_ratio="fixed")),
]  # fmt: skip
TORCH = ("tokenpacker s=2", "tokenpacker s=4", "quecc s=4", "quecc s=24")


def features(batch: int, decoder_width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "last": (batch, GRID**2, WIDTH), "taps": (batch, GRID**2, len(TAPS) * WIDTH), "text": (batch, decoder_width),
        "query": (batch, WIDTH), "keys": (batch, GRID**2, WIDTH), "class_key": (batch, WIDTH),
    }  # fmt: skip
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def ours(config: CompressorConfig, given: dict[str, np.ndarray], width: int, dtype: str) -> tuple[Callable, float]:  # fmt: skip
    """(a call that waits for the tokens, GFLOP per image)."""
    entry = compressors.get(config.name)
    instead = entry.place == "instead"
    module = entry.module(config, GRID, *((width,) if instead else ()))
    projector = Projector(width, 0 if instead else 2, "none", "none", dtype)
    scores = Scores(*(jnp.asarray(given[k], dtype) for k in ("query", "keys", "class_key"))) if entry.uses_scores else None  # fmt: skip
    last, taps, text = (jnp.asarray(given[k], dtype) for k in ("last", "taps", "text"))

    def forward(params: Any, last: Any, taps: Any, text: Any, scores: Any) -> Any:
        x = projector.apply(params["projector"], last, method="early") if entry.place == "inside" else last  # fmt: skip
        taps = taps if entry.uses_taps else x
        tokens = module.apply(
            params["compressor"], x, taps, text if entry.uses_query else None, scores
        ).tokens
        if entry.place == "before":
            tokens = projector.apply(params["projector"], tokens, method="early")
        return projector.apply(params["projector"], tokens, method="late")

    key, one = jax.random.key(0), slice(0, 1)
    entering = jnp.zeros((1, GRID**2, width if entry.place == "inside" else WIDTH))
    some = jax.tree.map(lambda x: x[one], scores)
    params = {
        "compressor": module.init(key, entering, taps[one] if entry.uses_taps else entering, text[one] if entry.uses_query else None, some),
        "projector": projector.init(key, jnp.zeros((1, 1, WIDTH))),
    }  # fmt: skip
    run = jax.jit(forward)
    tokens = compressors.num_tokens(config, GRID)
    flops = entry.flops(config, GRID, WIDTH, width)
    if not instead:
        first = GRID**2 if entry.place == "inside" else tokens
        flops += 2 * first * WIDTH * width + 2 * tokens * width**2
    return lambda: jax.block_until_ready(run(params, last, taps, text, scores)), flops / 1e9


def torch_modules() -> dict[str, Callable]:
    """The same maths in torch: name -> builder(decoder width)."""
    import torch
    from torch import nn

    def normed_mlp(inputs: int) -> Any:
        return nn.Sequential(
            nn.Linear(inputs, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH, 1e-6)
        )

    class Windowed(nn.Module):
        """Keys, values, attention within windows, projector; subclasses make the queries."""

        def __init__(self, stride: int, width: int):
            super().__init__()
            self.stride = stride
            self.keys, self.values = normed_mlp(4 * WIDTH), normed_mlp(4 * WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, 8, batch_first=True)
            self.projector = nn.Sequential(nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, width))  # fmt: skip

        def windows(self, x: Any) -> Any:
            side = GRID // self.stride
            x = x.unflatten(1, (side, self.stride, side, self.stride)).transpose(2, 3)
            return x.reshape(-1, self.stride**2, WIDTH)

        def attend(self, queries: Any, taps: Any) -> Any:
            keys, values = self.windows(self.keys(taps)), self.windows(self.values(taps))
            one = queries.reshape(-1, 1, WIDTH)
            mixed = self.attention(one, keys, values, need_weights=False)[0]
            return self.projector(mixed.reshape(len(taps), -1, WIDTH))

    class TokenPacker(Windowed):
        def __init__(self, stride: int, width: int):
            super().__init__(stride, width)
            self.queries = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH, 1e-6))  # fmt: skip

        def forward(self, last: Any, taps: Any, text: Any) -> Any:
            square = last.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
            side = GRID // self.stride
            coarse = nn.functional.interpolate(square, (side, side), mode="bilinear")
            return self.attend(self.queries(coarse.flatten(2).transpose(1, 2)), taps)

    class QueCC(Windowed):
        def __init__(self, stride: int, width: int):
            super().__init__(stride, width)
            self.text = nn.Sequential(nn.Linear(width, WIDTH), nn.LayerNorm(WIDTH, 1e-6))
            self.queries = normed_mlp(WIDTH)
            self.down = nn.Conv2d(WIDTH, WIDTH, stride, stride, groups=WIDTH)

        def forward(self, last: Any, taps: Any, text: Any) -> Any:
            asked = self.queries(last + self.text(text)[:, None])
            square = asked.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
            return self.attend(self.down(square).flatten(2).transpose(1, 2), taps)

    torch.manual_seed(0)
    return {"tokenpacker": TokenPacker, "quecc": QueCC}


def theirs(config: CompressorConfig, given: dict[str, np.ndarray], width: int, dtype: str) -> Callable:  # fmt: skip
    import torch

    place = "cuda" if jax.default_backend() == "gpu" else "cpu"
    module = torch_modules()[config.name](config.stride, width).eval()
    module = module.to(place, getattr(torch, dtype))
    inputs = [torch.tensor(given[k]).to(place, getattr(torch, dtype)) for k in ("last", "taps", "text")]  # fmt: skip

    def run() -> None:
        with torch.inference_mode():
            module(*inputs)
            if place == "cuda":
                torch.cuda.synchronize()

    return run


def seconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch", action="store_true", help="QueCC and TokenPacker in torch too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--decoder-width", type=int, default=4096)
    args = parser.parse_args()
    given, width = features(args.batch, args.decoder_width), args.decoder_width
    runs, flops = {}, {}
    for name, config in CASES:
        runs[name], flops[name] = ours(config, given, width, args.dtype)
        runs[name]()  # compiles
        if args.torch and name in TORCH:
            runs[f"{name} (torch)"] = theirs(config, given, width, args.dtype)
            runs[f"{name} (torch)"]()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    device = jax.devices()[0].device_kind
    out = [
        f"{device} ({platform.machine()}), {args.dtype}, batch {args.batch}, decoder width {width}, {args.rounds} rounds; "
        "forward, compressor and projector",
        "", "| compressor | tokens | GFLOP / image | ms / image | ours / torch |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, config in CASES:
        each = statistics.median(times[name]) / args.batch * 1e3
        other = times.get(f"{name} (torch)")
        ratio = statistics.median(a / b for a, b in zip(times[name], other, strict=True)) if other else None  # fmt: skip
        shown = f"{ratio:.2f}" if ratio else ""
        out.append(
            f"| {name.split()[0]} | {compressors.num_tokens(config, GRID)} | {flops[name]:.1f} | {each:.1f} | {shown} |"
        )
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
