"""Visual-token compressors, between the encoder and the decoder: the table of contents and the contract.

A compressor is one file and one line of COMPRESSORS. Its file holds

- the module: `M(config, grid)`, called as `module(last [B P C], taps [B P Z], query [B D] | None, scores | None)` and
  returning `Visual(tokens [B M C], valid [B M] | None)`.
  last: the feature layer; taps: the hidden states `config.taps` side by side (`last` again when none is tapped);
  query: the decoder's state at the question's last token, without gradient (None if `uses_query` is False);
  scores: a `layers.Scores`, what the encoder's layer after the feature compares (None if `uses_scores` is False).
  place "before" the projector (C is the encoder's width), "inside" it (before its last linear map: `last` is what enters
  that map) or "instead" of it (`M(config, grid, decoder width)` gives tokens as wide as the decoder).
  Patches and visual tokens are in row-major order where they stand on a grid.
- num_tokens(config, grid) -> M, the number of slots of one image on a grid x grid encoder: static, so that image slots,
  jitted shapes and FLOPs agree. A compressor whose number of tokens depends on the image marks the slots it fills;
- num_places(config, grid) -> rows of the table of learned positions that `projector_positions` adds to the tokens: where a
  token stands is its slot, or `Visual.places`. It does not change with the number of tokens an elastic compressor shows;
- elastic, for a compressor that is trained for several numbers of tokens and shows one of them later; else None;
- flops(config, grid, width, text_width) -> FLOPs of one image, a multiply-add counted as 2, norms and activations as 0;
  without the projector and without the language model's pass over the question;
- entry_flops, with the same arguments: the part of `flops` in linear maps that read features or the question themselves.
  While the encoder is frozen nothing flows back through them, so a training step spends them once less (default: 0).

Sizes that do not fit are refused by `config.VLMConfig`, before anything is built.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vlm_jax.compressors import identity, m3, mqt, pool, prumerge, quecc, tokenpacker, windows
from vlm_jax.compressors.visual import Visual
from vlm_jax.layers import Scores
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import CompressorConfig, VLMConfig


class Elastic(NamedTuple):
    """How many tokens are shown.

    show(tokens [B M D], count) -> Visual of as many slots that shows `count` tokens, a traced number, instead of M;
    train_tokens(config, grid) -> the counts trained for;
    draws: a training step draws one count, all equally likely; else its loss is the mean over all counts.
    """

    show: Callable[[Array, Array], Visual]
    train_tokens: Callable[[CompressorConfig, int], tuple[int, ...]]
    draws: bool


def _no_entry(config: CompressorConfig, grid: int, width: int, text_width: int) -> int:
    return 0


class Compressor(NamedTuple):
    module: type[nn.Module]
    num_tokens: Callable[[CompressorConfig, int], int]
    flops: Callable[[CompressorConfig, int, int, int], int]
    num_places: Callable[[CompressorConfig, int], int]
    uses_query: bool = False
    uses_taps: bool = False
    uses_scores: bool = False
    place: str = "before"  # before | inside | instead: of the projector
    elastic: Elastic | None = None
    entry_flops: Callable[[CompressorConfig, int, int, int], int] = _no_entry


# fmt: off
COMPRESSORS: dict[str, Compressor] = {
    "identity": Compressor(identity.Identity, identity.num_tokens, identity.flops, identity.num_tokens),
    "quecc": Compressor(quecc.QueCC, windows.num_tokens, quecc.flops, windows.num_tokens, uses_query=True, uses_taps=True, entry_flops=quecc.entry_flops),
    "tokenpacker": Compressor(tokenpacker.TokenPacker, windows.num_tokens, tokenpacker.flops, windows.num_tokens, uses_taps=True, entry_flops=tokenpacker.entry_flops),
    "pool": Compressor(pool.Pool, windows.num_tokens, pool.flops, windows.num_tokens),
    "m3": Compressor(m3.M3, m3.num_tokens, m3.flops, m3.num_places, place="inside", elastic=Elastic(m3.show, m3.train_tokens, draws=False)),
    "mqt": Compressor(mqt.MQT, mqt.num_tokens, mqt.flops, mqt.num_places, place="instead", elastic=Elastic(mqt.show, mqt.train_tokens, draws=True)),
    "prumerge": Compressor(prumerge.PruMerge, prumerge.num_tokens, prumerge.flops, prumerge.num_places, uses_scores=True),
    "prumerge_plus": Compressor(prumerge.PruMergePlus, prumerge.num_tokens_plus, prumerge.flops_plus, prumerge.num_places, uses_scores=True),
}
# fmt: on


def get(name: str) -> Compressor:
    """Raises ConfigError for a name that is not registered."""
    if name not in COMPRESSORS:
        raise ConfigError(f"unknown compressor {name!r}; use one of {', '.join(COMPRESSORS)}.")
    return COMPRESSORS[name]


def num_tokens(config: CompressorConfig, grid: int) -> int:
    """Slots for the visual tokens of one image on a grid x grid encoder."""
    return get(config.name).num_tokens(config, grid)


@functools.lru_cache(maxsize=1024)
def num_params(model: VLMConfig) -> int:
    """Parameters of the model's compressor, without the projector."""
    config, vit, entry = model.compressor, model.vit, get(model.compressor.name)
    given = model.lm.width if entry.place == "inside" and model.projector_layers > 1 else vit.width

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    patches, tapped = vit.num_patches, vit.width * max(1, len(config.taps))
    scores = Scores(array(vit.width), array(patches, vit.width), None)
    module = entry.module(config, vit.grid, *(model.lm.width,) * (entry.place == "instead"))
    params = jax.eval_shape(
        module.init,
        jax.random.key(0),
        array(patches, given),
        array(patches, tapped if entry.uses_taps else vit.width),
        array(model.lm.width) if entry.uses_query else None,
        scores if entry.uses_scores else None,
    )
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def train_tokens(config: CompressorConfig, grid: int) -> tuple[int, ...]:
    """The numbers of visual tokens that a training run shows, largest first; one for most compressors."""
    elastic = get(config.name).elastic
    counts = elastic.train_tokens(config, grid) if elastic else (num_tokens(config, grid),)
    return tuple(sorted(set(counts), reverse=True))


def decoder_passes(model: VLMConfig) -> int:
    """How often a training step runs the decoder over each row."""
    elastic = get(model.compressor.name).elastic
    once = elastic is None or elastic.draws
    return 1 if once else len(train_tokens(model.compressor, model.vit.grid))


def for_training(model: VLMConfig) -> VLMConfig:
    """The model with slots for the most tokens that training shows; its parameters are the same."""
    if get(model.compressor.name).elastic is None:
        return model
    most = train_tokens(model.compressor, model.vit.grid)[0]
    return dataclasses.replace(
        model, compressor=dataclasses.replace(model.compressor, visual_tokens=most)
    )
