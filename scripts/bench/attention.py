#!/usr/bin/env python3
"""Attention without a flash kernel: vlm_jax.models.blocked beside the softmax that jax.nn writes out, forward and with gradients.

scripts/bench/attention.py [--rounds 5] [--rows 16] [--heads 8] [--width 32] [--lengths 128 640]

Causal rows with padding, float32. Both take the same blocks of queries, so that both leave out the keys behind them, and take turns in
every round; medians of the CPU seconds of this process, which other processes disturb less than the wall clock, of their
round-by-round ratios (least, greatest), and the temporary memory that XLA assigns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from vlm_jax.models import blocked


def written_out(q: Any, k: Any, v: Any, allowed: Any) -> Any:
    length = q.shape[1]
    size = max(blocked.MIN_QUERIES, -(-length // blocked.MAX_BLOCKS))
    outputs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        mask = allowed[:, None, start:end, :end]
        outputs.append(jax.nn.dot_product_attention(q[:, start:end], k[:, :end], v[:, :end], mask=mask))  # fmt: skip
    return jnp.concatenate(outputs, axis=1)


def gradients(attention: Callable) -> Callable:
    return jax.grad(lambda q, k, v, allowed: (attention(q, k, v, allowed) ** 2).sum(), (0, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name, value in (("rounds", 5), ("rows", 16), ("heads", 8), ("width", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lengths", type=int, nargs="*", default=(128, 640))
    args = parser.parse_args()
    kind = jax.devices()[0].device_kind
    lines = [
        f"{kind}, jax {jax.__version__}, {args.rows} rows, {args.heads} heads of {args.width}, {args.rounds} rounds", "",
        "| positions | | CPU ms, blocked | CPU ms, written out | written out / blocked (least, greatest) | temporary MiB, blocked | written out |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")
    for length in args.lengths:
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, (args.rows, length, args.heads, args.width)) for key in keys)  # fmt: skip
        allowed = jnp.tile(jnp.tril(jnp.ones((length, length), bool)), (args.rows, 1, 1))
        allowed = allowed.at[:, 8:, :5].set(False)
        for what, wrap in (("forward", lambda f: f), ("gradients", gradients)):
            calls, memory = {}, {}
            for name, f in (("blocked", blocked.blocked_attention), ("written out", written_out)):
                compiled = jax.jit(wrap(f)).lower(q, k, v, allowed).compile()
                calls[name] = compiled
                memory[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
                jax.block_until_ready(compiled(q, k, v, allowed))
            spent: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(args.rounds):
                for name, call in calls.items():
                    start = time.process_time()
                    jax.block_until_ready(call(q, k, v, allowed))
                    spent[name].append(1000 * (time.process_time() - start))
            ratios = [b / a for a, b in zip(spent["blocked"], spent["written out"], strict=True)]
            medians = " | ".join(f"{statistics.median(times):.0f}" for times in spent.values())
            shares = " | ".join(f"{value:.0f}" for value in memory.values())
            sys.stdout.write(
                f"| {length} | {what} | {medians} | {statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f}) | {shares} |\n"
            )


if __name__ == "__main__":
    main()
