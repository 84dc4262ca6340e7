"""python -m vlm_jax.evaluate --config=configs/eval.py --workdir=DIR: the errors of a trained model on benchmarks.

    DIR/<benchmark>/predictions.jsonl   {"id", "text"} per line, appended batch by batch; the same command continues it
    DIR/<benchmark>/run.json            what the predictions were made with: fingerprints of weights and prompts, settings
    DIR/<benchmark>/speed.jsonl         one line per time something was asked: questions, seconds, tokens, compilations
    DIR/<benchmark>/<upload>            what the official server or judge takes, where there is one
    DIR/scores.json                     [{"benchmark", "score", "error", "n", "details"}, ...]
    DIR/errors.csv                      one row per benchmark (laws/table.py)

Answers of other weights, settings or questions are never continued: the workdir is refused by name. Changed gold answers
alone are scored anew. A benchmark whose gold answers are hidden is answered and its upload is written; it has no score and no row.
With eval.mode = likelihood the answer to a closed question is the likeliest of its replies, found in one forward pass;
names and families then end in _likelihood, for these are not the official numbers.

python -m vlm_jax.evaluate --score --benchmark=NAME --predictions=P --annotations=DIR [--out=F] [--allow-missing] [--convert=DIR]
scores saved predictions, ours or LLaVA's answers.jsonl; it needs no model. --convert writes them to DIR as predictions.jsonl
with our ids, and the official upload where there is one. With several processes, DIR is on a disk they share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlm_jax import benchmarks, files
from vlm_jax.benchmarks import answers as saved
from vlm_jax.benchmarks import predictions
from vlm_jax.compressors import with_tokens
from vlm_jax.data import feature_cache, tokenizer
from vlm_jax.inference.tasks import MODES, EvalConfig, Task, open_tasks
from vlm_jax.laws import table
from vlm_jax.settings import addresses, cli, presets
from vlm_jax.settings.checks import ConfigError, build
from vlm_jax.settings.model import LMConfig
from vlm_jax.settings.run import Experiment, MeshConfig
from vlm_jax.storage import run as experiment
from vlm_jax.training import outline

log = logging.getLogger("vlm_jax.evaluate")  # run as a module, __name__ is "__main__"

Score = dict[str, Any]  # {"benchmark", "score", "error", "n", "details"}


def evaluate(cfg: ConfigDict, workdir: str, say: outline.Say = outline.silent) -> list[Score]:
    """Asks what is not yet answered, scores what has gold answers, and writes uploads, scores.json and errors.csv.

    say: is given the lines that tell what is about to be asked and what was written.

    Raises ConfigError, before anything heavy is imported, for wrong settings, missing inputs or predictions of another run.
    """
    addresses.check_settings(cfg.to_dict())
    settings, mesh = build(EvalConfig, cfg.eval.to_dict()), build(MeshConfig, cfg.mesh.to_dict())
    run = experiment.read(settings.checkpoint)
    if experiment.last_step(settings.checkpoint) is None:
        raise ConfigError(
            f"eval: checkpoint {settings.checkpoint!r} has no finished checkpoint; train first."
        )
    tokenizer.check_directory(run.data.tokenizer)
    if settings.visual_tokens:
        with_tokens(run.model.compressor, run.model.vit.grid, settings.visual_tokens)
    if settings.features_dir:
        feature_cache.check_cacheable(run.model)
        feature_cache.check(settings.features_dir, run.model, run.data)
    folder = experiment.open_workdir(workdir)
    tasks = open_tasks(settings, folder)
    left = {task.label: (len(task.rows), len(task.unanswered)) for task in tasks}
    step = experiment.last_step(settings.checkpoint) or 0
    for line in outline.asking(run, settings.checkpoint, step, folder, left):
        say(line)
    from vlm_jax.inference.answer import Answerer  # here, not above: jax and orbax take seconds

    answerer = Answerer(
        settings.checkpoint, mesh, settings.features_dir, settings.max_new_tokens, settings.temperature,
        settings.top_p, settings.seed, settings.visual_tokens, settings.query,
    )  # fmt: skip
    known = (
        {row.key: row for row in table.read(folder / "errors.csv")}
        if (folder / "errors.csv").is_file()
        else {}
    )
    scores, measured = [], []
    for task in tasks:
        seconds = _ask(task, answerer, settings.batch_size)
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
        if seconds is None and row.key in known:
            row = dataclasses.replace(row, seconds=known[row.key].seconds)
        measured.append(row)
        log.info("%s: error %.4f (%d questions)", task.label, scores[-1]["error"], scores[-1]["n"])
    if answerer.writes:
        (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        if measured:
            table.append(folder / "errors.csv", measured)
        else:
            log.info("no row for errors.csv: all gold answers are hidden; send in the uploads")
        for line in outline.asked(folder, len(measured)):
            say(line)
    return scores


def _write_uploads(task: Task, answers: Sequence[predictions.Answer]) -> None:
    for name, content in benchmarks.submission(task.name, task.rows, answers).items():
        data = content.encode() if isinstance(content, str) else content
        (task.folder / name).write_bytes(data)
        log.info(
            "%s: %s holds %d answers to upload", task.label, task.folder / name, len(task.rows)
        )


def _ask(task: Task, answerer: Any, batch_size: int) -> float | None:
    """Appends the answers that are missing, from an answer.Answerer; wall seconds per question (None: none was missing).

    Batches that were compiled are left out of the time, unless there are no others.
    """
    if not task.unanswered:
        return None
    steady = [0.0, 0]  # seconds, questions
    start = last = time.perf_counter()
    before, compiled = answerer.counts, answerer.compilations
    with _progress(task.label, len(task.unanswered), answerer.writes) as advance:
        for answers in answerer.answer(
            task.unanswered, task.image_root, batch_size, task.is_chosen
        ):
            if answerer.writes:
                task.keep(answers)
            now = time.perf_counter()
            if answerer.compilations == compiled:
                steady = [steady[0] + now - last, steady[1] + len(answers)]
            last, compiled = now, answerer.compilations
            advance(len(answers))
    seconds = last - start
    spent = {name: count - before[name] for name, count in answerer.counts.items()}
    _report(task, len(task.unanswered), seconds, spent, answerer.writes)
    return steady[0] / steady[1] if steady[1] else seconds / len(task.unanswered)


def _report(
    task: Task, questions: int, seconds: float, spent: Mapping[str, int], writes: bool
) -> None:
    """One line for the reader, and one of speed.jsonl."""
    log.info(
        "%s: %d questions in %.1f s: %.1f questions/s, %.0f prompt and %.0f answer tokens/s; %d compilations",
        task.label, questions, seconds, questions / seconds, spent["prompt_tokens"] / seconds,
        spent["answer_tokens"] / seconds, spent["compilations"],
    )  # fmt: skip
    if writes:
        line = {"questions": questions, "seconds": round(seconds, 3), **spent}
        with (task.folder / "speed.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def _progress(name: str, total: int, shows: bool) -> Generator[Callable[[int], None], None, None]:
    """A bar on a terminal; calling what it yields moves it on."""
    console = Console(stderr=True)
    if not (shows and console.is_terminal):
        yield lambda count: None
        return
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, total=total)
        yield lambda count: progress.advance(bar, count)


def _row(
    task: Task,
    score: Score,
    run: Experiment,
    visual_tokens: int,
    flops: float,
    seconds: float | None,
) -> table.Row:
    lm = run.model.lm
    return table.Row(
        lm_params=float(lm.nominal_params or lm.non_embedding_params),
        visual_tokens=visual_tokens,
        error=score["error"],
        benchmark=score["benchmark"],
        family=benchmarks.get(task.name).family + MODES[task.mode],
        lm=lm_name(lm),
        compressor=run.model.compressor.name,
        n=score["n"],
        seed=run.train.seed,
        flops=flops,
        seconds=seconds,
    )


def lm_name(lm: LMConfig) -> str:
    """The preset with this shape (its vocabulary may be another), or the size as the hub counts it: with embeddings."""
    free = (
        "vocab_size", "nominal_params", "dtype", "param_dtype", "remat", "attention", "lora_rank", "lora_alpha", "lora_targets",
    )  # fmt: skip
    for name in presets.LM:
        preset = presets.lm(name, **{field: getattr(lm, field) for field in free})
        if preset == lm:
            return name
    return table.size_name(float(lm.nominal_params or lm.total_params))


def score(
    benchmark: str, file: str, annotations: str, allow_missing: bool = False, convert: str = ""
) -> Score:
    """Scores a saved predictions.jsonl, or LLaVA's answers.jsonl; convert: writes ours and the upload into that folder.

    Where the gold is hidden and `convert` is given, score and error are None. Raises ConfigError for missing files and ids
    that do not pair up.
    """
    rows = benchmarks.get(benchmark).rows(annotations)
    found = saved.read(benchmark, rows, file)
    if convert:
        uploads = benchmarks.submission(benchmark, rows, found, allow_missing)
        predictions.pair(rows, found, allow_missing)
        log.info("%s: wrote %s", benchmark, ", ".join(saved.write(convert, found, uploads)))
        if not benchmarks.has_gold(rows):
            return {"benchmark": benchmark, "score": None, "error": None, "n": len(found)}
    return benchmarks.score_answers(benchmark, rows, found, allow_missing)


SCORE_FLAGS = ("benchmark", "predictions", "annotations")


def command(argv: Sequence[str]) -> None:
    scoring = any(word in ("--score", "-score", "--score=true") for word in argv)
    flags = cli.parse(
        argv,
        {
            "workdir": "directory of the run",
            "benchmark": "with --score: its name",
            "predictions": "with --score: a predictions.jsonl",
            "annotations": "with --score: the benchmark's files",
            "out": "with --score: also write the result to this file",
            "convert": "with --score: also write predictions.jsonl and the upload into this folder",
        },
        {
            "score": "score saved predictions, without a model",
            "allow-missing": "with --score: score the questions that are answered",
        },
        required=SCORE_FLAGS if scoring else ("config", "workdir"),
        about=__doc__ or "",
    )
    if not scoring:
        result: Any = evaluate(flags.config, flags.workdir, log.info)
    else:
        allow_missing = bool(flags["allow-missing"].value)
        place = (flags.predictions, flags.annotations)
        result = score(flags.benchmark, *place, allow_missing, flags.convert)
    text = json.dumps(result) + "\n"
    if flags.out:
        files.write_text(flags.out, text)
    sys.stdout.write(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
