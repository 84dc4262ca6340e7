"""An evaluation: a trained model answers what is not yet answered, the answers are scored, and errors.csv gets its rows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax import benchmarks, files
from vlm_jax.benchmarks import predictions
from vlm_jax.compressors import with_tokens
from vlm_jax.data import feature_cache, tokenizer
from vlm_jax.files import Path, to_path
from vlm_jax.inference.settings import MODES, EvalConfig
from vlm_jax.inference.tasks import Task, open_tasks
from vlm_jax.laws import questions, table
from vlm_jax.progress import Bar, Say, silent
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LMConfig
from vlm_jax.settings.run import Experiment, MeshConfig
from vlm_jax.storage import run as experiment

log = logging.getLogger(__name__)

Score = dict[str, Any]  # {"benchmark", "score", "error", "n", "details"}


def evaluate(
    settings: EvalConfig, mesh: MeshConfig, workdir: str, say: Say = silent
) -> list[Score]:
    """Answers the questions that `workdir` has no answer to, scores them, and writes uploads, scores.json and errors.csv.

    Questions whose gold answers are hidden are answered but not scored. say: called with each line about what is going to
    be asked and what was written.

    Raises ConfigError, before anything heavy is imported, for wrong settings, missing inputs or predictions of another run.
    """
    run, step = _check(settings)
    folder = experiment.open_workdir(workdir, checkpoints=False)
    tasks = open_tasks(settings, folder)
    for line in _asking(run, settings.checkpoint, step, folder, tasks):
        say(line)
    from vlm_jax.inference.answer import Answerer  # here, not above: jax and orbax take seconds

    answerer = Answerer(settings, mesh)
    if experiment.last_step(settings.checkpoint) != step:
        raise ConfigError(
            f"eval: {settings.checkpoint!r} wrote a newer checkpoint meanwhile; evaluate it again, or when it is finished."
        )
    errors = folder / "errors.csv"
    known = {row.key: row for row in table.read(errors)} if errors.is_file() else {}
    scores, measured, moved = [], [], {}
    for task in tasks:
        seconds = _ask(task, answerer)
        answerer.wait()
        answers = [a for a in predictions.read(task.predictions) if a[0] not in task.beyond]
        if answerer.writes:
            _write_uploads(task, answers)
        if not benchmarks.has_gold(task.rows):
            log.info("%s: the gold answers are hidden: not scored", task.label)
            continue
        score = benchmarks.score_answers(task.name, task.rows, answers)
        scores.append({**score, "benchmark": task.label})
        cost = answerer.flops(task.rows, task.image_root, dict(answers), task.is_chosen)
        row = _row(task, scores[-1], run, answerer.visual_tokens, cost, seconds)
        if seconds is None and row.key in known:  # nothing was asked: the time measured before
            row = dataclasses.replace(row, seconds=known[row.key].seconds)
        measured.append(row)
        moved[row.key] = benchmarks.errors_without_groups(task.name, task.rows, answers)
        log.info("%s: error %.4f (%d questions)", task.label, scores[-1]["error"], scores[-1]["n"])
    if answerer.writes:
        files.write_whole(folder / "scores.json", json.dumps(scores, indent=1) + "\n")
        if measured:
            table.append(errors, measured)
            questions.append(folder / "questions.jsonl", moved)
        for line in _written(folder, len(measured)):
            say(line)
    answerer.wait()  # who reads the files next, in another process, finds them whole
    return scores


def _check(settings: EvalConfig) -> tuple[Experiment, int]:
    """The trained run and its last step. Raises ConfigError for settings that do not fit it or ask nothing."""
    settings.check_benchmarks()
    run, step = experiment.read(settings.checkpoint), experiment.last_step(settings.checkpoint)
    if step is None:
        raise ConfigError(
            f"eval: checkpoint {settings.checkpoint!r} has no finished checkpoint; train first."
        )
    if step and experiment.finished(to_path(settings.checkpoint)) is None:
        log.warning("eval: %s is not finished; this is its step %d", settings.checkpoint, step)
    tokenizer.check_directory(run.data.tokenizer)
    if settings.visual_tokens:
        with_tokens(run.model.compressor, run.model.vit.grid, settings.visual_tokens)
    if settings.features_dir:
        feature_cache.check_cacheable(run.model)
        feature_cache.check(settings.features_dir, run.model, run.data)
    return run, step


def _asking(
    run: Experiment, checkpoint: str, step: int, workdir: Path, tasks: Sequence[Task]
) -> list[str]:
    """What an evaluation is about to do."""
    left = {task.label: (len(task.rows), len(task.unanswered)) for task in tasks}
    lm, vit = run.model.lm, run.model.vit
    asked = ", ".join(
        f"{name} ({total:,} questions{f', {total - missing:,} answered already' if missing < total else ''})"
        for name, (total, missing) in left.items()
    )
    return [
        f"  model    {files.shown(checkpoint)}, step {step}: images of {vit.image_px} px -> {run.model.compressor.name} -> decoder of "
        f"{lm.num_layers} layers, width {lm.width}",
        f"  asked    {asked}",
        f"  written  {files.shown(workdir)}/<benchmark>/predictions.jsonl, then scores.json and errors.csv; loading jax ...",
    ]


def _written(workdir: Path, scored: int) -> list[str]:
    """What an evaluation wrote, and the command that comes next."""
    if not scored:
        return ["no row for errors.csv: all gold answers are hidden; send in the uploads"]
    folder = files.shown(workdir)
    return [
        f"  wrote    {folder}/scores.json and errors.csv ({scored} row{'s' * (scored > 1)} of this run)",
        f"  next     python -m vlm_jax.laws.fit {folder}/errors.csv OTHER/errors.csv .. --out law.json, with those of other "
        "LM sizes and numbers of visual tokens",
    ]


def _write_uploads(task: Task, answers: Sequence[predictions.Answer]) -> None:
    for name, content in benchmarks.submission(task.name, task.rows, answers).items():
        files.write_whole(task.folder / name, content)
        log.info(
            "%s: %s holds %d answers to upload", task.label, task.folder / name, len(task.rows)
        )


def _ask(task: Task, answerer: Any) -> float | None:
    """Appends the missing answers, from an answer.Answerer. Returns the seconds per question; None if none was missing.

    Batches during which something was compiled are left out of the time, unless there are no others.
    """
    if not task.unanswered:
        return None
    steady = [0.0, 0]  # seconds, questions
    start = last = time.perf_counter()
    before, compiled = answerer.counts, answerer.compilations
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Bar(task.label, len(task.unanswered), shows=answerer.writes))
        lines = stack.enter_context(files.Lines(task.predictions)) if answerer.writes else None
        where = (task.image_root, task.is_chosen, task.annotations)
        for answers in answerer.answer(task.unanswered, *where):
            if answerer.writes:
                task.keep(answers, lines)
            now = time.perf_counter()
            if answerer.compilations == compiled:
                steady = [steady[0] + now - last, steady[1] + len(answers)]
            last, compiled = now, answerer.compilations
            bar.advance(len(answers))
    seconds = last - start
    spent = {name: count - before[name] for name, count in answerer.counts.items()}
    _report(task, len(task.unanswered), seconds, spent, answerer.writes)
    return steady[0] / steady[1] if steady[1] else seconds / len(task.unanswered)


def _report(
    task: Task, questions: int, seconds: float, spent: Mapping[str, int], writes: bool
) -> None:
    """Logs one line about the speed, and appends one to speed.jsonl."""
    log.info(
        "%s: %d questions in %.1f s: %.1f questions/s, %.0f prompt and %.0f answer tokens/s; %d compilations",
        task.label, questions, seconds, questions / seconds, spent["prompt_tokens"] / seconds,
        spent["answer_tokens"] / seconds, spent["compilations"],
    )  # fmt: skip
    if writes:
        line = {"questions": questions, "seconds": round(seconds, 3), **spent}
        with files.Lines(task.folder / "speed.jsonl") as file:
            file.write(json.dumps(line) + "\n")


def _row(
    task: Task,
    score: Score,
    run: Experiment,
    visual_tokens: int,
    flops: float,
    seconds: float | None,
) -> table.Row:
    lm, name = run.model.lm, lm_name(run.model.lm)
    # One name, one size: a directory of a preset's shape counts as the preset does.
    nominal = lm.nominal_params or (presets.lm(name).nominal_params if name in presets.LM else 0)
    return table.Row(
        lm_params=float(nominal or lm.non_embedding_params),
        visual_tokens=visual_tokens,
        error=score["error"],
        benchmark=score["benchmark"],
        family=benchmarks.get(task.name).family + MODES[task.mode],
        lm=name,
        compressor=run.model.compressor.name,
        n=score["n"],
        seed=run.train.seed,
        flops=flops,
        seconds=seconds,
    )


def lm_name(lm: LMConfig) -> str:
    """The preset of this shape (vocabularies may differ), or the number of parameters, which on the hub includes embeddings."""
    free = (
        "vocab_size", "nominal_params", "dtype", "param_dtype", "remat", "attention", "lora_rank", "lora_alpha", "lora_targets",
    )  # fmt: skip
    for name in presets.LM:
        preset = presets.lm(name, **{field: getattr(lm, field) for field in free})
        if preset == lm:
            return name
    return presets.size_name(float(lm.nominal_params or lm.total_params))
