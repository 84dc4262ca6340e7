"""Visual-token compressors, between the encoder and the decoder: the table of contents and the contract. Loads no jax.

A compressor is one file, its flax module, and one line of COMPRESSORS. NAME.py holds its frozen settings, a subclass of
`settings.model.CompressorConfig`, and with them everything that is known without running it:

- the fields: its own settings, which are those of `model.compressor` in a config;
- the traits: place, uses_query, uses_taps, uses_scores, elastic, draws, sizable; drawn, how `show` draws its tokens;
- num_tokens, the number of slots of one image: static, so that image slots, jitted shapes and FLOPs agree. A compressor
  whose number of tokens depends on the image marks the slots it fills;
- num_places, rows of the table of learned positions that `projector_positions` adds to the tokens: where a token stands is
  its slot, or `VisualTokens.places`. It does not change with the number of tokens that an elastic compressor shows;
- num_params, and flops of one image, a multiply-add counted as 2, norms and activations as 0. While the encoder is frozen
  nothing flows back through the maps of `entry_flops`: a training step spends them once less;
- check, which refuses sizes that do not fit before anything is built;
- reference, the names under which its release stores it, with reference_fields and from_reference, its config.json.

`flax_module` is the dotted path of what runs: `M(config, grid)`, called as `module(last [B P C], taps [B P Z],
query [B D] | None, scores | None)` and returning a `visual.VisualTokens(tokens [B M C], valid [B M] | None)`. It stands in
modules/, because flax loads jax, and settings, costs and laws must not.

  last: the feature layer; taps: the hidden states `config.taps` side by side (`last` again when none is tapped);
  query: the decoder's state at the question's last token, without gradient (None if `uses_query` is False);
  scores: a `layers.Scores`, what the encoder's layer after the feature compares (None if `uses_scores` is False).
  place "before" the projector (C is the encoder's width), "inside" it (before its last linear map: `last` is what enters
  that map) or "instead" of it (`M(config, grid, decoder width)` gives tokens as wide as the decoder).
  Patches and visual tokens are in row-major order where they stand on a grid.
  An elastic module has a static method show(VisualTokens of M slots, count) -> VisualTokens of as many slots that shows `count`
  tokens, a traced number, instead of M.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from vlm_jax.compressors.identity import IdentityConfig
from vlm_jax.compressors.m3 import M3Config
from vlm_jax.compressors.mqt import MQTConfig
from vlm_jax.compressors.pool import PoolConfig
from vlm_jax.compressors.prumerge import PruMergeConfig, PruMergePlusConfig
from vlm_jax.compressors.quecc import QueCCConfig
from vlm_jax.compressors.querypool import QueryPoolConfig
from vlm_jax.compressors.tokenpacker import TokenPackerConfig
from vlm_jax.settings.checks import ConfigError, build
from vlm_jax.settings.model import CompressorConfig, VLMConfig

if TYPE_CHECKING:
    from ml_collections import ConfigDict

COMPRESSORS: dict[str, type[CompressorConfig]] = {
    "identity": IdentityConfig,
    "quecc": QueCCConfig,
    "tokenpacker": TokenPackerConfig,
    "pool": PoolConfig,
    "m3": M3Config,
    "mqt": MQTConfig,
    "querypool": QueryPoolConfig,
    "prumerge": PruMergeConfig,
    "prumerge_plus": PruMergePlusConfig,
}


def get(name: str) -> type[CompressorConfig]:
    """Raises ConfigError for a name that is not registered."""
    if name not in COMPRESSORS:
        raise ConfigError(f"unknown compressor {name!r}; use one of {', '.join(COMPRESSORS)}.")
    return COMPRESSORS[name]


def settings(name: str, **fields: Any) -> CompressorConfig:
    """The settings of a compressor. Raises ConfigError for an unknown name, and for a field that it does not have."""
    own = settings_of(name)
    for field, value in fields.items():
        if field not in own:
            raise ConfigError(f"{name}: has no setting {field!r}; it has {', '.join(own)}.")
        _check_kind(name, field, value, getattr(get(name), field))
    return build(get(name), fields)


def _check_kind(name: str, field: str, value: Any, default: Any) -> None:
    """Raises ConfigError for a value of another type than the field's default."""
    kinds = {float: (float, int), tuple: (tuple, list)}.get(type(default), (type(default),))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        example = (
            "a tuple of numbers, such as (1, 2)" if tuple in kinds else f"one {kinds[0].__name__}"
        )
        raise ConfigError(f"{name}: {field} must be {example}, got {value!r}.")


def settings_of(name: str) -> tuple[str, ...]:
    """The names of a compressor's settings."""
    return tuple(field.name for field in dataclasses.fields(get(name)) if field.init)


def chosen(block: Mapping[str, Any], given: Collection[str] = ()) -> CompressorConfig:
    """The settings out of a block that may hold those of every compressor: a config's, or an older run's config.json.

    Settings of the other compressors are left out, but those in `given` must be this one's. Raises ConfigError for a
    setting that no compressor has.
    """
    own = settings_of(block["name"])
    others = {field for name in COMPRESSORS for field in settings_of(name)} - set(own)
    fields = {name: value for name, value in block.items() if name != "name"}
    return settings(
        block["name"],
        **{n: value for n, value in fields.items() if n not in others or n in given},
    )


def choose(block: ConfigDict, name: str, **fields: Any) -> None:
    """Names a compressor in a config's `model.compressor` and sets fields; the settings that it does not have are taken out."""
    with block.unlocked():
        for field in set(block) - {"name", *settings_of(name)}:
            del block[field]
        block.update({"name": name, **fields})


def num_tokens(config: CompressorConfig, grid: int) -> int:
    """Slots for the visual tokens of one image on a grid x grid encoder."""
    return config.num_tokens(grid)


def with_tokens(config: CompressorConfig, grid: int, visual_tokens: int) -> CompressorConfig:
    """The compressor set to `visual_tokens` of a grid x grid encoder; ConfigError if it cannot be."""
    if config.sizable:
        return config.with_tokens(grid, visual_tokens)
    if not config.uses_scores and config.num_tokens(grid) == visual_tokens:
        return config
    raise ConfigError(
        f"{config.name}: its visual tokens cannot be chosen; use one of {', '.join(sizable())}."
    )


def sizable() -> tuple[str, ...]:
    """The compressors whose number of visual tokens can be chosen."""
    return tuple(name for name, entry in COMPRESSORS.items() if entry.sizable)


def train_tokens(config: CompressorConfig, grid: int) -> tuple[int, ...]:
    """The numbers of visual tokens that a training run shows, largest first; one for most compressors."""
    return tuple(sorted(set(config.counts(grid)), reverse=True))


def decoder_passes(model: VLMConfig) -> int:
    """How often a training step runs the decoder over each row."""
    once = not model.compressor.elastic or model.compressor.draws
    return 1 if once else len(train_tokens(model.compressor, model.vit.grid))


def for_training(model: VLMConfig) -> VLMConfig:
    """The model with slots for the most tokens that training shows; its parameters are the same."""
    if not model.compressor.elastic:
        return model
    most = train_tokens(model.compressor, model.vit.grid)[0]
    return dataclasses.replace(model, compressor=model.compressor.with_tokens(model.vit.grid, most))
