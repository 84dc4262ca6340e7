"""FLOPs of a VLMConfig, part by part: of answering a question, and of a training step. A multiply-add is 2 FLOPs.

Counted: every matrix product, attention's two included, over the key slots that `models.attention` multiplies with (blocks
of queries, each over the keys up to its last query; flash kernels skip up to a fifth more). Adapters count as they run,
beside their kernels; merged into them, as they are exported, they cost nothing. Not counted: elementwise work (norms,
softmax, activations; 1 % at width 512, falling as 1 / width) and, in training, the optimiser and what is computed again for
the backward pass (remat). Within 2 % of XLA's own count (tests/costs/test_flops.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from vlm_jax import compressors
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LMConfig, ViTConfig, VLMConfig
from vlm_jax.settings.run import Experiment

QUERIES = 128  # models.blocked cuts queries into blocks of at least so many,
BLOCKS = 8  # and into at most so many blocks (a test holds the two files together)


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one question about `images` images, in the order they are spent."""

    encoder: int
    query: int  # the decoder's pass over the question alone, for compressors that look at it
    compressor: int
    projector: int
    prefill: int  # up to the logits of the first answer token
    decode: int  # the answer's later tokens

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def language_model(self) -> int:
        """What 2 N (Q + V) approximates, the answer's tokens included."""
        return self.prefill + self.decode


def score_pairs(tokens: int, keys: int) -> int:
    """Pairs of a query and a key that a causal row multiplies, the last of `tokens` queries seeing all of `keys`."""
    size = max(QUERIES, -(-tokens // BLOCKS))
    starts = range(0, tokens, size)
    ends = [min(start + size, tokens) for start in starts]
    return sum(
        (end - start) * (keys - tokens + end) for start, end in zip(starts, ends, strict=True)
    )


def encoder_maps(vit: ViTConfig) -> dict[str, int]:
    """Weights of each linear map of one layer, by its path below "vit/"."""
    square, wide = vit.width**2, vit.width * vit.mlp_width
    maps = {f"layers/attn/{name}": square for name in ("q", "k", "v", "out")}
    return maps | {"layers/mlp/fc1": wide, "layers/mlp/fc2": wide}


def _patch_flops(vit: ViTConfig) -> int:
    """The map from pixels to patches."""
    return 2 * vit.num_patches * 3 * vit.patch_px**2 * vit.width


def _encoder_rows(vit: ViTConfig) -> int:
    return vit.num_patches + vit.cls_token


def _encoder_attention(vit: ViTConfig) -> int:
    """Scores and mixing in one layer."""
    return 4 * _encoder_rows(vit) ** 2 * vit.width


def encoder_flops(vit: ViTConfig) -> int:
    """One image up to the feature layer; later layers are not run (LLaVA's CLIP runs 23 of 24)."""
    linear = 2 * _encoder_rows(vit) * sum(encoder_maps(vit).values())
    return _patch_flops(vit) + vit.feature_state * (linear + _encoder_attention(vit))


def decoder_maps(lm: LMConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear map of one layer, by its path below "lm/"."""
    q, kv = lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
    inner = {"q": (lm.width, q), "k": (lm.width, kv), "v": (lm.width, kv), "o": (q, lm.width)}
    maps = {f"layers/attn/{name}": size for name, size in inner.items()}
    up, down = (lm.width, lm.mlp_width), (lm.mlp_width, lm.width)
    return maps | {"layers/mlp/gate": up, "layers/mlp/up": up, "layers/mlp/down": down}


def _adapter_weights(lm: LMConfig, path: str) -> int:
    """Of the two thin maps beside a linear map; 0 without an adapter."""
    adapter = lm.adapter(path)
    return 0 if adapter is None else adapter.rank * sum(decoder_maps(lm)[path])


def _decoder_attention(lm: LMConfig, tokens: int, keys: int) -> int:
    """Scores and mixing in one layer."""
    return 4 * score_pairs(tokens, keys) * lm.num_heads * lm.head_dim


def decoder_flops(lm: LMConfig, tokens: int, keys: int, logits: int) -> int:
    """The decoder over the last `tokens` positions of `keys` key slots; the head runs on `logits` of them."""
    weights = sum(
        fan_in * fan_out + _adapter_weights(lm, path)
        for path, (fan_in, fan_out) in decoder_maps(lm).items()
    )
    layer = 2 * tokens * weights + _decoder_attention(lm, tokens, keys)
    return lm.num_layers * layer + 2 * logits * lm.width * lm.vocab_size


def _projector_maps(config: VLMConfig) -> list[int]:
    """FLOPs of each of the projector's maps on one image, the first one first."""
    compressor = config.compressor
    if compressor.place == "instead":
        return []
    tokens = compressor.num_tokens(config.vit.grid)
    early = config.vit.num_patches if compressor.place == "inside" else tokens
    rows = [early] * (config.projector_layers - 1) + [tokens]
    ins = [config.vit.width] + [config.lm.width] * (config.projector_layers - 1)
    return [2 * n * fan_in * config.lm.width for n, fan_in in zip(rows, ins, strict=True)]


def projector_flops(config: VLMConfig, images: int) -> int:
    """The maps before the compressor run on every patch, those behind it on every visual token."""
    return images * sum(_projector_maps(config))


def query_flops(config: VLMConfig, tokens: int) -> int:
    """The decoder's layers over one question alone."""
    layers = config.compressor.query_layers
    if layers == 0 or not config.compressor.uses_query:
        return 0
    read = config.lm if layers == -1 else dataclasses.replace(config.lm, num_layers=layers)
    return decoder_flops(read, tokens, tokens, logits=0)


def forward_flops(
    config: VLMConfig,
    *,
    text_tokens: int,
    output_tokens: int = 1,
    query_tokens: int | None = None,
    cached_text_tokens: int = 0,
    images: int = 1,
) -> Flops:
    """FLOPs of answering one question.

    Args:
      text_tokens: Q of the prompt, beside the visual tokens.
      output_tokens: answer length with its end-of-sequence token; the prefill yields the first, each other one costs a
        decode step over a cache that has grown by one.
      query_tokens: length of the query pass; None: text_tokens. Ignored by compressors that take no query.
      cached_text_tokens: how many of text_tokens have their keys and values in a cache already.
    """
    if not 0 <= cached_text_tokens <= text_tokens:
        raise ConfigError(
            f"flops: cached_text_tokens {cached_text_tokens} must lie in [0, text_tokens = {text_tokens}]."
        )
    if output_tokens < 1:
        raise ConfigError(f"flops: output_tokens must be at least 1, got {output_tokens}.")
    vit, lm = config.vit, config.lm
    compressor = config.compressor
    visual = images * compressor.num_tokens(vit.grid)
    length = text_tokens + visual
    query = text_tokens if query_tokens is None else query_tokens
    steps = range(length + 1, length + output_tokens)  # keys each decode step looks at
    return Flops(
        encoder=images * encoder_flops(vit),
        query=images * query_flops(config, query),
        compressor=images * compressor.flops(vit.grid, vit.width, lm.width),
        projector=projector_flops(config, images),
        prefill=decoder_flops(lm, length - cached_text_tokens, length, logits=1),
        decode=sum(decoder_flops(lm, 1, keys, logits=1) for keys in steps),
    )


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step, forward and backward, by part."""

    encoder: int
    query: int
    compressor: int
    projector: int
    decoder: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class _Learning:
    """Which parameters learn, and so how far gradients flow back.

    A linear map costs its forward FLOPs once more for the gradient of its weights, if they learn, and once for that of its
    input, if anything learns that the input depends on. Attention's two products have two inputs each.
    """

    paths: frozenset[str]

    def any(self, *prefixes: str) -> bool:
        """Whether something at or below one of the paths learns."""
        return any(
            path == prefix or path.startswith(f"{prefix}/")
            for path in self.paths
            for prefix in prefixes
        )


def step_flops(
    config: VLMConfig,
    *,
    rows: int,
    tokens: int,
    images: int,
    query_tokens: int,
    trainable: Collection[str],
    encoded: bool = True,
    supervised: int | None = None,
) -> StepFlops:
    """One training step on `rows` sequences of `tokens` slots with `images` image slots in all, padding included.

    Args:
      query_tokens: slots of the question that a compressor looks at.
      trainable: paths of the parameters that learn, such as "lm/layers/attn/q/kernel".
      encoded: whether the encoder runs; False: its features come from a cache.
      supervised: how many slots in all have logits, those of the tokens before a target; None: every slot.

    What MQT computes once per batch is counted per image (0.01 % of a 7B decoder's step).
    """
    config, passes = compressors.for_training(config), compressors.decoder_passes(config)
    learns = _Learning(frozenset(trainable))
    encoder_learns = encoded and learns.any("vit")
    compressor = _compressor_step(config, learns, encoder_learns)
    flows = images > 0 and (encoder_learns or learns.any("compressor", "projector"))
    logits = rows * tokens if supervised is None else supervised
    return StepFlops(
        encoder=images * encoded * _encoder_step(config.vit, learns),
        query=images * query_flops(config, query_tokens),
        compressor=images * compressor,
        projector=images * _projector_step(config, learns, encoder_learns),
        decoder=passes
        * (
            rows * _layers_step(config.lm, tokens, learns, flows)
            + logits * _head_step(config.lm, learns, flows)
        ),
    )


def batch_flops(
    exp: Experiment,
    trainable: Collection[str],
    tokens: int,
    has_images: bool,
    supervised: int | None = None,
) -> StepFlops:
    """`step_flops` of a batch of a run: `tokens` slots per row; text-only batches have no images.

    supervised: targets of the batch; None: as many as slots. With `train.loss_chunk` 0 every slot has logits all the same.
    """
    data = exp.data
    return step_flops(
        exp.model,
        rows=data.batch_size,
        tokens=tokens,
        images=data.batch_size * data.image_slots if has_images else 0,
        query_tokens=0 if data.query == "none" else data.max_query_tokens,
        trainable=trainable,
        encoded=not data.features_dir,
        supervised=supervised if exp.train.loss_chunk else None,
    )


def _encoder_step(vit: ViTConfig, learns: _Learning) -> int:
    forward = encoder_flops(vit)
    if not learns.any("vit"):
        return forward
    maps, rows = encoder_maps(vit), _encoder_rows(vit)
    learnt = sum(weights for path, weights in maps.items() if learns.any(f"vit/{path}"))
    layer = 2 * rows * (learnt + sum(maps.values())) + 2 * _encoder_attention(vit)
    return forward + vit.feature_state * layer + learns.any("vit/patch_embed") * _patch_flops(vit)


def _compressor_step(config: VLMConfig, learns: _Learning, encoder_learns: bool) -> int:
    """Nothing flows back through the maps that read a frozen encoder's features themselves."""
    entry, sizes = config.compressor, (config.vit.grid, config.vit.width, config.lm.width)
    forward = entry.flops(*sizes)
    if learns.any("compressor"):
        return 3 * forward - (0 if encoder_learns else entry.entry_flops(*sizes))
    return 2 * forward if encoder_learns else forward


def _projector_step(config: VLMConfig, learns: _Learning, encoder_learns: bool) -> int:
    place = config.compressor.place
    flows = encoder_learns or (place == "before" and learns.any("compressor"))
    total = 0
    for i, forward in enumerate(_projector_maps(config)):
        learnt = learns.any(f"projector/dense_{i}")
        total += forward * (1 + learnt + flows)
        flows = flows or learnt
    return total


def _layers_step(lm: LMConfig, tokens: int, learns: _Learning, visual: bool) -> int:
    """One row. visual: whether gradients flow on to the visual tokens, so through every layer."""
    flows = visual or learns.any("lm/embed", "lm/layers")
    weights = 0
    for path, (fan_in, fan_out) in decoder_maps(lm).items():
        own, adapter = fan_in * fan_out, _adapter_weights(lm, path)
        weights += own * (1 + flows + learns.any(f"lm/{path}/kernel"))
        weights += adapter * (1 + flows + learns.any(f"lm/{path}/lora_a", f"lm/{path}/lora_b"))
    layer = 2 * tokens * weights + (1 + 2 * flows) * _decoder_attention(lm, tokens, tokens)
    return lm.num_layers * layer


def _head_step(lm: LMConfig, learns: _Learning, visual: bool) -> int:
    """The logits of one slot. visual: as in `_layers_step`."""
    head = "lm/embed" if lm.tied_embeddings else "lm/head"
    back = visual or learns.any("lm/embed", "lm/layers", "lm/final_norm")
    return 2 * lm.width * lm.vocab_size * (1 + back + learns.any(head))
