"""All mistakes of a sweep's config and inputs, found before the first training and told at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import benchmarks
from vlm_jax.data import sources, tokenizer
from vlm_jax.files import Path, to_path
from vlm_jax.hf.directory import is_model
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import Experiment
from vlm_jax.storage import run as experiment
from vlm_jax.storage.inherit import same_tokenizer
from vlm_jax.sweeps import plan, stages
from vlm_jax.sweeps.plan import Folders, Training
from vlm_jax.training import inputs

RECORDS = "give the path of a .json or .jsonl file or a tfds directory"
MOST = 20  # mistakes told; more are counted


def check(cfg: ConfigDict, root: Path, with_inputs: bool = True) -> list[Training]:
    """The trainings of a sweep in `root`. with_inputs: whether data, weights and benchmarks must be there already.

    Raises ConfigError with every mistake in one line, each once.
    """
    experiment.checkpoint_folder(root)
    found: dict[str, list[str]] = {}  # mistake -> what has it

    def attempt(call: Callable[..., Any], *arguments: Any, who: str = "") -> Any:
        try:
            return call(*arguments)
        except ConfigError as error:
            found.setdefault(str(error).removeprefix("sweep: "), []).append(who)

    given = cfg.sweep.inputs
    no_inputs = with_inputs and not cfg.sweep.prepare and not to_path(given).is_dir()
    with_inputs = with_inputs and not no_inputs  # else a mistake for each file
    todo = attempt(plan.trainings, cfg) or []
    attempt(plan.stages, cfg)
    asked = attempt(plan.asked, cfg) or []
    compared: set[Path] = set()  # trainings share stages
    if not found:
        for training in todo:
            where = plan.folders(cfg, root, training.seed)
            for stage in attempt(plan.all_stages, cfg, training) or ():
                who = training.lm if stage.per == "lm" else training.name
                who = stage.name if stage.per == "seed" else f"{who}, stage {stage.name}"
                exp = attempt(_resolved, cfg, stage, training, where, who=who)
                folder = where.stage(stage, training)
                if exp and folder not in compared:  # it may hold a training with other settings
                    compared.add(folder)
                    attempt(inputs.check_same, exp, folder)
                for call in _inputs(exp, where) if exp and with_inputs else ():
                    attempt(call)
    if with_inputs and not cfg.sweep.prepare:
        for one in asked:
            attempt(_check_benchmark, one, plan.folders(cfg, root, cfg.sweep.seeds[0]))
    told = [mistake + _of(who) for mistake, who in found.items()]
    if no_inputs:
        told.insert(0, (
            f"inputs: the folder {given!r} does not exist; give the one that holds models, records and benchmarks: "
            "--config.sweep.inputs=FOLDER."
        ))  # fmt: skip
    _tell(told)
    return todo


def _resolved(cfg: ConfigDict, stage: plan.Stage, training: Training, where: Folders) -> Experiment:
    return experiment.resolve(stages.config_of(cfg, stage, training, where))


def _of(who: list[str]) -> str:
    """The end of a mistake: what has it."""
    names = list(dict.fromkeys(filter(None, who)))
    if not names:
        return ""
    return f" ({names[0]}{f', and {len(names) - 1} more' if len(names) > 1 else ''})"


def _inputs(exp: Experiment, where: Folders) -> Iterator[Callable[[], None]]:
    """A check for each input that must be there before the sweep begins; what it makes itself is left out."""
    data = exp.data

    def is_made(path: str) -> bool:
        return to_path(path).is_relative_to(where.root)

    for name, paths in (("annotations", data.annotations), ("train: validation", exp.train.validation)):  # fmt: skip
        for path in filter(lambda path: not is_made(path), paths):
            yield lambda name=name, path=path: sources.check_exists(name, path, RECORDS)
    if data.max_images and not data.features_dir:
        roots = [root for root in data.image_roots if not is_made(root)]
        yield lambda: sources.check_image_roots("data", roots)
    if not is_made(data.tokenizer):
        yield lambda: _check_tokenizer(exp)
    for part, source in exp.init.sources.items():
        if source and not is_made(source) and not is_model(source):
            yield lambda part=part, source=source: experiment.check_has_checkpoint(part, source)


def _check_tokenizer(exp: Experiment) -> None:
    """Raises ConfigError when the tokenizer is missing or another one than the decoder's."""
    data, lm = exp.data, exp.model.lm
    if not data.tokenizer:
        raise ConfigError(
            "data.tokenizer is not set; name a tokenizer's directory, or an LM by its model directory, which holds one."
        )
    tokenizer.check_directory(data.tokenizer)
    known = tokenizer.load(data.tokenizer).vocab_size
    if known > lm.vocab_size:
        raise ConfigError(
            f"the LM of {exp.init.lm or 'random weights'} has a vocabulary of {lm.vocab_size}, its tokenizer "
            f"{data.tokenizer!r} one of {known}; give the tokenizer that it was trained with."
        )
    own = exp.init.lm
    if own and tokenizer.is_there(own) and not same_tokenizer(own, data.tokenizer):
        raise ConfigError(
            f"the LM {own!r} has a tokenizer of its own with another vocabulary than {data.tokenizer!r}; set "
            f"data.tokenizer to it in lm_settings, or leave data.tokenizer empty."
        )


def _check_benchmark(one: plan.Asked, where: Folders) -> None:
    folder = where.path(one.annotations)
    sources.check_exists(
        f"{one.name}: annotations", folder, "give the folder of the benchmark's native files"
    )
    if one.image_root:
        sources.check_image_roots(one.name, [where.path(one.image_root)])
    rows = benchmarks.get(one.name).rows(folder)
    benchmarks.check_scorable(one.name, rows)


def _tell(mistakes: list[str]) -> None:
    if not mistakes:
        return
    if len(mistakes) == 1:
        raise ConfigError(f"sweep: {mistakes[0]}")
    told = [f"({i}) {mistake}" for i, mistake in enumerate(mistakes[:MOST], 1)]
    if len(mistakes) > MOST:
        told.append(f"and {len(mistakes) - MOST} more")
    raise ConfigError(f"sweep: {len(mistakes)} mistakes: {' '.join(told)}")
