#!/usr/bin/env python3
"""GFLOP/s of a decoder's matrix products on this machine.

scripts/bench/products.py [--rows 768] [--calls 20]    a 135M decoder's, in float32 and bfloat16
scripts/bench/products.py --torch                      float32 products and their gradients, beside torch's in turns

Medians over the calls. Processors with AMX multiply bfloat16 several times faster than float32, if XLA uses it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

SHAPES = ((576, 1536), (1536, 576), (576, 576), (576, 192), (576, 49152))  # of SmolLM2-135M's maps

# (rows, in, out) of the MLP and the attention maps of scripts/bench/train.py's 40m and 10m, and of Qwen1.5-0.5B's MLP
TRAINED = ((1024, 512, 1408), (1024, 512, 512), (2048, 256, 704), (2048, 256, 256), (640, 1024, 2816))  # fmt: skip


def gflops_per_s(rows: int, into: int, out: int, dtype: jnp.dtype, calls: int) -> float:
    a, b = jnp.ones((rows, into), dtype), jnp.ones((into, out), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(product(a, b))
        seconds.append(time.perf_counter() - start)
    return 2 * rows * into * out / statistics.median(seconds) / 1e9


def beside_torch(rows: int, into: int, out: int, calls: int) -> list[float]:
    """GFLOP/s of jax and of torch, in turns: y = x w, the gradient of x, the gradient of w."""
    import torch

    shapes = ((rows, into), (into, out), (rows, out))
    x, w, d = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    tx, tw, td = (torch.tensor(jax.device_get(array)) for array in (x, w, d))
    product, of_x, of_w = (
        jax.jit(lambda a, b, axes=axes: jnp.einsum(axes, a, b))
        for axes in ("nd,df->nf", "nf,df->nd", "nd,nf->df")
    )
    turns: tuple[Callable, ...] = (
        lambda: product(x, w), lambda: tx @ tw, lambda: of_x(d, w), lambda: td @ tw.T, lambda: of_w(x, d), lambda: tx.T @ td,
    )  # fmt: skip
    seconds: list[list[float]] = [[] for _ in turns]
    for _ in range(calls + 1):  # the first compiles
        for call, spent in zip(turns, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            spent.append(time.perf_counter() - start)
    return [2 * rows * into * out / statistics.median(spent[1:]) / 1e9 for spent in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--torch", action="store_true")
    args = parser.parse_args()
    if args.torch:
        os.environ["OMP_WAIT_POLICY"] = "passive"  # torch's threads would hold cores in our turn
        print("| rows x in x out | y = x w, GFLOP/s: jax | torch | gradient of x: jax | torch | of w: jax | torch |")  # fmt: skip
        print("|---|---|---|---|---|---|---|")
        for shape in TRAINED:
            found = beside_torch(*shape, args.calls)
            print(f"| {' x '.join(map(str, shape))} |", " | ".join(f"{x:.0f}" for x in found), "|")
        return
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.rows} rows\n")
    print("| map | float32, GFLOP/s | bfloat16 |\n|---|---|---|")
    for into, out in SHAPES:
        found = [gflops_per_s(args.rows, into, out, dtype, args.calls) for dtype in (jnp.float32, jnp.bfloat16)]  # fmt: skip
        print(f"| {into} x {out} | {found[0]:.0f} | {found[1]:.0f} |")


if __name__ == "__main__":
    main()
