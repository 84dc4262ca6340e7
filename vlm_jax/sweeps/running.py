"""Runs what is missing of a sweep: the parts that cells share, then each cell's stages and evaluations, reruns included."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlm_jax import files
from vlm_jax.files import Path, to_path
from vlm_jax.inference import evaluation
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.laws import outliers, table
from vlm_jax.settings.checks import ConfigError, RunEnded, build
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment
from vlm_jax.sweeps import answers, checks, conclusion, parts, plan, stages
from vlm_jax.sweeps.parts import Clock, Part
from vlm_jax.sweeps.plan import Folders, Stage, Training
from vlm_jax.train import train

log = logging.getLogger(__name__)

SHARED = "shared"  # the part that all cells start from
RETRY_SEED = 1000  # a failed training's k-th rerun draws its seeds from seed + k * RETRY_SEED


class Tried(NamedTuple):
    """What running a training gave: its tries, of which the last one counts; none where another machine holds it."""

    training: Training
    tries: list[outliers.Try]


def sweep(cfg: ConfigDict, workdir: str, made_by: str) -> Path:
    """Runs what is missing and writes the report; returns its path. `made_by` is the command to print in it.

    Raises ConfigError, before the first training, with all mistakes of the config and its inputs.
    """
    todo = checks.check(cfg, to_path(workdir).absolute())
    root = experiment.open_workdir(workdir)
    clock = Clock(root / "timing.json", sorted(root.glob("timing.*.json")))
    processes = parts.how_many(cfg.sweep.processes, len(todo))
    todo_parts = []
    for seed in cfg.sweep.seeds:
        own = [training for training in todo if training.seed == seed]
        where = plan.folders(cfg, root, seed)
        todo_parts += shared_parts(cfg, own, where)
        todo_parts += [training_part(cfg, training, where) for training in own]
    tries: dict[Training, list[outliers.Try]] = {}
    while todo_parts:
        for tried in run(todo_parts, processes, root, clock):
            if not tried.tries:
                continue
            tries[tried.training] = [*tries.get(tried.training, ()), *tried.tries]
            write_table(root / "errors.csv", todo, tries)
        if held := [str(training) for training in todo if training not in tries]:
            raise RunEnded(
                f"{', '.join(held)}: run by another process; when it has finished, the same command concludes.",
                exit_code=0,
            )
        tries = outliers.judged({training: tries[training] for training in todo})
        todo_parts = [
            training_part(cfg, training, plan.folders(cfg, root, training.seed), first=len(own))
            for training, own in tries.items()
            if own[-1].fault and len(own) <= cfg.sweep.max_reruns
        ]
    write_table(root / "errors.csv", todo, tries)
    return conclusion.conclude(cfg, root, made_by, outliers.stories(tries), clock)


def sweep_part(cfg: ConfigDict, workdir: str, part: str) -> None:
    """Runs the part of one of several machines: "shared", or the trainings "I/N". No table is written: only one process may.

    Raises ConfigError for another `part`, and for cells whose shared parts are not finished.
    """
    todo = plan.trainings(cfg)
    mine = share_of(todo, part)
    checks.check(cfg, to_path(workdir).absolute())
    root = experiment.open_workdir(workdir)
    clock = Clock(root / f"timing.{part.replace('/', '_of_')}.json")
    todo_parts = []
    for seed in cfg.sweep.seeds if part == SHARED else ():
        own = [training for training in todo if training.seed == seed]
        todo_parts += shared_parts(cfg, own, plan.folders(cfg, root, seed))
    for training in mine:
        where = plan.folders(cfg, root, training.seed)
        for folder in (where.stage(stage, training) for stage in plan.shared_stages(cfg)):
            if experiment.finished(folder) is None:
                raise ConfigError(_not_finished(folder))
        if cfg.sweep.cache and not where.features.is_dir():
            raise ConfigError(_not_finished(where.features))
        todo_parts.append(training_part(cfg, training, where))
    list(run(todo_parts, parts.how_many(cfg.sweep.processes, len(todo_parts)), root, clock))


def _not_finished(folder: Path) -> str:
    return (
        f"--part: {folder} is not finished; run --part={SHARED} to its end before any --part=I/N."
    )


def run(todo: Sequence[Part], processes: int, root: Path, clock: Clock) -> Iterator[Tried]:
    """Runs the parts with a line for each, and yields what the trainings of cells among them gave."""
    finished = parts.run(todo, processes, root / "compiled")
    with contextlib.closing(finished):
        for number, (part, value, seconds) in enumerate(finished, 1):
            clock.note(part.name, seconds)
            tried = value.tries if isinstance(value, Tried) else []
            errors = f": {tried[-1].errors}" if tried else ""
            log.info("%d/%d %s, %.0f s%s", number, len(todo), part.name, seconds, errors)
            if isinstance(value, Tried):
                yield value


def share_of(todo: Sequence[Training], part: str) -> list[Training]:
    """The trainings of `part` "I/N": every N-th from the I-th, which mixes sizes and token counts. None for "shared"."""
    if part == SHARED:
        return []
    first, _, step = part.partition("/")
    if not (first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise ConfigError(f"--part: {part!r} is neither {SHARED!r} nor I/N with 0 <= I < N.")
    return list(todo[int(first) :: int(step)])


# --- what the cells share ---------------------------------------------------------------------------------------------


def shared_parts(cfg: ConfigDict, todo: Sequence[Training], where: Folders) -> list[Part]:
    """What makes everything that the trainings of one seed start from. Finished parts return at once."""
    if not todo:
        return []
    seed, first = todo[0].seed, todo[0]
    found = []
    if cfg.sweep.prepare:
        found.append(Part(f"seed {seed}: data", prepare, (cfg, seed, where), where.log("data")))
    per_lm = {training.lm: training for training in reversed(todo)}
    for stage in plan.shared_stages(cfg):
        chosen = [first] if stage.per == "seed" else [per_lm[lm] for lm in dict.fromkeys(t.lm for t in todo)]  # fmt: skip
        for training in chosen:
            c = stages.config_of(cfg, stage, training, where)
            name, needs = _shared_name(stage, training), needed(cfg, stage, training)
            file = name.removeprefix(f"seed {seed}: ").replace(" ", "-")
            arguments = (c, str(where.stage(stage, training)))
            found.append(Part(name, train, arguments, where.log(file), needs, stages.work(c)))
    if cfg.sweep.cache:
        stage, name = _cached_stage(cfg, first), f"seed {seed}: features"
        needs, arguments = _encoded(cfg, stage, first), (cfg, stage, first, where)
        found.append(Part(name, cache_features, arguments, where.log("features"), needs))
    return found


def _shared_name(stage: Stage, training: Training) -> str:
    who = f" {plan.label(training.lm)}" if stage.per == "lm" else ""
    return f"seed {training.seed}: {stage.name}{who}"


def _encoded(cfg: ConfigDict, stage: Stage, training: Training) -> tuple[str, ...]:
    """The names of the parts that a stage's images and its encoder come from."""
    by_name = {s.name: s for s in plan.shared_stages(cfg)}
    found = [f"seed {training.seed}: data"] if cfg.sweep.prepare else []
    source = stage.init.get("vit", "")
    return (*found, *([_shared_name(by_name[source], training)] if source in by_name else []))


def needed(cfg: ConfigDict, stage: Stage, training: Training) -> tuple[str, ...]:
    """The names of the parts that must be finished before a stage."""
    cached = (f"seed {training.seed}: features",)
    found = cached if stage.cached else _encoded(cfg, stage, training)
    by_name = {s.name: s for s in plan.shared_stages(cfg)}
    others = [by_name[s] for part, s in stage.init.items() if s in by_name and part != "vit"]
    return tuple(dict.fromkeys([*found, *(_shared_name(other, training) for other in others)]))


def prepare(cfg: ConfigDict, seed: int, where: Folders) -> None:
    """Lets the prepare step fill the folder of the seed's data, once."""
    done, settings = where.data / "complete", cfg.sweep.prepare_settings.to_dict()
    if done.is_file():
        if files.read_json(done) != settings:
            raise ConfigError(
                f"sweep: {where.data} was made with {done.read_text()}, now {json.dumps(settings)}; use another workdir."
            )
        return
    module, _, name = cfg.sweep.prepare.rpartition(".")
    fill = getattr(importlib.import_module(module), name)
    if isinstance(where.data, files.BucketPath):
        with tempfile.TemporaryDirectory() as folder:
            fill(folder, seed, **settings)
            files.upload(folder, where.data)
    else:
        fill(where.data, seed, **settings)
    files.write_whole(done, json.dumps(settings))


def _cached_stage(cfg: ConfigDict, training: Training) -> Stage:
    """A stage that reads the cache: its encoder is the one that fills it."""
    found = [s for s in plan.stages(cfg) if s.cached]
    if not found:
        raise ConfigError(
            "sweep: cache is set, but no stage has cached = True; set it, or cache = ()."
        )
    return next((s for s in found if s.per != "cell" or s.serves(training)), found[0])


def cache_features(cfg: ConfigDict, stage: Stage, training: Training, where: Folders) -> None:
    """The frozen encoder's features of every image that sweep.cache names, written once."""
    if where.features.is_dir():
        return
    # Here, not above: jax takes seconds, mistakes are answered before.
    from vlm_jax.inference import features

    c = stages.config_of(cfg, stage, training, where)
    roots = cfg.sweep.cache_image_roots or (".",) * len(cfg.sweep.cache)
    c.data.annotations = tuple(where.path(path) for path in cfg.sweep.cache)
    c.data.image_roots = tuple(where.path(path) for path in roots)
    c.data.features_dir = ""
    features.cache(experiment.resolve(c), where.features)


# --- one training and its cells ---------------------------------------------------------------------------------------


def training_part(cfg: ConfigDict, training: Training, where: Folders, first: int = 0) -> Part:
    """A training and its evaluations as a part; first: the number of its first try."""
    name = f"{training}-rerun{first}" if first else str(training)
    own = plan.cell_stages(cfg, training)
    needs = tuple(dict.fromkeys(need for stage in own for need in needed(cfg, stage, training)))
    cost = sum(stages.work(stages.config_of(cfg, stage, training, where)) for stage in own)
    arguments = (cfg, training, where, first)
    return Part(name, run_training, arguments, where.log(training.name), needs, cost)


def run_training(cfg: ConfigDict, training: Training, where: Folders, first: int = 0) -> Tried:
    """Trains and evaluates, again with other seeds while an error stays at chance, from the try `first` on."""
    tries: list[outliers.Try] = []
    for rerun in range(first, cfg.sweep.max_reruns + 1):
        more = rerun * RETRY_SEED
        folder = where.cell(training, rerun)
        out = {v: where.answers(training, v, rerun) for v in training.visual_tokens}
        try:
            last = _train(cfg, training, where, rerun)
            rows = [row for v in out for row in evaluate(last, training, v, folder, out[v], where)]
        except files.Locked as error:
            log.info("%s is left alone: %s", training, error)
            return Tried(training, [])
        failed = [row for row in rows if row.error >= cfg.sweep.failed_above]
        if not failed:
            tries.append(outliers.Try(training.seed + more, rows))
            break
        fault = f"{failed[0].benchmark} stays at chance (error {failed[0].error:.3f})"
        log.warning("%s: %s", folder, fault)
        flagged = [dataclasses.replace(row, flag=outliers.CHANCE) for row in rows]
        tries.append(outliers.Try(training.seed + more, flagged, fault))
    return Tried(training, tries)


def _train(cfg: ConfigDict, training: Training, where: Folders, rerun: int) -> ConfigDict:
    """Goes through the stages of a training; returns the config of the last one."""
    own = [
        (stages.config_of(cfg, stage, training, where, rerun, rerun * RETRY_SEED), stage)
        for stage in plan.cell_stages(cfg, training)
    ]
    for c, stage in own:
        train(c, str(where.stage(stage, training, rerun)))
    return own[-1][0]


def evaluate(
    cfg: ConfigDict, training: Training, visual_tokens: int, run: Path, out: Path, where: Folders
) -> list[table.Row]:
    """The rows of one cell. cfg: of the training's last stage, whose workdir is `run`; `out`: of the evaluation."""
    asked, several = plan.asked(cfg), len(training.visual_tokens) > 1
    block = cfg.eval.to_dict() | {
        "benchmarks": tuple(one.name for one in asked),
        "annotations": tuple(where.path(one.annotations) for one in asked),
        "image_roots": tuple(where.path(one.image_root) for one in asked),
        "checkpoint": str(run),
        "features_dir": cfg.data.features_dir if cfg.sweep.cached_eval else "",
        "visual_tokens": visual_tokens if several else 0,
    }
    settings = EvalConfig.from_block(block)
    with _held(experiment.open_workdir(str(out), checkpoints=False)):
        evaluation.evaluate(settings, build(MeshConfig, cfg.mesh.to_dict()), str(out))
    return answers.rows(cfg, training, run, out)


def _held(folder: Path) -> contextlib.AbstractContextManager[Any]:
    """Locks a workdir by the first process of a run, as a training does."""
    import jax  # here, not above: it takes seconds, mistakes are answered before

    return files.lock(folder) if jax.process_index() == 0 else contextlib.nullcontext()


def write_table(
    path: Path, todo: Sequence[Training], tries: Mapping[Training, list[outliers.Try]]
) -> None:
    """Writes the rows of the cells so far in the order of the plan, then those that are there from other plans."""
    rows = [row for one in todo if one in tries for row in tries[one][-1].rows]
    if not rows:
        return
    # Older tables do not say which rows are of elastic trainings, and of how many samples.
    older = {dataclasses.replace(row, elastic=False, train_samples=None).key for row in rows}
    keys = {row.key for row in rows} | older
    others = [row for row in table.read(path) if row.key not in keys] if path.is_file() else []
    table.write(path, [*rows, *others])
