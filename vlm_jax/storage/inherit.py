"""The settings that a run takes from the run it starts from (init.from): model, tokenizer, template and query.

A setting that the user gives and that contradicts the other run's is an error that names both values.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from vlm_jax.files import to_path
from vlm_jax.hf import named
from vlm_jax.hf.describe import FREE
from vlm_jax.settings.checks import ConfigError, build
from vlm_jax.settings.model import RopeScaling, VLMConfig
from vlm_jax.settings.run import Experiment

# Fields of the model that change neither its parameters nor their meaning: how it is computed and stored, how many visual
# tokens are used. They may differ from the other run's.
HOW = {
    "vit": ("dtype", "param_dtype", "remat", "sharded"),
    "compressor": ("dtype", "visual_tokens", "train_tokens"),
    "lm": ("dtype", "param_dtype", "remat", "attention", "nominal_params", "lora_rank", "lora_alpha", "lora_targets"),
}  # fmt: skip
PROJECTOR = ("projector_layers", "projector_norm", "projector_positions", "projector_scale")
DATA = ("tokenizer", "template", "system", "query", "max_query_tokens")
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def inherit(
    config: Mapping[str, Any], source: str, run: Experiment, given: Collection[str]
) -> dict[str, Any]:
    """The config (nested dicts, presets not filled in) with the model, tokenizer, template and query of a run.

    given: the fields that the user set, such as "model.lm.width"; the other ones take the run's values. Those in HOW
    may be set to anything. Raises ConfigError when another one differs from the run's.
    """
    return dict(
        config,
        model=_model(config["model"], source, run, given),
        data=_data(config["data"], source, run, given),
    )


def changed(config: Mapping[str, Any]) -> set[str]:
    """The fields of a config that differ from configs/default.py, which every config file imports."""
    for name, module in sys.modules.items():
        if name == "configs.default" or name.endswith(".configs.default"):
            usual = dict(_flat(module.get_config().to_dict()))
            return {
                field
                for field, value in _flat(config)
                if field not in usual or value != usual[field]
            }
    return {field for field, _ in _flat(config)}


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def _model(
    now: Mapping[str, Any], source: str, run: Experiment, given: Collection[str]
) -> dict[str, Any]:
    model: dict[str, Any] = dataclasses.asdict(run.model)
    for block, fields in HOW.items():
        theirs = getattr(run.model, block)
        preset = now[block].get("preset", "") if f"model.{block}.preset" in given else ""
        implied = named.fields(block, preset) if preset else {}
        for name, value in implied.items():
            free = (*fields, *FREE.get(block, ()), "vocab_size")
            if name not in free and f"model.{block}.{name}" not in given:
                origin = f"but model.{block}.preset {preset!r} has"
                _check(source, f"model.{block}.{name}", getattr(theirs, name), value, origin)
        for name, value in _set_by_user(now[block], block, given).items():
            if name in fields or name not in model[block]:  # another compressor's: see named.vlm
                model[block][name] = value
            else:
                _check(source, f"model.{block}.{name}", getattr(theirs, name), value)
        if block != "compressor":
            model[block]["preset"] = ""  # every field is set
    for name in PROJECTOR:
        if f"model.{name}" in given:
            _check(source, f"model.{name}", getattr(run.model, name), now[name])
    return model


def _set_by_user(now: Mapping[str, Any], block: str, given: Collection[str]) -> dict[str, Any]:
    found = {
        name: value
        for name, value in now.items()
        if name not in ("preset", "rope_scaling")
        and value is not None
        and f"model.{block}.{name}" in given
    }
    scaling = {name: value for name, value in (now.get("rope_scaling") or {}).items()}
    if any(f"model.{block}.rope_scaling.{name}" in given for name in scaling):
        found["rope_scaling"] = build(
            RopeScaling, {name: value for name, value in scaling.items() if value is not None}
        )
    return found


def _data(
    now: Mapping[str, Any], source: str, run: Experiment, given: Collection[str]
) -> dict[str, Any]:
    data = dict(now)
    for name in DATA:
        theirs = getattr(run.data, name)
        if f"data.{name}" not in given or now[name] in (None, ""):
            data[name] = theirs
        elif name != "tokenizer":
            _check(source, f"data.{name}", theirs, now[name])
        elif not same_tokenizer(theirs, now[name]):
            _check(source, "data.tokenizer", theirs, now[name])
    return data


def _check(source: str, field: str, theirs: Any, ours: Any, origin: str = "now") -> None:
    ours = tuple(ours) if isinstance(ours, list) else ours
    if theirs != ours:
        raise ConfigError(
            f"init.from: {source!r} was trained with {field} = {theirs!r}, {origin} {ours!r}; leave it out to take the "
            "run's, or take the parts one by one with init.vit, init.compressor, init.projector, init.lm."
        )


def same_tokenizer(first: str, second: str) -> bool:
    """Whether two directories hold the same vocabulary. True if one of them no longer exists and cannot be compared."""
    folders = to_path(first), to_path(second)
    if first == second or not all(folder.is_dir() for folder in folders):
        return True
    contents = [
        {name: (folder / name).read_bytes() for name in VOCABULARY if (folder / name).is_file()}
        for folder in folders
    ]
    shared = contents[0].keys() & contents[1].keys()
    return bool(shared) and all(contents[0][name] == contents[1][name] for name in shared)


def check_part(part: str, source: str, run: Experiment, now: Experiment) -> None:
    """Raises ConfigError when a field that determines the meaning of a part's parameters differs between `run` and `now`."""
    pairs = []
    if part == "projector":
        pairs = [(f"model.{f}", getattr(run.model, f), getattr(now.model, f)) for f in PROJECTOR]
    else:
        # Position tables are interpolated to another size.
        free = (*HOW[part], "image_px", "position_grid")
        pairs = _differing(part, free, run.model, now.model)
    if part == "lm" and not same_tokenizer(run.data.tokenizer, now.data.tokenizer):
        pairs.append(("data.tokenizer", run.data.tokenizer, now.data.tokenizer))
    for field, theirs, ours in pairs:
        if theirs != ours:
            raise ConfigError(
                f"init.{part}: {source!r} was trained with {field} = {theirs!r}, now {ours!r}; give the run's value, or "
                f"--config.init.from={source} alone, which takes model, tokenizer and template from the run."
            )


def _differing(
    part: str, free: Collection[str], theirs: VLMConfig, ours: VLMConfig
) -> list[tuple[str, Any, Any]]:
    old, new = getattr(theirs, part), getattr(ours, part)
    shared = {field.name for field in dataclasses.fields(new)}  # compressors have their own ones
    names = [f.name for f in dataclasses.fields(old) if f.name in shared and f.name not in free]
    return [(f"model.{part}.{name}", getattr(old, name), getattr(new, name)) for name in names]
