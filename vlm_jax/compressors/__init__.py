"""Visual-token compressors, between the encoder and the decoder: the table of contents and the contract.

A compressor is one file and one line of COMPRESSORS. Its file holds

- the module: `M(config, grid)`, called as `module(last [B P C], taps [B P Z], query [B D] | None, scores | None)` and
  returning `Visual(tokens [B M C], valid [B M] | None)`.
  last: the feature layer; taps: the hidden states `config.taps` side by side (`last` again when none is tapped);
  query: the decoder's state at the question's last token, without gradient (None if `uses_query` is False);
  scores: a `layers.Scores`, what the encoder's layer after the feature compares (None if `uses_scores` is False).
  Patches and visual tokens are in row-major order where they stand on a grid.
- num_tokens(config, grid) -> M, the number of slots of one image on a grid x grid encoder: static, so that image slots,
  jitted shapes and FLOPs agree. A compressor whose number of tokens depends on the image marks the slots it fills;
- flops(config, grid, width, text_width) -> FLOPs of one image, a multiply-add counted as 2, norms and activations as 0;
  without the projector and without the language model's pass over the question.

Sizes that do not fit are refused by `config.VLMConfig`, before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from vlm_jax.compressors import identity, prumerge, quecc, tokenpacker, windows
from vlm_jax.config import CompressorConfig, ConfigError


class Compressor(NamedTuple):
    module: type[nn.Module]
    num_tokens: Callable[[CompressorConfig, int], int]
    flops: Callable[[CompressorConfig, int, int, int], int]
    uses_query: bool = False
    uses_taps: bool = False
    uses_scores: bool = False


# fmt: off
COMPRESSORS: dict[str, Compressor] = {
    "identity": Compressor(identity.Identity, identity.num_tokens, identity.flops),
    "quecc": Compressor(quecc.QueCC, windows.num_tokens, quecc.flops, uses_query=True, uses_taps=True),
    "tokenpacker": Compressor(tokenpacker.TokenPacker, windows.num_tokens, tokenpacker.flops, uses_taps=True),
    "prumerge": Compressor(prumerge.PruMerge, prumerge.num_tokens, prumerge.flops, uses_scores=True),
    "prumerge_plus": Compressor(prumerge.PruMergePlus, prumerge.num_tokens_plus, prumerge.flops_plus, uses_scores=True),
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
