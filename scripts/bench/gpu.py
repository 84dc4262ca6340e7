#!/usr/bin/env python3
"""One section of scripts/bench/gpu.sh, as a Markdown table: attention kernels, memory and time of a step, or generation.

scripts/bench/gpu.py kernels             flash attention beside XLA's: largest differences from float32, forward and gradients
scripts/bench/gpu.py step [SIZE ..]      a training step: memory and time as vlm_jax.costs predicts and XLA compiles, and as run
scripts/bench/gpu.py generate [SIZE ..]  encoder to first token, then a token at a time, for V = 1, 36, 576 and batches of 1 and 8
--smoke                                  the smallest sizes, for a machine without a GPU

Needs jax, flax, optax, einops and jaxtyping. Weights are random; times are medians of several runs after one that compiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import flax.linen as nn
import jax
import jax.numpy as jnp
import train as bench

from vlm_jax import compressors, sharding
from vlm_jax.costs import chips, flops, memory, price, training
from vlm_jax.costs.chips import GIB, Chip
from vlm_jax.inference.generate import Decoding, make_generate
from vlm_jax.models.attention import AttentionMask, attend, flash_kernel
from vlm_jax.models.vlm import Inputs, init_params
from vlm_jax.settings import presets
from vlm_jax.settings.model import LMConfig, ViTConfig, VLMConfig
from vlm_jax.training import step

# A CPU is given round numbers, so that every column is filled: its shares say nothing.
UNKNOWN = Chip("unknown (1 TFLOP/s, 100 GB/s)", (), 1e12, 16 * GIB, 100e9, 1e9)


def chip() -> Chip:
    return chips.find(jax.devices()[0].device_kind) or UNKNOWN


def say(*cells: object) -> None:
    sys.stdout.write(f"| {' | '.join(str(cell) for cell in cells)} |\n")
    sys.stdout.flush()


def header(*names: str) -> None:
    say(*names)
    say(*["---"] * len(names))


def told(call: Callable[[], Any], *row: object) -> Any:
    """What `call` returns; None, and a row that says why, when it fails: the next rows are measured all the same."""
    try:
        return call()
    except Exception as error:
        say(*row, f"failed: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}")
        return None


def median_ms(call: Callable[[], Any], runs: int = 5) -> float:
    jax.block_until_ready(call())
    spent = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call())
        spent.append(time.perf_counter() - start)
    return 1000 * statistics.median(spent)


# --- attention kernels ------------------------------------------------------------------------------------------------

# (rows, positions, query heads, key heads, head dim): Qwen1.5-1.8B, a decoder with grouped queries, and a head dim of 64.
ATTENTION = {"16 heads": (4, 1024, 16, 16, 128), "32 heads, 8 of keys": (2, 2048, 32, 8, 128), "head dim 64": (8, 640, 16, 16, 64)}  # fmt: skip


def kernels(shapes: dict[str, tuple[int, ...]]) -> None:
    """Rows end in padding, a quarter of the last one, whose outputs and gradients are not compared."""
    flash = flash_kernel(jax.devices()[0])
    header("attention, causal", "kernel", "forward: largest difference", "gradients: largest difference", "ms forward", "ms with gradients")  # fmt: skip
    for name, (rows, length, heads, kv_heads, size) in shapes.items():
        keys = jax.random.split(jax.random.key(0), 4)
        wide, narrow = (rows, length, heads, size), (rows, length, kv_heads, size)
        given = [jax.random.normal(k, s) for k, s in zip(keys, (wide, narrow, narrow, wide), strict=True)]  # fmt: skip
        segments = jnp.zeros((rows, length), jnp.int32).at[-1, -length // 4 :].set(-1)
        causal = jnp.tril(jnp.ones((length, length), bool)) & (segments == 0)[:, None, :]
        cases = {"float32": ("xla", causal), "xla": ("xla", causal), "flash": (flash, None)}
        found: dict[str, tuple] = {}
        for case, (kernel, allowed) in cases.items():
            dtype = jnp.float32 if case == "float32" else jnp.bfloat16
            mask = AttentionMask(allowed) if allowed is not None else AttentionMask(segments=segments)  # fmt: skip
            q, k, v, seed = (x.astype(dtype) for x in given)
            real = (segments == 0)[..., None, None]

            def output(q: Any, k: Any, v: Any, mask: Any = mask, kernel: str = kernel, real: Any = real) -> Any:  # fmt: skip
                return jnp.where(real, attend(q, k, v, mask, kernel), 0)

            def scalar(q: Any, k: Any, v: Any, seed: Any = seed, output: Callable = output) -> Any:
                return (output(q, k, v) * seed).astype(jnp.float32).sum()

            forward, backward = jax.jit(output), jax.jit(jax.grad(scalar, (0, 1, 2)))
            values = told(lambda f=forward, b=backward, x=(q, k, v): (f(*x), *b(*x)), name, kernel)
            if values is None:
                continue
            found[case] = values
            if case != "float32":
                apart = [float(jnp.abs(a.astype(jnp.float32) - b).max()) for a, b in zip(values, found["float32"], strict=True)]  # fmt: skip
                times = [median_ms(lambda f=f, x=(q, k, v): f(*x)) for f in (forward, backward)]
                say(name, kernel, f"{apart[0]:.2g}", f"{max(apart[1:]):.2g}", *(f"{t:.2f}" for t in times))  # fmt: skip


# --- the training step: predicted and measured ------------------------------------------------------------------------


def steps(ladder: dict[str, bench.Case]) -> None:
    own = chip()
    peak = "GiB measured (peak in use)"
    header("decoder", "GiB predicted", "GiB by XLA", peak, "ms bound", "ms measured", "MFU")
    for name, case in ladder.items():
        told(lambda n=name, c=case: step_row(n, c, own), name)


def step_row(name: str, case: bench.Case, own: Chip) -> None:
    exp = bench.experiment_of(case, "none", 0)
    mesh = sharding.make_mesh(exp.mesh, jax.devices()[:1])
    plan, batch = step.plan(exp, mesh, 1000), sharding.put(bench.batch_of(case, 0.5), mesh)
    state = step.fresh_state(plan)
    with sharding.use(mesh):
        compiled = step.make_step(plan).lower(state, batch).compile()
    found = compiled.memory_analysis()
    by_xla = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes  # fmt: skip
    spent = []
    for _ in range(6):
        start = time.perf_counter()
        state, scalars = compiled(state, batch)
        jax.block_until_ready(scalars["loss"])
        spent.append(time.perf_counter() - start)
    # Features stand in the batch, so the encoder costs nothing.
    exp = dataclasses.replace(exp, data=dataclasses.replace(exp.data, features_dir="cached"))
    predicted = training.step(exp, training.Ways(1, 1, 1), case.length)
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    seconds = statistics.median(spent[1:])
    say(
        name, f"{predicted.peak_bytes / GIB:.2f}", f"{by_xla / GIB:.2f}", f"{used / GIB:.2f}" if used else "not told",
        f"{1000 * predicted.seconds(own):.1f}", f"{1000 * seconds:.1f}",
        f"{predicted.flops / seconds / own.peak_flops:.0%}",
    )  # fmt: skip


# --- generation -------------------------------------------------------------------------------------------------------

TEXT, NEW = (
    64,
    33,
)  # tokens of the question and its frame; generated tokens, of which the prefill gives the first


def generations(lms: dict[str, LMConfig], vit: ViTConfig, counts: Sequence[int], batches: Sequence[int]) -> None:  # fmt: skip
    own = chip()
    header("decoder", "V", "batch", "ms to the first token", "its bound", "ms per token after it", "tokens/s", "memory bandwidth", f"ms for {NEW} tokens")  # fmt: skip
    for name, lm in lms.items():
        for count in counts:
            for batch in batches:
                told(lambda n=name, m=lm, c=count, b=batch: generation_row(n, m, vit, c, b, own), name, count, batch)  # fmt: skip


def generation_row(name: str, lm: LMConfig, vit: ViTConfig, count: int, batch: int, own: Chip) -> None:  # fmt: skip
    compressor = compressors.settings("tokenpacker", dtype=lm.dtype)
    if count == vit.num_patches:
        compressor = compressors.settings("identity", dtype=lm.dtype)
    else:
        compressor = compressors.with_tokens(compressor, vit.grid, count)
    model = VLMConfig(vit, compressor, lm)
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(model, jax.random.key(0)))
    at = jnp.arange(count + TEXT)
    rows: Callable[[jax.Array], jax.Array] = lambda x: jnp.tile(x, (batch, 1))  # noqa: E731
    pixels = jax.random.randint(jax.random.key(1), (batch, 1, vit.image_px, vit.image_px, 3), 0, 256, jnp.uint8)  # fmt: skip
    inputs = Inputs(
        rows(at % lm.vocab_size), rows(jnp.where(at < count, at, -1)), rows(at), rows(0 * at), images=pixels
    )  # fmt: skip
    spent = {}
    for new in (1, NEW):
        # No token ends an answer: every row generates all of them.
        generate = make_generate(model, Decoding(new, (), 0))
        seeds = jnp.zeros(batch, jnp.int32)
        spent[new] = median_ms(lambda g=generate, s=seeds: g(params, inputs, s))
    each = (spent[NEW] - spent[1]) / (NEW - 1)
    weights = memory.weight_bytes(model)
    cache = batch * price.cache_bytes(lm) * (count + TEXT + NEW / 2)
    share = (weights.layers + weights.head + cache) / (each / 1000) / own.hbm_bandwidth_bytes
    work = batch * flops.forward_flops(model, text_tokens=TEXT, output_tokens=1, images=1).total
    bound = max(work / own.peak_flops, weights.stored / own.hbm_bandwidth_bytes)
    say(
        name, count, batch, f"{spent[1]:.1f}", f"{1000 * bound:.1f}", f"{each:.2f}", f"{1000 * batch / each:.0f}",
        f"{share:.0%}", f"{spent[NEW]:.0f}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("section", choices=("kernels", "step", "generate"))
    parser.add_argument("sizes", nargs="*", help="of the section; default: all")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu" if args.smoke else "cuda")
    if args.section == "kernels":
        kernels({"tiny": (2, 128, 4, 2, 32)} if args.smoke else ATTENTION)
    elif args.section == "step":
        ladder = {"mini": bench.CPU["mini"]} if args.smoke else bench.gpu()
        steps({name: ladder[name] for name in args.sizes or ladder})
    elif args.smoke:
        tiny = presets.vit("mini")
        generations({"mini-82k": presets.lm("mini-82k")}, tiny, (1, tiny.num_patches), (1, 2))
    else:
        half = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
        lms = {size: presets.lm(f"qwen1.5-{size}", **half) for size in args.sizes or ("0.5b", "1.8b", "7b")}  # fmt: skip
        generations(lms, presets.vit("clip-l-336", **half), (1, 36, 576), (1, 8))


if __name__ == "__main__":
    main()
