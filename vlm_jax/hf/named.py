"""Models by name or by directory, as the `preset` keys of a config give them.

A preset is a name of `settings/presets.py`, or a model directory of the Hugging Face hub, whose config.json then gives the
fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax import compressors
from vlm_jax.files import to_path
from vlm_jax.hf.describe import describe
from vlm_jax.hf.settings import feature_layer
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError, build
from vlm_jax.settings.model import LMConfig, RopeScaling, ViTConfig, VLMConfig


def vit(preset: str, **overrides: Any) -> ViTConfig:
    """An encoder by name or directory, with fields replaced."""
    if _is_directory(preset, presets.VIT):
        return build(ViTConfig, {**_described(ViTConfig, "encoder", preset), **overrides})
    return presets.vit(preset, **overrides)


def lm(preset: str, **overrides: Any) -> LMConfig:
    """A language model by name or directory, with fields replaced."""
    if _is_directory(preset, presets.LM):
        return build(LMConfig, {**_described(LMConfig, "language model", preset), **overrides})
    return presets.lm(preset, **overrides)


def _is_directory(preset: str, table: Mapping[str, Any]) -> bool:
    return bool(preset) and preset not in table and to_path(preset).is_dir()


def _described(cls: type, kind: str, directory: str) -> dict[str, Any]:
    """The fields that a model directory's config.json gives."""
    found = describe(to_path(directory))
    config = found.vit if cls is ViTConfig else found.lm
    if config is None and cls is ViTConfig and found.encoder:
        config = vit(presets.HUB.get(found.encoder, found.encoder))
        layer = feature_layer(found.select_layer, config.num_layers)
        config = dataclasses.replace(config, feature_layer=layer)
    if config is None:
        raise ConfigError(f"{directory!r} describes no {kind}; give a directory that holds one.")
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(cls)}


def fields(block: str, preset: str) -> dict[str, Any]:
    """The fields that the preset, or model directory, of a config's block "vit" or "lm" gives."""
    config = {"vit": vit, "lm": lm}[block](preset)
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def vlm(model: Mapping[str, Any], given: Collection[str] = ()) -> VLMConfig:
    """The `model` block of a config: presets overlaid by every field that is not None.

    given: the fields that the user sets, such as "model.compressor.stride", which the compressor must have.
    Raises ConfigError for a wrong value.
    """
    block = {key: dict(model[key]) for key in ("vit", "compressor", "lm")}
    wanted = {field.removeprefix("model.compressor.") for field in given}
    scaling = block["lm"].pop("rope_scaling")
    if any(value is not None for value in scaling.values()):
        block["lm"]["rope_scaling"] = build(RopeScaling, _set(scaling))
    return VLMConfig(
        vit=vit(block["vit"].pop("preset"), **_set(block["vit"])),
        compressor=compressors.chosen(block["compressor"], wanted),
        lm=lm(block["lm"].pop("preset"), **_set(block["lm"])),
        projector_layers=model["projector_layers"],
        projector_norm=model["projector_norm"],
        projector_positions=model["projector_positions"],
        projector_scale=model["projector_scale"],
    )


def _set(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
