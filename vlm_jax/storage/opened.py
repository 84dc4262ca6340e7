"""A model to use, wherever it lies: a training run, a directory of the Hugging Face hub, or its parts from several places.

A directory is a LLaVA model, a release in the original LLaVA layout (LLaVA, QueCC, TokenPacker, MQT), or one that holds a
part alone. Nothing is written and nothing is downloaded; parameters are read when `load` is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import compressors
from vlm_jax.data import tokenizer
from vlm_jax.files import Path, to_path
from vlm_jax.hf import directory, named
from vlm_jax.hf.describe import Described, describe
from vlm_jax.hf.settings import feature_layer, preprocessing
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.hub import hub_hint
from vlm_jax.settings.model import VLMConfig
from vlm_jax.settings.run import DataConfig
from vlm_jax.storage import run as experiment

Tree = dict[str, Any]
# The prompt format that a tokenizer with these tokens was trained on.
FORMATS = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3", "<|assistant|>": "phi3"}


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model's settings and how a prompt for it is made. load(shapes of parts as `weights.abstract` gives them) reads them."""

    where: str  # for messages
    model: VLMConfig
    data: DataConfig
    load: Callable[[Tree], Tree]


def from_run(workdir: str) -> Opened:
    """A training run, at its newest checkpoint. Raises ConfigError when it has none."""
    exp = experiment.read(workdir)

    def load(wanted: Tree) -> Tree:
        from vlm_jax.storage import weights  # jax and orbax take seconds

        return weights.load(workdir, exp.model, wanted)

    return Opened(workdir, exp.model, _asking(exp.data), load)


def _asking(data: DataConfig) -> DataConfig:
    """The settings with which prompts are made: each has a row of its own, even if training packed several samples in one."""
    return dataclasses.replace(data, packing=False)


def from_directory(
    where: str, vit: str = "", template: str = "", param_dtype: str = "float32"
) -> Opened:
    """A model directory. vit: the directory of its encoder, where it only names one. template: "" = by the tokenizer.

    Raises ConfigError when it does not hold a whole model, naming what is missing.
    """
    found = describe(to_path(where))
    sources = directory_sources(to_path(where), found, vit)
    missing = [part for part in ("lm", "projector", "vit") if part not in sources]
    if missing and not (missing == ["projector"] and _needs_no_projector(found)):
        raise ConfigError(
            f"{where!r} holds no {' and no '.join(missing)}, so it is no whole model; give the parts: "
            "load(lm=DIR, vit=DIR, compressor=RUN)."
        )
    return _opened(where, sources, directory_config(to_path(where), found, sources, vit, template, param_dtype))  # fmt: skip


def from_parts(
    lm: str, vit: str, compressor: str, template: str = "", param_dtype: str = "float32"
) -> Opened:
    """Parts from several places, each a run or a model directory.

    compressor: where compressor and projector come from. Where it is a run, prompts are made as that run made them, and lm
    and vit, "" = that run's, must have its shapes; else lm and vit are needed. Raises ConfigError when the parts do not fit.
    """
    if not directory.is_model(compressor):
        run = experiment.read(compressor)
        experiment.check_has_checkpoint("compressor", compressor)
        parts = {"lm": lm or compressor, "vit": vit or compressor}
        sources = parts | {"projector": compressor, "compressor": compressor}
        if directory.is_model(lm) and run.model.lm.lora_rank:
            raise ConfigError(
                f"{compressor!r} was trained with adapters in its decoder, which {lm!r} does not hold; leave lm out."
            )
        return _loading(compressor, run.model, run.data, sources)
    found = describe(to_path(compressor))
    if not lm or not vit:
        raise ConfigError(
            "load: give lm and vit too, or a training run as compressor, which holds them."
        )
    told = describe(to_path(lm))
    whole = found._replace(lm=told.lm)
    sources = directory_sources(to_path(compressor), whole, vit) | {"lm": lm, "vit": vit}
    config = directory_config(to_path(lm), whole, sources, vit, template, param_dtype)
    return _opened(compressor, sources, config)


def _needs_no_projector(found: Described) -> bool:
    return found.compressor is not None and found.compressor.place == "instead"


def _opened(where: str, sources: Mapping[str, str], config: ConfigDict) -> Opened:
    exp = experiment.resolve(config)
    if not exp.data.tokenizer:
        raise ConfigError(f"{where!r} holds no tokenizer; copy the tokenizer's files into it.")
    return _loading(where, exp.model, exp.data, sources)


def _loading(where: str, model: VLMConfig, data: DataConfig, sources: Mapping[str, str]) -> Opened:
    def load(wanted: Tree) -> Tree:
        from vlm_jax.storage import weights  # jax and orbax take seconds

        return weights.load_by_part({p: s for p, s in sources.items() if p in wanted}, model, wanted)  # fmt: skip

    return Opened(where, model, _asking(data), load)


def directory_sources(given: Path, found: Described, vit: str = "") -> dict[str, str]:
    """Part -> the directory that it comes from, for the parts that a model directory describes."""
    sources = {}
    if found.lm:
        sources["lm"] = str(given)
    if found.projector_layers:
        sources["projector"] = str(given)
    if found.compressor and found.compressor.name != "identity":
        sources["compressor"] = str(given)
    if found.vit:
        sources["vit"] = str(given)
    elif found.encoder:
        inside = directory.sort(directory.open_directory(given).tensors)[directory.VIT]
        sources["vit"] = str(given) if inside and not vit else vit or found.encoder
        if not directory.is_model(sources["vit"]):
            raise ConfigError(
                f"{str(given)!r} names its encoder {found.encoder!r} but does not hold it; give its directory as vit "
                f"(scripts/convert_hf.py: --vit=DIR).{hub_hint(sources['vit'])}"
            )
    return sources


def directory_config(
    given: Path,
    found: Described,
    sources: Mapping[str, str],
    vit: str = "",
    template: str = "",
    param_dtype: str = "float32",
) -> ConfigDict:
    """configs/default.py with the model, the tokenizer and the images of a model directory."""
    c = cli.load_config("default")
    presets_of = {**sources, **({"vit": vit} if vit else {})}
    for part in ("vit", "lm"):
        if part in sources:
            c.model[part].preset = presets_of[part]
        c.model[part].param_dtype = param_dtype
        c.model[part].dtype = "float32" if param_dtype == "float32" else "bfloat16"
    if found.encoder:
        layers = named.vit(presets_of["vit"]).num_layers
        c.model.vit.feature_layer = feature_layer(found.select_layer, layers)
    compressor = found.compressor or compressors.settings("identity")
    compressor = dataclasses.replace(compressor, dtype=c.model.vit.dtype)
    c.model.compressor = ConfigDict(dataclasses.asdict(compressor))
    c.model.projector_layers = found.projector_layers or c.model.projector_layers
    if "vit" in sources:
        encoder = named.vit(presets_of["vit"])
        family = "clip_vision_model" if encoder.cls_token else "siglip_vision_model"
        pixels = preprocessing(to_path(presets_of["vit"]), encoder.image_px, family)
        c.data.image_mode = "pad" if found.padded else pixels["image_mode"]
    if tokenizer.is_there(str(given)):
        c.data.tokenizer = str(given)
        known = tokenizer.load(str(given))
        marked = [name for token, name in FORMATS.items() if known.token_id(token) is not None]
        c.data.template = template or (marked or ["vicuna_v1"])[0]
    return c
