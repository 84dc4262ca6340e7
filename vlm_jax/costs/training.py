"""What a training step takes on a mesh of chips, from shapes alone: FLOPs, memory per chip, a lower bound on its time.

Memory is that of AdamW with parameters, both moments and gradients in the dtypes of the settings. It lies within 30 % of what
XLA's compiler reports for the programs of docs/scale_aot.csv (tests/costs/test_training_costs.py); `vlm_jax.aot` measures.
The time is bounded by arithmetic, recomputation included, and by what a chip sends. Traffic with the chip's own memory is
not counted; it bounds LMs below 1B.
"""

from __future__ import annotations

import dataclasses
import math
import re

from vlm_jax import compressors
from vlm_jax.costs import flops
from vlm_jax.costs.chips import VALUE_BYTES, Chip
from vlm_jax.settings.model import LORA, LMConfig, VLMConfig
from vlm_jax.settings.run import Experiment, logit_block

GRADIENT_BYTES = 4
MOMENT_BYTES = {"float32": 4, "bfloat16": 2}
PARAM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Ways:
    """Sizes of a mesh: copies of the model, shards of it, parts of its heads and widths."""

    copies: int
    shards: int
    parts: int

    @property
    def chips(self) -> int:
        return self.copies * self.shards * self.parts

    @property
    def rows(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return self.copies * self.shards


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step, on all chips together unless it says otherwise."""

    tokens: int
    flops: int  # model FLOPs: no recomputation
    hardware_flops: int  # with it
    peak_bytes: float  # per chip
    sent_bytes: float  # per chip
    chips: int

    def seconds(self, chip: Chip) -> float:
        """A lower bound."""
        compute = self.hardware_flops / self.chips / chip.peak_flops
        return max(compute, self.sent_bytes / chip.link_bandwidth_bytes)


def parameters(config: VLMConfig) -> dict[str, int]:
    """Parameters by path, those of all layers of a map together; norms and biases of the encoder are left out."""
    vit, lm = config.vit, config.lm
    found = {
        f"vit/{path}/kernel": vit.num_layers * weights
        for path, weights in flops.encoder_maps(vit).items()
    }
    found["vit/patch_embed/kernel"] = 3 * vit.patch_px**2 * vit.width
    sizes = (vit.width, lm.width)
    found["compressor/weights"] = config.compressor.num_params(*sizes)
    maps = 0 if config.compressor.place == "instead" else config.projector_layers
    for i in range(maps):
        found[f"projector/dense_{i}/kernel"] = (vit.width if i == 0 else lm.width) * lm.width
    maps_of = flops.decoder_maps(lm)
    for path, (fan_in, fan_out) in maps_of.items():
        found[f"lm/{path}/kernel"] = lm.num_layers * fan_in * fan_out
        if adapter := lm.adapter(path):
            for name, side in zip(LORA, (fan_in, fan_out), strict=True):
                found[f"lm/{path}/{name}"] = lm.num_layers * adapter.rank * side
    inside = sum(fan_in * fan_out for fan_in, fan_out in maps_of.values())
    found["lm/layers/norms"] = lm.non_embedding_params - lm.num_layers * inside - lm.width
    found["lm/final_norm/scale"] = lm.width
    found["lm/embed"] = lm.vocab_size * lm.width
    if not lm.tied_embeddings:
        found["lm/head"] = lm.vocab_size * lm.width
    return {path: count for path, count in found.items() if count}


def trainable(exp: Experiment) -> dict[str, int]:
    """Those of `parameters` that learn."""
    pattern = re.compile(exp.optim.trainable)
    return {path: n for path, n in parameters(exp.model).items() if pattern.search(path)}


def step(exp: Experiment, ways: Ways, tokens: int, has_images: bool = True) -> Step:
    """A step on rows of `tokens` slots, visual ones included, each of them supervised: FLOPs of the head are at most these."""
    learning = trainable(exp)
    spent = flops.batch_flops(exp, learning, tokens, has_images)
    again = _recomputed(exp, tokens)
    return Step(
        tokens=exp.data.batch_size * tokens,
        flops=spent.total,
        hardware_flops=spent.total + again,
        peak_bytes=_state_bytes(exp, ways, learning)
        + _temporary_bytes(exp, ways, learning, tokens),
        sent_bytes=_sent_bytes(exp, ways, learning),
        chips=ways.chips,
    )


def _recomputed(exp: Experiment, tokens: int) -> int:
    """FLOPs of the decoder's layers that the backward pass computes again."""
    lm = exp.model.lm
    passes = compressors.decoder_passes(exp.model) * exp.data.batch_size
    forward = flops.decoder_flops(lm, tokens, tokens, logits=0)
    if lm.remat == "full":
        return passes * forward
    if lm.remat in ("dots", "offload"):  # attention's products alone
        maps = sum(fan_in * fan_out for fan_in, fan_out in flops.decoder_maps(lm).values())
        return passes * (forward - 2 * tokens * lm.num_layers * maps)
    return 0


def _state_bytes(exp: Experiment, ways: Ways, learning: dict[str, int]) -> float:
    """Parameters and moments. The decoder's are split over shards and parts, the encoder's only if it says so."""
    moments = 4 + MOMENT_BYTES[exp.optim.momentum_dtype]
    total = 0.0
    for path, count in parameters(exp.model).items():
        part = path.partition("/")[0]
        block = exp.model.lm if part == "lm" else exp.model.vit if part == "vit" else None
        size = PARAM_BYTES[block.param_dtype] if block else 4
        split = part == "lm" or (part == "vit" and exp.model.vit.sharded)
        share = ways.shards * ways.parts if split else 1
        total += count * (size + moments * (path in learning)) / share
    return total


def _temporary_bytes(exp: Experiment, ways: Ways, learning: dict[str, int], tokens: int) -> float:
    """Gradients, what the backward pass needs of each layer, gathered weights, logits and one layer's own values."""
    lm, train = exp.model.lm, exp.train
    rows = max(exp.data.batch_size / ways.rows / train.micro_batches, 1)
    share = ways.shards * ways.parts
    gradients = sum(
        GRADIENT_BYTES * n / (share if path.startswith("lm/") else 1)
        for path, n in learning.items()
    )
    slots = rows * tokens
    saved = lm.num_layers * slots * _kept(lm) * VALUE_BYTES / (1 if lm.remat == "full" else ways.parts)  # fmt: skip
    table = lm.vocab_size * lm.width / ways.parts
    learns_head = ("lm/embed" if lm.tied_embeddings else "lm/head") in learning
    tables = table * (VALUE_BYTES * (1 if lm.tied_embeddings else 2) + GRADIENT_BYTES * learns_head)
    block = slots
    if train.loss_chunk:
        block = logit_block(train.loss_chunk, math.ceil(rows), tokens, learns_head)
    logits = block * lm.vocab_size * 8 / ways.parts
    layer = lm.non_embedding_params / lm.num_layers / ways.parts
    inner = slots * (2 * _attention_width(lm) + 3 * lm.mlp_width + 4 * lm.width) * VALUE_BYTES
    images = rows * exp.data.image_slots * (not exp.data.features_dir)
    return (
        gradients + saved + tables + logits + 2 * layer * VALUE_BYTES + 2 * inner / ways.parts
        + images * _image_bytes(exp)
    )  # fmt: skip


def _attention_width(lm: LMConfig) -> int:
    return (lm.num_heads + lm.num_kv_heads) * lm.head_dim


def _kept(lm: LMConfig) -> float:
    """Values of a layer and a position that are kept for the backward pass."""
    if lm.remat in ("full", "offload"):
        return lm.width
    products = 2 * lm.width + 2 * _attention_width(lm) + 2 * lm.mlp_width
    return products if lm.remat == "dots" else 2.0 * products


def _image_bytes(exp: Experiment) -> float:
    """Of one image on its way through a frozen encoder: one layer's values, and all features that a compressor taps."""
    vit = exp.model.vit
    rows = vit.num_patches + vit.cls_token
    layer = rows * (4 * vit.width + 2 * vit.mlp_width) * VALUE_BYTES + vit.num_heads * rows**2 * 6
    taps = len(exp.model.compressor.taps) * rows * vit.width * VALUE_BYTES
    learns = any(path.startswith("vit/") for path in trainable(exp))
    return layer * (vit.num_layers if learns else 1) + taps


def _sent_bytes(exp: Experiment, ways: Ways, learning: dict[str, int]) -> float:
    """Weights gathered in both passes of each micro-batch, gradients summed over shards and copies, sums over parts.

    A ring sends (n - 1) / n of what n chips exchange.
    """
    lm, micro = exp.model.lm, exp.train.micro_batches
    weights = sum(n for path, n in parameters(exp.model).items() if path.startswith("lm/"))
    learnt = sum(n for path, n in learning.items() if path.startswith("lm/"))
    shards, parts = ways.shards, ways.parts
    gathered = micro * 2 * VALUE_BYTES * weights / parts * (shards - 1) / shards
    reduced = micro * GRADIENT_BYTES * learnt / parts * (shards - 1) / shards
    copied = 2 * GRADIENT_BYTES * learnt / parts / shards * (ways.copies - 1) / ways.copies
    slots = exp.data.batch_size * exp.data.max_tokens / ways.rows
    # Two sums of the residual stream per layer, forward and backward.
    summed = 4 * lm.num_layers * slots * lm.width * VALUE_BYTES * 2 * (parts - 1) / parts
    return gathered + reduced + copied + summed
