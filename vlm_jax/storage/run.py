"""A run and its workdir: the settings of a config file, and config.json, final.json and the steps of the checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import compressors, files
from vlm_jax.files import Path, to_path
from vlm_jax.hf import named
from vlm_jax.settings import addresses
from vlm_jax.settings.checks import ConfigError, build
from vlm_jax.settings.hub import hub_hint
from vlm_jax.settings.model import LM_LINEARS, LMConfig, RopeScaling, ViTConfig, VLMConfig
from vlm_jax.settings.run import (
    DataConfig,
    Experiment,
    InitConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    check_texts,
)
from vlm_jax.storage.inherit import changed, inherit


def resolve(cfg: ConfigDict, given: Sequence[str] = ()) -> Experiment:
    """The frozen settings of an experiment config, with presets filled in, and with init.from the model of that run.

    given: the fields that the command line sets. These fields, and those of the config that differ from configs/default.py,
    must agree with the run of init.from, and those of model.compressor must be settings of the compressor; where the command
    line names the compressor, what the config sets for its own is left out. Raises ConfigError for a wrong value.
    """
    config = cfg.to_dict()
    addresses.check_settings(config)
    set_by_user = {*given, *changed(config)}
    source = config["init"].pop("from")
    config["init"]["run"] = source
    if source:
        check_has_checkpoint("from", source)
        config = inherit(config, source, read(source), set_by_user)
    check_texts("data", config["data"], ("annotations", "image_roots", "ignored_fields"))
    check_texts("train", config["train"], ("validation", "validation_roots"))
    return Experiment(
        model=named.vlm(
            config["model"], given if "model.compressor.name" in given else set_by_user
        ),
        data=build(DataConfig, config["data"]),
        optim=build(OptimConfig, config["optim"]),
        mesh=build(MeshConfig, config["mesh"]),
        init=build(InitConfig, config["init"]),
        train=build(TrainConfig, config["train"]),
    )


def check_has_checkpoint(part: str, source: str) -> None:
    """Raises ConfigError when `source`, given as init.<part>, is no run with a checkpoint."""
    if last_step(source) is None:
        raise ConfigError(
            f"init: {part} {source!r} has no finished checkpoint and is no model directory; give the workdir of a "
            "training run or a directory with a Hugging Face config.json and *.safetensors."
            f"{hub_hint(source)}"
        )


def has_adapters(workdir: str, lm: LMConfig) -> bool:
    """True if a run's decoder has the adapters of `lm`, False if it has none. Raises ConfigError if it has others."""
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


def open_workdir(workdir: str, checkpoints: bool = True) -> Path:
    """The absolute path of `workdir`, made if it is missing. Raises ConfigError when nothing can be written there.

    checkpoints: whether it will hold some.
    """
    addresses.check_usable("--workdir", workdir)
    path = to_path(workdir).absolute()
    if checkpoints:
        checkpoint_folder(workdir)
    try:
        files.check_writable(path)
    except OSError as error:
        raise ConfigError(
            f"--workdir: cannot write to {workdir!r} ({error.strerror}); choose another directory."
        ) from error
    return path


def checkpoint_folder(workdir: str | Path) -> Path:
    """Where a run's checkpoints lie. Raises ConfigError for s3://, which orbax neither writes nor reads."""
    if addresses.scheme(str(workdir)) == "s3":
        raise ConfigError(
            f"{str(workdir)!r} cannot hold checkpoints: they lie on a disk or on gs://bucket/..; give a directory there, "
            "and copy a run that is on s3:// to one. Data, models, predictions and tables may lie on s3://."
        )
    return to_path(workdir).absolute() / "checkpoints"


def last_step(workdir: str | Path) -> int | None:
    """The step of the newest finished checkpoint of a training workdir; None without one."""
    folder = checkpoint_folder(workdir)
    found = folder.iterdir() if folder.is_dir() else ()
    steps = sorted((int(entry.name) for entry in found if entry.name.isdigit()), reverse=True)
    if isinstance(
        folder, files.BucketPath
    ):  # nothing is renamed there: orbax writes this when all else is written
        return next((n for n in steps if (folder / str(n) / "commit_success.txt").exists()), None)
    return steps[0] if steps else None


def write(experiment: Experiment, workdir: Path) -> None:
    """Saves the settings as `config.json`, with the tokenizer's place for whoever reads them from another folder."""
    settings = dataclasses.asdict(experiment)
    settings["data"]["tokenizer"] = whole(experiment.data.tokenizer)
    _write_json(settings, workdir / "config.json")


def whole(path: str) -> str:
    """A path as seen from any folder; "" stays that."""
    return str(to_path(path).absolute()) if path else ""


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
    files.write_whole(path, json.dumps(content, indent=2) + "\n")


def read(workdir: str | Path) -> Experiment:
    """The settings of a run, from its `config.json`. Raises ConfigError when there is none or it is damaged."""
    addresses.check_usable("workdir of a run", str(workdir))
    path = to_path(workdir) / "config.json"
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
    """The settings from the content of a config.json, as `write` saved it."""
    model = dict(saved["model"])
    lm = dict(model["lm"], rope_scaling=build(RopeScaling, model["lm"]["rope_scaling"]))
    parts = {
        "vit": build(ViTConfig, model["vit"]),
        "compressor": compressors.chosen(model["compressor"]),
        "lm": build(LMConfig, lm),
    }
    return Experiment(
        model=build(VLMConfig, model | parts),
        data=build(DataConfig, saved["data"]),
        optim=build(OptimConfig, saved["optim"]),
        # Earlier versions could also split the positions of a row; a mesh is not part of what a run is.
        mesh=build(MeshConfig, {k: v for k, v in saved["mesh"].items() if k != "sequence"}),
        init=build(InitConfig, saved["init"]),
        train=build(TrainConfig, saved["train"]),
    )
