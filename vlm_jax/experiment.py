"""From the config file to what each module is given, checked against the disk, before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import files, presets
from vlm_jax.config import (
    LM_LINEARS,
    SCORED,
    CompressorConfig,
    ConfigError,
    LMConfig,
    RopeScaling,
    ViTConfig,
    VLMConfig,
    build,
)
from vlm_jax.data import feature_cache, fingerprint, tokenizer
from vlm_jax.hf.describe import check_agrees
from vlm_jax.hf.directory import is_model
from vlm_jax.hub import hub_hint
from vlm_jax.inherit import changed, check_part, inherit
from vlm_jax.run_config import (
    DataConfig,
    Experiment,
    InitConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
)

# Fields that a run may change between two starts: none of them changes a loss by more than the order of a sum.
MUTABLE = (
    "mesh.", "train.log_every", "train.save_every", "train.keep", "train.micro_batches", "train.loss_chunk",
    "train.on_nonfinite", "train.max_skipped", "train.peer_timeout", "train.random_frozen", "data.num_workers", "model.vit.remat",
    "model.vit.sharded", "model.lm.remat", "model.lm.attention",
)  # fmt: skip

# Where the data lie may change, too, if `data.fingerprint` can tell that they are the same.
MOVABLE = ("data.annotations", "data.image_roots")


def resolve(cfg: ConfigDict, given: Sequence[str] = ()) -> Experiment:
    """The frozen settings of an experiment config; presets are filled in, and with init.from the run's model.

    given: the fields that the command line sets. With init.from they, and those that differ from configs/default.py, must
    agree with the run's. Raises ConfigError for a wrong value.
    """
    config = cfg.to_dict()
    files.check_settings(config)
    source = config["init"].pop("from")
    config["init"]["run"] = source
    if source:
        _must_have_checkpoint("from", source)
        config = inherit(config, source, read(source), {*given, *changed(config)})
    return Experiment(
        model=presets.vlm(config["model"]),
        data=build(DataConfig, config["data"]),
        optim=build(OptimConfig, config["optim"]),
        mesh=build(MeshConfig, config["mesh"]),
        init=build(InitConfig, config["init"]),
        train=build(TrainConfig, config["train"]),
    )


def check_inputs(experiment: Experiment) -> None:
    """Raises ConfigError for the first file or directory that the run needs and that is not there."""
    data = experiment.data
    check_sources(data)
    if not data.tokenizer:
        raise ConfigError(
            "data: tokenizer is not set; give --config.data.tokenizer=DIR with a Hugging Face tokenizer."
        )
    tokenizer.check_directory(data.tokenizer)
    if data.features_dir:
        check_cacheable(experiment.model)
        feature_cache.check(data.features_dir, experiment.model, data)
    for part, source in experiment.init.sources.items():
        if source:
            check_source(part, source, experiment.model)
            if not is_model(source):
                check_part(part, source, read(source), experiment)


def check_sources(data: DataConfig) -> None:
    """Raises ConfigError for the first annotation file or image folder that is not there."""
    if not data.annotations:
        raise ConfigError(
            "data: annotations is empty; give at least one .json, .jsonl or tfds directory."
        )
    for path in data.annotations:
        _must_exist(
            "data: annotations", path, "give the path of a .json or .jsonl file or a tfds directory"
        )
    if data.max_images and not data.features_dir:
        check_image_roots("data", data.image_roots)


def check_source(part: str, source: str, model: VLMConfig) -> None:
    """Raises ConfigError when `source`, a run or a model directory, cannot supply the part of the model."""
    if is_model(source):
        check_agrees(source, part, model)
        return
    _must_have_checkpoint(part, source)
    if part == "lm":
        has_adapters(source, model.lm)


def check_image_roots(owner: str, roots: Sequence[str]) -> None:
    """Raises ConfigError for the first folder that does not exist; "" names none."""
    for path in filter(None, roots):
        fix = "give the folder that the records' image paths start from"
        _must_exist(f"{owner}: image_roots", path, fix, folder=True)


def _must_have_checkpoint(part: str, source: str) -> None:
    if last_step(source) is None:
        raise ConfigError(
            f"init: {part} {source!r} has no finished checkpoint and is no model directory; give the workdir of a "
            "training run or a directory with a Hugging Face config.json and *.safetensors."
            f"{hub_hint(source)}"
        )


def has_adapters(workdir: str, lm: LMConfig) -> bool:
    """Whether a run's decoder has the adapters of `lm`; False: it has none. Raises ConfigError when it has others."""
    theirs = read(workdir).model.lm
    if not theirs.lora_rank:
        return False
    if any(theirs.adapter(path) != lm.adapter(path) for path in LM_LINEARS):
        raise ConfigError(
            f"init: lm {workdir!r} has adapters (lora_rank {theirs.lora_rank}, lora_alpha {theirs.lora_alpha}, lora_targets "
            f"{theirs.lora_targets!r}), this model other ones or none; set model.lm.lora_* to them, or merge them: "
            f"scripts/convert_hf.py {workdir} DIR --what=lm, then init.lm=DIR."
        )
    return True


def check_cacheable(model: VLMConfig) -> None:
    """Raises ConfigError when the compressor needs more of the encoder than a feature cache holds."""
    if model.compressor.name in SCORED:
        raise ConfigError(
            f"features_dir: a cache has no queries and keys, which {model.compressor.name} looks at; use '' to encode the images."
        )


def _must_exist(owner: str, path: str, fix: str, folder: bool = False) -> None:
    if not (Path(path).is_dir() if folder else Path(path).exists()):
        raise ConfigError(f"{owner} {path!r} does not exist; {fix}.")


def open_workdir(workdir: str) -> Path:
    """The absolute path of `workdir`, made if it is missing. Raises ConfigError when nothing can be written there."""
    files.check_local("--workdir", workdir)
    path = Path(workdir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            f"--workdir: cannot write to {workdir!r} ({error.strerror}); choose another directory."
        ) from error
    return path


def last_step(workdir: str | Path) -> int | None:
    """The step of the newest finished checkpoint of a training workdir; None without one."""
    folder = Path(workdir) / "checkpoints"
    steps = (
        [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()]
        if folder.is_dir()
        else []
    )
    return max(steps, default=None)


def write(experiment: Experiment, workdir: Path) -> None:
    """Saves the settings as `config.json`."""
    _write_json(dataclasses.asdict(experiment), workdir / "config.json")


def finish(workdir: Path, metrics: Mapping[str, float]) -> None:
    """Marks a run as finished: `final.json` holds the metrics of its last step."""
    _write_json(metrics, workdir / "final.json")


def finished(workdir: Path) -> dict[str, float] | None:
    """The final metrics of a finished run whose last checkpoint is still there; None otherwise.

    Raises ConfigError when `final.json` is damaged.
    """
    path = workdir / "final.json"
    if not path.is_file():
        return None
    metrics = files.read_json(path)
    if not {"step", "loss"} <= metrics.keys():
        raise ConfigError(
            f"{path}: lacks the step and the loss of a finished run; delete it, and the same command writes it again."
        )
    return metrics if metrics["step"] == last_step(workdir) else None


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read(workdir: str | Path) -> Experiment:
    """The settings of a run, from its `config.json`. Raises ConfigError when there is none or it is damaged."""
    files.check_local("workdir of a run", str(workdir))
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} does not exist; give the workdir of a training run.")
    saved = files.read_json(path)
    if "model_type" in saved:
        raise ConfigError(
            f"{str(workdir)!r} is a Hugging Face directory, not a run; convert it first: scripts/convert_hf.py {workdir} OUT."
        )
    try:
        return _restored(saved)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"{path}: is no config of a run ({reason}); take it from a copy of the run, or train again."
        ) from error


def _restored(saved: Mapping[str, Any]) -> Experiment:
    """What `write` saved."""
    model = dict(saved["model"])
    lm = dict(model["lm"], rope_scaling=build(RopeScaling, model["lm"]["rope_scaling"]))
    parts = {
        "vit": build(ViTConfig, model["vit"]),
        "compressor": build(CompressorConfig, model["compressor"]),
        "lm": build(LMConfig, lm),
    }
    return Experiment(
        model=build(VLMConfig, model | parts),
        data=build(DataConfig, saved["data"]),
        optim=build(OptimConfig, saved["optim"]),
        mesh=build(MeshConfig, saved["mesh"]),
        init=build(InitConfig, saved["init"]),
        train=build(TrainConfig, saved["train"]),
    )


def check_same(experiment: Experiment, workdir: Path) -> None:
    """Raises ConfigError when `workdir` belongs to a run with other settings, naming the first field that differs."""
    if last_step(workdir) is None or not (workdir / "config.json").is_file():
        return  # nothing was learnt there yet
    if last_step(workdir) == 0:
        raise ConfigError(
            f"--workdir: {str(workdir)!r} holds an imported model, not a run; set init.* to it and give another workdir."
        )
    before, now = dict(_fields(read(workdir))), dict(_fields(experiment))
    free = (*MUTABLE, *(MOVABLE if fingerprint.is_known(workdir) else ()))
    for name in now:
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
