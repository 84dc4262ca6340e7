#!/usr/bin/env python3
"""GFLOP/s of a 135M decoder's matrix products on this machine, in float32 and bfloat16.

scripts/bench/products.py [--rows 768] [--calls 20]

Medians over the calls. Processors with AMX multiply bfloat16 several times faster than float32, if XLA uses it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

SHAPES = ((576, 1536), (1536, 576), (576, 576), (576, 192), (576, 49152))  # of SmolLM2-135M's maps


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--calls", type=int, default=20)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.rows} rows\n")
    print("| map | float32, GFLOP/s | bfloat16 |\n|---|---|---|")
    for into, out in SHAPES:
        found = [gflops_per_s(args.rows, into, out, dtype, args.calls) for dtype in (jnp.float32, jnp.bfloat16)]  # fmt: skip
        print(f"| {into} x {out} | {found[0]:.0f} | {found[1]:.0f} |")


if __name__ == "__main__":
    main()
