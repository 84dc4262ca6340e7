"""The config of each training of a sweep: the sweep's own, with the fields of a stage, an LM and a compressor filled in."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import compressors
from vlm_jax.files import to_path
from vlm_jax.hf import named
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig, stride_for
from vlm_jax.sweeps import plan
from vlm_jax.sweeps.plan import Folders, Stage, Training


def config_of(
    cfg: ConfigDict, stage: Stage, training: Training, where: Folders, rerun: int = 0, seed: int = 0
) -> ConfigDict:
    """The config of `stage` as `training` goes through it.

    rerun: the number of the training's try. seed: is added to the training's, so that a rerun draws other numbers. Raises
    ConfigError for a field that does not exist, and for a number of visual tokens that the compressor cannot give.
    """
    c = copy.deepcopy(cfg)
    c.train.num_steps, c.train.num_epochs = stage.steps, stage.epochs or 1.0
    c.train.seed = c.data.seed = training.seed + seed
    c.optim.trainable = stage.trainable
    c.optim.learning_rate = stage.learning_rate
    c.optim.muon_learning_rate = stage.muon_learning_rate
    c.optim.decay_ratio = stage.decay_ratio
    c.data.batch_size = stage.batch_size
    c.data.annotations = tuple(where.path(path) for path in stage.annotations)
    roots = stage.image_roots or (".",) * len(stage.annotations)
    c.data.image_roots = tuple(where.path(path) for path in roots)
    if (
        not stage.is_last
    ):  # held-out records are those of the evaluated stage, unless a stage names its own
        c.train.validation, c.train.validation_roots, c.train.keep_best = (), (), False
    if stage.per != "seed":
        c.model.lm.preset = training.lm
        for field, value in _lm_fields(cfg, stage, training.lm):
            _set(c, f"lm_settings of {training.lm!r}", field, value)
    for field, value in stage.settings:
        _set(c, f"stages.{stage.name}", field, value)
    c.train.validation = tuple(where.path(path) for path in c.train.validation)
    c.train.validation_roots = tuple(where.path(path) for path in c.train.validation_roots)
    own = _presets(c, where)
    _compress(c, cfg, stage, training)
    _start(c, cfg, stage, training, where, rerun, own)
    model = model_of(c)
    if stage.cached and not model.compressor.uses_scores:  # queries and keys are in no cache
        c.data.features_dir = str(where.features)
    visual = c.data.max_images * _slots(model)
    c.data.max_tokens = stage.text_tokens + visual
    if stage.buckets:
        c.data.sampling = "modality_length"
        c.data.length_buckets = tuple(width + visual for width, _ in stage.buckets)
    return c


def model_of(c: ConfigDict) -> VLMConfig:
    return named.vlm(c.model.to_dict())


def _slots(model: VLMConfig) -> int:
    """Visual tokens of one image in training."""
    return compressors.train_tokens(model.compressor, model.vit.grid)[0]


def _lm_fields(cfg: ConfigDict, stage: Stage, lm: str) -> Iterator[tuple[str, Any]]:
    """(field, value) that the config sets for an LM, in this stage or in all."""
    names = [other.name for other in plan.stages(cfg)]
    for name, fields in cfg.sweep.lm_settings:
        for field, value in fields.items() if name == lm else ():
            first, _, rest = field.partition(".")
            if first not in names:
                yield field, value
            elif first == stage.name:
                yield rest, value


def _set(c: ConfigDict, owner: str, field: str, value: Any) -> None:
    node = c
    *blocks, last = field.split(".")
    for name in blocks:
        node = node[name] if isinstance(node, ConfigDict) and name in node else None
    if not isinstance(node, ConfigDict) or last not in node:
        raise ConfigError(
            f"sweep: {owner} sets {field!r}, which is no field of a config; see configs/default.py."
        )
    node[last] = value


def _compress(c: ConfigDict, cfg: ConfigDict, stage: Stage, training: Training) -> None:
    """Names the compressor and sets it to the training's number of visual tokens."""
    if stage.compressor:
        compressors.choose(c.model.compressor, stage.compressor)
        return
    counts = training.visual_tokens
    if training.compressor == plan.TEXT_ONLY:
        compressors.choose(c.model.compressor, "identity")
        c.data.max_images, c.data.ignored_fields = 0, (*c.data.ignored_fields, "image", "images")
        return
    if training.compressor == plan.RESIZED:
        _resize(c, counts[0])
        return
    own, name = cfg.sweep.compressor_settings, training.compressor
    fields = own[name].to_dict() if name in own else {}
    compressors.choose(c.model.compressor, **({"name": name} | fields))
    if plan.is_elastic(cfg, name):
        c.model.compressor.train_tokens = tuple(sorted(counts, reverse=True))
        return
    model = model_of(c)
    sized = model.compressor.with_tokens(model.vit.grid, counts[0])
    if (given := sized.num_tokens(model.vit.grid)) != counts[0]:
        raise ConfigError(
            f"{name}: gives {given} visual tokens with these settings, not {counts[0]}."
        )
    with c.model.compressor.unlocked():
        c.model.compressor.update(dataclasses.asdict(sized))
        if sized.elastic:
            c.model.compressor.train_tokens = counts


def _resize(c: ConfigDict, visual_tokens: int) -> None:
    """An encoder of smaller images, with as many patches as the cell has visual tokens, and no compressor."""
    compressors.choose(c.model.compressor, "identity")
    vit = model_of(c).vit
    stride_for(vit.grid, visual_tokens)
    c.model.vit.position_grid = vit.position_grid or vit.grid
    c.model.vit.image_px = math.isqrt(visual_tokens) * vit.patch_px


def _presets(c: ConfigDict, where: Folders) -> dict[str, str]:
    """Resolves presets that are model directories; returns part -> its directory."""
    own = {}
    for part, table in (("vit", presets.VIT), ("lm", presets.LM)):
        name = c.model[part].preset
        if name and name not in table and to_path(where.path(name)).is_dir():
            c.model[part].preset = own[part] = where.path(name)
    return own


def _start(
    c: ConfigDict,
    cfg: ConfigDict,
    stage: Stage,
    training: Training,
    where: Folders,
    rerun: int,
    own: dict[str, str],
) -> None:
    """Where each part comes from: an earlier stage, else the block init, else `own`, the directory that is its preset."""
    model = model_of(c)
    sizes = (model.vit.width, model.lm.width)
    absent = {
        "compressor": not model.compressor.num_params(*sizes),
        "projector": model.compressor.place == "instead",
    }
    # The stages that the training goes through; text alone needs no alignment.
    earlier = {s.name: s for s in plan.stages(cfg) if s.per != "cell" or s.serves(training)}
    for part in plan.PARTS:
        source = stage.init.get(part, "") if stage.init.get(part) in earlier else ""
        if absent.get(part):
            c.init[part] = ""
        elif source:
            c.init[part] = str(where.stage(earlier[source], training, rerun))
        else:
            c.init[part] = where.path(c.init[part]) or own.get(part, "")
    # A tokenizer that is not named is the LM's own.
    given = "" if stage.init.get("lm") else c.init.lm
    c.data.tokenizer = where.path(c.data.tokenizer) or own.get("lm", "") or given


def work(c: ConfigDict) -> int:
    """The decoder's products in a stage: how long it takes, in a unit that all stages of a sweep share."""
    tokens = max(c.train.num_steps, 1) * c.data.batch_size * c.data.max_tokens
    return tokens * model_of(c).lm.non_embedding_params
