"""The settings of each part of the model that a directory describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from vlm_jax.compressors.identity import IdentityConfig
from vlm_jax.files import Path, to_path
from vlm_jax.hf import directory, reference, settings
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import CompressorConfig, LMConfig, ViTConfig, VLMConfig


class Described(NamedTuple):
    """The parts that a directory describes; None for the others."""

    vit: ViTConfig | None = None
    lm: LMConfig | None = None
    compressor: CompressorConfig | None = None
    projector_layers: int = 0  # 0: no projector
    # The original LLaVA layout names its encoder instead: a hub name or a path, which hidden state it uses, and whether
    # images are padded to squares (else they are prepared as the encoder's own processor does).
    encoder: str = ""
    select_layer: int = -2
    padded: bool = False


def describe(folder: Path) -> Described:
    """The settings of a decoder, an image encoder, a LLaVA directory or one in the original layout.

    Raises ConfigError for an unknown model_type and for any field that asks for what is not computed here; names in the
    log, once, the fields that change nothing because transformers does not know them.
    """
    raw, where = directory.read_config(folder), str(folder / "config.json")
    model_type = raw["model_type"]
    if reference.is_reference(raw):
        found, ignored = _reference(raw, folder, where)
    elif model_type in settings.DECODERS:
        found = Described(lm=settings.decoder(raw, where))
        ignored = settings.ignored(raw, model_type, settings.DECODER_READ)
    elif model_type in settings.ENCODERS:
        found = Described(vit=settings.encoder(raw, folder, where))
        ignored = settings.ignored(raw, model_type, settings.ENCODER_READ)
    elif model_type in settings.PAIRS:
        found, ignored = _pair(raw, folder, where)
    elif model_type == "llava":
        found, ignored = _llava(raw, folder, where)
    else:
        known = ", ".join([*settings.DECODERS, *settings.ENCODERS, *settings.PAIRS, "llava"])
        raise ConfigError(
            f"{where}: model_type {model_type!r} is not known here; use one of {known}."
        )
    if ignored:
        names = directory.listed(ignored)
        directory.say_once(f"{where}: ignored, because transformers does not know them: {names}.")
    return found


def _reference(raw: Mapping[str, Any], folder: Path, where: str) -> tuple[Described, list[str]]:
    lm = reference.decoder(raw, where)
    opened = directory.open_directory(folder)
    names = directory.sort(opened.tensors)[directory.REFERENCE]
    shapes = {name: entry.shape for name, entry in opened.tensors.items()}
    found = Described(
        lm=lm,
        compressor=reference.compressor(raw, names, shapes, where),
        projector_layers=reference.projector_layers(raw, names, where),
        encoder=raw["mm_vision_tower"],
        select_layer=-2
        if raw.get("mm_vision_select_layer") is None
        else raw["mm_vision_select_layer"],
        padded=raw.get("image_aspect_ratio") == "pad",
    )
    return found, reference.ignored(raw, where)


def _pair(raw: Mapping[str, Any], folder: Path, where: str) -> tuple[Described, list[str]]:
    own = settings.PAIRS[raw["model_type"]]
    settings.check_marks(raw, raw["model_type"], where)
    # CLIP's older files hold their settings in vision_config_dict, which counts where both are there.
    older = raw["model_type"] == "clip" and raw.get("vision_config_dict")
    vision = settings.block(raw, "vision_config_dict" if older else "vision_config", where)
    ignored = _inside("vision_config", settings.ignored(vision, own, settings.ENCODER_READ))
    return Described(vit=settings.encoder(vision, folder, f"{where}: vision_config", own)), ignored


def _inside(block: str, names: list[str]) -> list[str]:
    return [f"{block}.{name}" for name in names]


def _llava(raw: Mapping[str, Any], folder: Path, where: str) -> tuple[Described, list[str]]:
    text, vision = (
        settings.block(raw, "text_config", where),
        settings.block(raw, "vision_config", where),
    )
    settings.check_marks(raw, "llava", where)
    text_type, vision_type = text.get("model_type", "llama"), vision.get("model_type", "clip_vision_model")  # fmt: skip
    in_text, in_vision = f"{where}: text_config", f"{where}: vision_config"
    settings.check_decoder(text_type, in_text)
    settings.check_encoder(vision_type, in_vision)
    settings.check_marks(text, text_type, in_text)  # before transformers validates the whole config
    c = settings.complete(raw, "llava", where)
    lm = settings.decoder(text, in_text, text_type, c.text_config)
    vit = settings.encoder(vision, folder, in_vision, vision_type, c.vision_config)
    settings.check_declared(raw, "llava", settings.LLAVA_READ, where)
    # Embeddings are tied where either level says so: transformers copies the value of text_config to the top level.
    lm = dataclasses.replace(lm, tied_embeddings=c.tie_word_embeddings)
    layers = c.vision_feature_layer
    if isinstance(layers, list) and len(layers) != 1:
        raise ConfigError(f"{where}: vision_feature_layer {directory.short(layers)} must be one layer.")  # fmt: skip
    layer = layers[0] if isinstance(layers, list) else layers
    layer = settings.feature_layer(layer, vit.num_layers)
    # "default" drops the first row, which is right with a class token; "full" keeps all rows, which is right without one.
    strategy = "default" if vit.cls_token else "full"
    if c.vision_feature_select_strategy != strategy:
        raise ConfigError(
            f"{where}: vision_feature_select_strategy must be {strategy!r} with this encoder, not "
            f"{c.vision_feature_select_strategy!r}."
        )
    # transformers' LLaVA uses SigLIP's hidden states before its last norm, the last one included.
    vit = dataclasses.replace(vit, feature_layer=layer, post_norm=False)
    ignored = settings.ignored(raw, "llava", settings.LLAVA_READ)
    ignored += _inside("text_config", settings.ignored(text, text_type, settings.DECODER_READ))
    ignored += _inside(
        "vision_config", settings.ignored(vision, vision_type, settings.ENCODER_READ)
    )
    return Described(vit, lm, IdentityConfig(), projector_layers=2), ignored


def check_same_model(path: str, config: VLMConfig) -> None:
    """Raises ConfigError when a directory describes a whole model whose parts are connected otherwise than in `config`."""
    found = describe(to_path(path))
    if found.compressor is None:
        return
    ours, theirs = dataclasses.asdict(config.compressor), dataclasses.asdict(found.compressor)
    pairs: list[tuple[str, Any, Any]] = [
        (f"compressor.{name}", ours[name], theirs[name])
        for name in ("name", "stride", "query_grid")
        if name in ours and name in theirs
    ]
    layer = found.vit.feature_layer if found.vit else found.select_layer
    pairs.append(("vit.feature_layer", config.vit.feature_layer, layer))
    if found.projector_layers:
        pairs.append(("projector_layers", config.projector_layers, found.projector_layers))
    for field, here, there in pairs:
        if here != there:
            raise ConfigError(
                f"export: model.{field} is {here!r}, in {path!r} it is {there!r}; another base, or none, fits this model."
            )


# Fields that may differ from config.json: how the part is computed, adapters (which it does not store), and how an encoder's
# images are prepared and which of its states is used.
FREE = {
    "lm": ("dtype", "param_dtype", "remat", "attention", "nominal_params", "lora_rank", "lora_alpha", "lora_targets"),
    "vit": ("dtype", "param_dtype", "remat", "sharded", "image_px", "position_grid", "feature_layer", "post_norm", "mean", "std", "resample"),
}  # fmt: skip


def check_agrees(path: str, part: str, config: VLMConfig) -> None:
    """Raises ConfigError when `config` describes another decoder or encoder than the directory's config.json."""
    if part not in FREE:
        return  # the shapes of its tensors are compared when they are loaded
    found = describe(to_path(path))
    theirs = found.vit if part == "vit" else found.lm
    ours: ViTConfig | LMConfig = getattr(config, part)
    if theirs is None:
        return
    for field in dataclasses.fields(ours):
        here, there = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name not in FREE[part] and here != there:
            raise ConfigError(
                f"init: {part} {path!r} has {field.name} {there!r}, but model.{part} says {here!r}; set "
                f"--config.model.{part}.preset={path}."
            )
