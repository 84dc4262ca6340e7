#!/usr/bin/env python3
"""Milliseconds to find the nucleus of top-p sampling: by the most likely tokens first, and by sorting the whole vocabulary.

scripts/bench/sampling.py [--rounds 7]

Both are jitted and take turns in every round; the table has medians and the median of the round-by-round ratios. Logits are
normal with a spread of 6, whose nucleus at 0.9 has tens of tokens, as that of a language model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from vlm_jax.inference.generate import nucleus_floor


def sorted_floor(logits: jax.Array, top_p: float) -> jax.Array:
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    lines = [f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {rounds} rounds", "", "| rows | vocabulary | tokens of the nucleus | ms, candidates | ms, full sort | ratio |", "|---|---|---|---|---|---|"]  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")
    for rows, vocabulary in ((1, 32_000), (8, 32_000), (8, 151_936)):
        logits = 6 * jax.random.normal(jax.random.key(0), (rows, vocabulary))
        found = {
            name: jax.jit(lambda x, f=f: f(x, 0.9))
            for name, f in (("candidates", nucleus_floor), ("sort", sorted_floor))
        }
        least = {name: call(logits) for name, call in found.items()}  # compiles
        assert jnp.array_equal(least["candidates"], least["sort"])
        spent: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(rounds):
            for name, call in found.items():
                start = time.perf_counter()
                call(logits).block_until_ready()
                spent[name].append(1000 * (time.perf_counter() - start))
        size = int((logits >= least["sort"]).sum()) / rows
        ratio = statistics.median(
            b / a for a, b in zip(spent["candidates"], spent["sort"], strict=True)
        )
        medians = " | ".join(f"{statistics.median(times):.2f}" for times in spent.values())
        sys.stdout.write(f"| {rows} | {vocabulary} | {size:.0f} | {medians} | {ratio:.0f} |\n")


if __name__ == "__main__":
    main()
