"""Checks that the inputs of a training run exist and fit, before anything slow is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from vlm_jax.data import feature_cache, fingerprint, sources, tokenizer
from vlm_jax.files import Path
from vlm_jax.hf.describe import check_agrees
from vlm_jax.hf.directory import is_model
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig
from vlm_jax.settings.run import DataConfig, Experiment
from vlm_jax.storage import run
from vlm_jax.storage.inherit import check_part

# Fields that may change when a run resumes: at most they change the order of a sum in the loss.
MUTABLE = (
    "mesh.", "train.log_every", "train.save_every", "train.keep", "train.micro_batches", "train.loss_chunk",
    "train.on_nonfinite", "train.max_skipped", "train.peer_timeout", "train.random_frozen", "train.save_frozen", "data.num_workers", "model.vit.remat",
    "model.vit.sharded", "model.lm.remat", "model.lm.attention", "train.validat", "train.keep_best",
)  # fmt: skip

# Paths of the data may change as well, if `data.fingerprint` can verify that the content is the same.
MOVABLE = ("data.annotations", "data.image_roots")


def check_inputs(experiment: Experiment) -> None:
    """Raises ConfigError for the first file or directory that the run needs and that does not exist."""
    data = experiment.data
    check_sources(data)
    for path in experiment.train.validation:
        sources.check_exists("train: validation", path, "give the path of held-out records")
    sources.check_image_roots("train: validation", experiment.train.validation_roots)
    if not data.tokenizer:
        raise ConfigError(
            "data: tokenizer is not set; give --config.data.tokenizer=DIR with a Hugging Face tokenizer."
        )
    tokenizer.check_directory(data.tokenizer)
    if data.features_dir:
        feature_cache.check_cacheable(experiment.model)
        feature_cache.check(data.features_dir, experiment.model, data)
    for part, source in experiment.init.sources.items():
        if source:
            check_source(part, source, experiment.model)
            if not is_model(source):
                check_part(part, source, run.read(source), experiment)


def check_sources(data: DataConfig) -> None:
    """Raises ConfigError for the first annotation file or image folder that does not exist."""
    if not data.annotations:
        raise ConfigError(
            "data: annotations is empty; give at least one .json, .jsonl or tfds directory."
        )
    for path in data.annotations:
        sources.check_exists(
            "data: annotations", path, "give the path of a .json or .jsonl file or a tfds directory"
        )
    if data.max_images and not data.features_dir:
        sources.check_image_roots("data", data.image_roots)


def check_source(part: str, source: str, model: VLMConfig) -> None:
    """Raises ConfigError when `source`, a run or a model directory, cannot provide `part` of the model."""
    if is_model(source):
        check_agrees(source, part, model)
        return
    run.check_has_checkpoint(part, source)
    if part == "lm":
        run.has_adapters(source, model.lm)


def check_same(experiment: Experiment, workdir: Path) -> None:
    """Raises ConfigError when `workdir` belongs to a run with other settings, naming the first field that differs."""
    if run.last_step(workdir) is None or not (workdir / "config.json").is_file():
        return  # no checkpoint yet
    if run.last_step(workdir) == 0:
        raise ConfigError(
            f"--workdir: {str(workdir)!r} holds an imported model, not a run; set init.* to it and give another workdir."
        )
    before, now = dict(_fields(run.read(workdir))), dict(_fields(experiment))
    free = (*MUTABLE, *(MOVABLE if fingerprint.is_known(workdir) else ()))
    for name in now:
        if name == "data.tokenizer" and run.whole(before[name]) == run.whole(now[name]):
            continue
        if before[name] != now[name] and not name.startswith(free):
            raise ConfigError(
                f"--workdir: {str(workdir)!r} holds a run with {name} = {before[name]!r}, now {now[name]!r}; "
                "give the old value to resume it, or another workdir."
            )


def _fields(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("model.lm.width", 64), ... of nested dataclasses."""
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _fields(value, name + ".")
        else:
            yield name, value
