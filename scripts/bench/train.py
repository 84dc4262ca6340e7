#!/usr/bin/env python3
"""Tokens per second, MFU and memory of the training step, beside the same decoder in torch + transformers in the same run.

scripts/bench/train.py [--rounds 5] [--sizes mini 10m 40m] [--no-torch]      a ladder of decoders on this machine's CPU, float32 (40m-bf16: in bfloat16)
scripts/bench/train.py --sizes 0.5b-stage1 --supervised 0.05            the first stage of training: projector alone, captions
scripts/bench/train.py --device=gpu [--sizes 0.5b 1.8b 7b-frozen 7b-lora] bfloat16, float32 masters of what is trained
scripts/bench/train.py --memory                                         bytes of the 0.5B step by remat and loss_chunk; only compiles

Ours is the step of a run: plan, fresh_state, make_step, donated; encoder features stand in the batch, 64 per row, and a
two-layer projector puts them before the decoder. torch has the same projector, transformers' Llama or Qwen2 of the same
sizes with SDPA, clipping, and fused AdamW; "compiled" is torch.compile of its loss. Each has a process of its own, and they take
turns (turns.py). The table has medians, and the median (least, greatest) of
the round-by-round ratios torch / ours: above 1 ours is faster; the last column is the same of the time that the process held
cores, which other processes on the machine disturb less. FLOPs are those that the loss needs: logits of supervised positions
alone, though torch computes all of them. The peak behind "MFU" is the chip's, or on a CPU the fastest of jax's
and torch's 2048 x 2048 float32 products in the same rounds. Needs jax, flax and optax, and for torch's side torch and
transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import turns
from flax.traverse_util import flatten_dict

from vlm_jax import compressors, sharding
from vlm_jax.costs import chips
from vlm_jax.costs.flops import step_flops
from vlm_jax.settings import presets
from vlm_jax.settings.model import LMConfig, VLMConfig
from vlm_jax.settings.run import (
    DataConfig,
    Experiment,
    InitConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
)
from vlm_jax.training import step

VISUAL = 64  # the mini encoder's patches
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}


class Case(NamedTuple):
    lm: LMConfig
    rows: int
    length: int
    trainable: str = "^(projector|lm)/"


def toy(vocab: int, width: int, layers: int, heads: int, kv_heads: int, mlp: int, bias: bool) -> LMConfig:  # fmt: skip
    return LMConfig(
        vocab_size=vocab, width=width, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=width // heads,
        mlp_width=mlp, rope_theta=1e4, norm_eps=1e-6, qkv_bias=bias, qk_norm=False, tied_embeddings=False,
    )  # fmt: skip


CPU = {
    "mini": Case(presets.lm("mini-254k", remat="none"), 32, 128),
    "10m": Case(toy(8000, 256, 8, 4, 4, 704, False), 8, 256),
    "40m": Case(toy(8000, 512, 10, 8, 2, 1408, True), 4, 256),
    "120m": Case(toy(16000, 768, 12, 12, 12, 2048, False), 2, 256),
}
CPU |= {
    f"{name}-bf16": case._replace(lm=dataclasses.replace(case.lm, dtype="bfloat16"))
    for name, case in CPU.items()
}
CPU["0.5b-stage1"] = Case(presets.lm("qwen1.5-0.5b"), 1, 640, "^projector/")
MORE = ("-bf16", "-stage1")  # cases that are measured only when asked for


def gpu() -> dict[str, Case]:
    fast = dict(dtype="bfloat16")
    frozen = dict(fast, param_dtype="bfloat16")
    lora = dict(frozen, lora_rank=128, lora_alpha=256.0)
    return {
        "0.5b": Case(presets.lm("qwen1.5-0.5b", **fast), 16, 1024),
        "1.8b": Case(presets.lm("qwen1.5-1.8b", **fast), 8, 1024),
        "7b-frozen": Case(presets.lm("qwen1.5-7b", **frozen), 4, 1024, "^projector/"),
        "7b-lora": Case(presets.lm("qwen1.5-7b", **lora), 4, 1024, "lora_|^projector/"),
    }


def ladder(device: str) -> dict[str, Case]:
    return CPU if device == "cpu" else gpu()


def experiment_of(case: Case, remat: str, loss_chunk: int) -> Experiment:
    lm = dataclasses.replace(case.lm, remat=remat)
    model = VLMConfig(presets.vit("mini"), compressors.settings("identity", dtype=lm.dtype), lm)
    data = DataConfig(
        annotations=(), image_roots=(), tokenizer="", template="plain", system=None, turns="dialogue", max_tokens=case.length,
        max_query_tokens=1, max_images=1, image_mode="pad", max_image_pixels=1, batch_size=case.rows, seed=0, num_workers=0,
        on_bad_record="raise", max_bad_records=0, features_dir="",
    )  # fmt: skip
    optim = OptimConfig(
        trainable=case.trainable, optimizer="adamw", learning_rate=1e-4, muon_learning_rate=1e-2, warmup_ratio=0.0,
        weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8, clip_norm=1.0,
    )  # fmt: skip
    train = TrainConfig(
        num_steps=1000, num_epochs=0.0, seed=0, log_every=1, save_every=1, keep=1, loss_chunk=loss_chunk
    )  # fmt: skip
    return Experiment(model, data, optim, MeshConfig(), InitConfig("", "", "", ""), train)


def targets(case: Case, share: float) -> int:
    """Supervised tokens of a row, the last ones."""
    return round(share * case.length)


def batch_of(case: Case, share: float) -> dict[str, np.ndarray]:
    """Rows of VISUAL visual tokens and text, of which the last `share` is supervised."""
    rng = np.random.default_rng(0)
    rows, length = case.rows, case.length
    at = np.arange(length, dtype=np.int32)
    every_row = lambda x: np.tile(x, (rows, 1))  # noqa: E731
    return {
        "tokens": rng.integers(0, case.lm.vocab_size, (rows, length), np.int32),
        "visual_index": every_row(np.where(at < VISUAL, at, -1).astype(np.int32)),
        "positions": every_row(at),
        "segments": np.zeros((rows, length), np.int32),
        "loss_mask": every_row(at >= length - targets(case, share)),
        "feature_last": rng.standard_normal((rows, 1, VISUAL, 64)).astype(np.float32),
    }


def ours(case: Case, batch: dict[str, np.ndarray], args: argparse.Namespace) -> Callable[[], float]:
    """A call that does one step and returns its loss."""
    exp = experiment_of(case, args.remat, args.loss_chunk)
    mesh = sharding.make_mesh(exp.mesh, jax.devices()[:1])
    plan = step.plan(exp, mesh, 1000)
    update, given = step.make_step(plan), sharding.put(batch, mesh)
    state = step.fresh_state(plan)

    def run() -> float:
        nonlocal state
        with sharding.use(mesh):
            state, scalars = update(state, given)
        return float(scalars["loss"])

    return run


def theirs(case: Case, batch: dict[str, np.ndarray], compiled: bool) -> Callable[[], float]:
    """The same in torch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    lm = case.lm
    place = "cuda" if jax.default_backend() == "gpu" else "cpu"
    settings_of, model_of = (Qwen2Config, Qwen2ForCausalLM) if lm.qkv_bias else (LlamaConfig, LlamaForCausalLM)  # fmt: skip
    settings: Any = settings_of(
        vocab_size=lm.vocab_size, hidden_size=lm.width, intermediate_size=lm.mlp_width, num_hidden_layers=lm.num_layers,
        num_attention_heads=lm.num_heads, num_key_value_heads=lm.num_kv_heads, rms_norm_eps=lm.norm_eps,
        tie_word_embeddings=lm.tied_embeddings, max_position_embeddings=case.length, use_cache=False,
    )  # fmt: skip
    settings._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(place):
        decoder = model_of(settings).to(getattr(torch, lm.param_dtype)).train()
        projector = torch.nn.Sequential(
            torch.nn.Linear(64, lm.width), torch.nn.GELU(), torch.nn.Linear(lm.width, lm.width)
        )
    if "lm" not in case.trainable:
        decoder.requires_grad_(False)
    if lm.lora_rank:
        add_adapters(decoder, lm)
    learnt = [p for p in (*projector.parameters(), *decoder.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-4, weight_decay=0.0, fused=True)
    features = torch.tensor(batch["feature_last"][:, 0], device=place)
    tokens = torch.tensor(batch["tokens"], dtype=torch.int64, device=place)
    labels = torch.where(torch.tensor(batch["loss_mask"], device=place), tokens, -100)
    half = lm.dtype == "bfloat16"

    def loss_of() -> Any:
        with torch.autocast(place, torch.bfloat16) if half else contextlib.nullcontext():
            text = decoder.get_input_embeddings()(tokens[:, VISUAL:])
            x = torch.cat([projector(features).to(text.dtype), text], dim=1)
            return decoder(inputs_embeds=x, labels=labels).loss

    call = torch.compile(loss_of) if compiled else loss_of

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = call()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        return float(loss.detach())

    return run


def add_adapters(decoder: Any, lm: LMConfig) -> None:
    """y = W x + alpha / rank B A x beside every linear map of the layers, A and B in float32."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self, base: Any):
            super().__init__()
            where = base.weight.device
            self.base = base
            self.a = torch.nn.Parameter(torch.empty(lm.lora_rank, base.in_features, device=where))
            self.b = torch.nn.Parameter(torch.zeros(base.out_features, lm.lora_rank, device=where))
            torch.nn.init.kaiming_uniform_(self.a, a=5**0.5)

        def forward(self, x: Any) -> Any:
            low = torch.nn.functional.linear(x, self.a) * (lm.lora_alpha / lm.lora_rank)
            return self.base(x) + torch.nn.functional.linear(low, self.b)

    for layer in decoder.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(block, name, Adapted(child))


# A turn is as many steps as this takes, at least one: the first finds the caches full of another side's arrays.
TURN_SECONDS = 0.5


class Turn(NamedTuple):
    """What a contestant answers: seconds of a step, and on a CPU of a 2048 x 2048 float32 product."""

    loss: float
    wall: float
    cores: float  # of all cores that the process held
    product: float


def contestant(name: str, size: str, args: argparse.Namespace) -> Callable[[], Turn]:
    """One of the steps."""
    jax.config.update("jax_platforms", PLATFORMS[args.device])
    case = ladder(args.device)[size]
    batch = batch_of(case, args.supervised)
    x = np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32)
    run = ours(case, batch, args) if name == "ours" else theirs(case, batch, "compiled" in name)
    if name == "ours":
        matrix, matmul = jnp.asarray(x), jax.jit(jnp.matmul)
        product: Callable = lambda: jax.block_until_ready(matmul(matrix, matrix))  # noqa: E731
    else:
        import torch

        on_torch = torch.tensor(x)
        product = lambda: on_torch @ on_torch  # noqa: E731

    def turn() -> Turn:
        losses: list[float] = []
        start, spent = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < TURN_SECONDS:
            losses.append(run())
        wall, cores = time.perf_counter() - start, time.process_time() - spent
        start = time.perf_counter()
        product()
        return Turn(losses[0], wall / len(losses), cores / len(losses), time.perf_counter() - start)

    return turn


def measure(size: str, args: argparse.Namespace) -> list[str]:
    """Rows of the table."""
    case = ladder(args.device)[size]
    names = ("ours",) if args.no_torch else ("ours", "torch", "torch, compiled")
    sides = {name: turns.Side(contestant, (name, size, args), name == "ours") for name in names}
    found = turns.take(sides, 2 + args.rounds)  # the first turn compiles, another one warms up
    exp = experiment_of(case, args.remat, args.loss_chunk)
    plan = step.plan(exp, sharding.make_mesh(exp.mesh, jax.devices()[:1]), 1000)
    learning = flatten_dict(plan.state.trainable, sep="/").keys()
    flops = step_flops(
        exp.model, rows=case.rows, tokens=case.length, images=case.rows, query_tokens=0, trainable=learning, encoded=False,
        supervised=case.rows * targets(case, args.supervised),
    ).total  # fmt: skip
    if args.device == "cpu":
        peak = 2 * 2048**3 / min(turn.product for each in found.values() for turn in each[2:])
    else:
        peak = chips.peak_flops(jax.devices()[0].device_kind) or float("nan")
    rows = []
    for name, each in found.items():
        median = statistics.median(turn.wall for turn in each[2:])
        pairs = list(zip(found["ours"][2:], each[2:], strict=True))
        ratios = [b.wall / a.wall for a, b in pairs]
        cores = statistics.median(b.cores / a.cores for a, b in pairs)
        shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f}) | {cores:.2f}" if name != "ours" else "|"  # fmt: skip
        rows.append(
            f"| {size} | {case.lm.total_params / 1e6:.0f}M | {case.rows} x {case.length} | {name} | {each[0].loss:.2f} | "
            f"{median * 1e3:.0f} | {case.rows * case.length / median:.0f} | {flops / median / 1e9:.0f} | "
            f"{flops / median / peak:.0%} | {shown} |"
        )
    return rows


def memory(args: argparse.Namespace) -> list[str]:
    """Bytes of the compiled 0.5B step; nothing runs."""
    rows = [
        f"qwen1.5-0.5b, all of it trained with AdamW, float32, {args.rows} x {args.length} tokens, compiled for one CPU device; GB",
        "", "| remat | loss_chunk | state | temporary | peak: state + batch + temporary |", "|---|---|---|---|---|",
    ]  # fmt: skip
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    case = Case(presets.lm("qwen1.5-0.5b"), args.rows, args.length)
    batch = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for k, x in batch_of(case, args.supervised).items()
    }
    for remat in ("none", "dots", "full"):
        for chunk in (0, 256):
            plan = step.plan(experiment_of(case, remat, chunk), mesh, 1000)
            with sharding.use(mesh):
                lowered = step.make_step(plan).lower(plan.state, batch)
                # Unoptimised machine code: buffers are assigned before it is made.
                options = {"xla_backend_optimization_level": 0}
                found = lowered.compile(compiler_options=options).memory_analysis()
            state, temporary = found.alias_size_in_bytes / 1e9, found.temp_size_in_bytes / 1e9
            peak = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes  # fmt: skip
            rows.append(
                f"| {remat} | {chunk or 'all'} | {state:.2f} | {temporary:.2f} | {peak / 1e9 + temporary:.2f} |"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sizes",
        nargs="*",
        help="of the ladder; default: mini to 120m in float32, or all on a GPU",
    )
    parser.add_argument(
        "--remat", default="dots", help="as configs/default.py says unless given; --loss-chunk too"
    )
    parser.add_argument("--loss-chunk", type=int, default=512)
    parser.add_argument(
        "--supervised", type=float, default=0.5, help="share of each row's tokens that are targets"
    )
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rows", type=int, default=4, help="with --memory")
    parser.add_argument("--length", type=int, default=2048, help="with --memory")
    args = parser.parse_args()
    turns.begin()
    jax.config.update("jax_platforms", PLATFORMS[args.device])
    if args.memory:
        sys.stdout.write("\n".join(memory(args)) + "\n")
        return
    device = jax.devices()[0].device_kind
    out = [
        f"{device} ({platform.machine()}), {args.rounds} rounds, remat {args.remat}, loss_chunk {args.loss_chunk}, supervised {args.supervised:.0%}", "",
        "| decoder | parameters | tokens | step | first loss | ms | tokens/s | GFLOP/s | MFU | torch / ours (least, greatest) | CPU time, torch / ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    sys.stdout.write("\n".join(out) + "\n")
    for size in args.sizes or [name for name in ladder(args.device) if not name.endswith(MORE)]:
        sys.stdout.write("\n".join(measure(size, args)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
