"""The tasks of an evaluation: the questions of each benchmark, and which of them its workdir has answered already."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vlm_jax import benchmarks, files
from vlm_jax.benchmarks import predictions
from vlm_jax.benchmarks.predictions import Answer
from vlm_jax.data import sources
from vlm_jax.data.rows import CachedFeatures
from vlm_jax.files import Path, to_path
from vlm_jax.inference import content
from vlm_jax.inference.settings import MODES, EvalConfig
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark of an evaluation: its questions, and the folder of its answers."""

    name: str
    mode: str
    annotations: str
    image_root: str
    folder: Path
    rows: list[dict[str, Any]]  # the questions to score
    beyond: frozenset[str]  # ids of the questions that the limit leaves out
    unanswered: list[dict[str, Any]]  # the rows without an answer in the folder
    features: CachedFeatures | None  # read instead of the images
    ignored: tuple[str, ...]  # fields of rows that are treated as absent
    with_questions: bool  # whether predictions.jsonl also holds questions and gold answers

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions.jsonl"

    @property
    def label(self) -> str:
        """The name under which results are reported: the benchmark's, with the ending of the mode."""
        return self.name + MODES[self.mode]

    def is_chosen(self, row: dict[str, Any]) -> bool:
        """Whether the answer is chosen as the most likely of the row's replies, not generated."""
        return self.mode == "likelihood" and "replies" in row

    def mark(self, row: dict[str, Any]) -> str:
        """The fingerprint of a question."""
        replies = row["replies"] if self.is_chosen(row) else None
        where = (self.annotations, self.image_root)
        return content.of_question(row, *where, self.features, replies, self.ignored)

    @functools.cached_property
    def _by_id(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.unanswered}

    def keep(self, answers: list[Answer], lines: files.Lines | None = None) -> None:
        """Appends answers to predictions.jsonl, each with the fingerprint of its question, and the question if asked for.

        lines: the open file, where many calls follow each other.
        """
        beside: dict[str, dict[str, Any]] = {}
        for i, _ in answers:
            row = self._by_id[i]
            beside[i] = {"asked": self.mark(row)}
            if self.with_questions:
                said = row["conversations"][-1]["value"]
                beside[i] |= {"question": said, "gold": row["answer"]}
        predictions.append(lines or self.predictions, answers, beside)


def open_tasks(settings: EvalConfig, workdir: Path) -> list[Task]:
    """Reads the questions of each benchmark and the answers that `workdir` already holds.

    Raises ConfigError when those answers are by another run or to other questions.
    """
    if not settings.features_dir:
        sources.check_image_roots("eval", settings.image_roots)
    made_with = {
        **content.of_run(settings.checkpoint),
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed,
        "mode": None if settings.mode == "generation" else settings.mode,
        "visual_tokens": settings.visual_tokens or None,
        "query": settings.query or None,
    }
    features = CachedFeatures(settings.features_dir) if settings.features_dir else None
    return [
        _open(number, settings, made_with, features, workdir)
        for number in range(len(settings.benchmarks))
    ]


def _open(
    number: int,
    settings: EvalConfig,
    made_with: Mapping[str, Any],
    features: CachedFeatures | None,
    workdir: Path,
) -> Task:
    name, annotations = settings.benchmarks[number], settings.annotations[number]
    rows = benchmarks.get(name).rows(annotations)
    if settings.mode == "likelihood" and not any("replies" in row for row in rows):
        raise ConfigError(f"eval: {name} has open questions only; use mode = 'generation'.")
    folder = workdir / (name + MODES[settings.mode])
    chosen = rows[: settings.limit] if settings.limit else rows
    benchmarks.check_scorable(name, chosen)
    folder.mkdir(exist_ok=True)
    task = Task(
        name, settings.mode, annotations, settings.image_root(number), folder, chosen,
        frozenset(row["id"] for row in rows[len(chosen) :]), [], features,
        experiment.read(settings.checkpoint).data.ignored_fields, settings.with_questions,
    )  # fmt: skip
    answered = {i for i, _ in predictions.resume(task.predictions)}
    if answered:
        _check_run(task, settings.checkpoint, made_with)
        _check_questions(task, {row["id"]: row for row in rows})
    else:
        _describe(folder / "run.json", made_with, settings.checkpoint, annotations)
    unanswered = [row for row in chosen if row["id"] not in answered]
    return dataclasses.replace(task, unanswered=unanswered)


def _describe(path: Path, made_with: Mapping[str, Any], checkpoint: str, annotations: str) -> None:
    """Writes run.json. The paths in it are for people; they are not compared."""
    places = {
        "checkpoint": str(to_path(checkpoint).absolute()),
        "step": experiment.last_step(checkpoint),
        "annotations": str(to_path(annotations).absolute()),
    }
    files.write_whole(path, json.dumps({**places, **made_with}, indent=1) + "\n")


CHANGED = {
    "weights": "of other weights: {checkpoint} was trained since, or is another run",
    "prompts": "made with another model or prompt: config.json or the tokenizer of {checkpoint} changed since",
}


def _check_run(task: Task, checkpoint: str, made_with: Mapping[str, Any]) -> None:
    """Raises ConfigError unless run.json says that the answers were made with the present weights and settings."""
    path, advice = task.folder / "run.json", "give another workdir, or delete it"
    before = files.read_json(path) if path.is_file() else {}
    if not before.keys() >= content.PARTS:
        raise ConfigError(
            f"--workdir: {str(task.folder)!r} holds answers of which no run.json says by which weights they were made (an "
            f"older version wrote none that does); {advice}."
        )
    for field, value in made_with.items():
        old = before.get(field)
        if old == value:
            continue
        how = f"made with {field} = {old!r}, now {value!r}"
        if field in CHANGED:
            how = CHANGED[field].format(checkpoint=repr(checkpoint))
        raise ConfigError(f"--workdir: {str(task.folder)!r} holds answers {how}; {advice}.")


def _check_questions(task: Task, rows: Mapping[str, dict[str, Any]]) -> None:
    """Raises ConfigError when predictions.jsonl answers a question that has changed since, or no longer exists."""
    records = [line for _, line in predictions.read_lines(task.predictions)]
    known = [record for record in records if record["id"] in rows]
    with ThreadPoolExecutor(8) as pool:  # threads, because reading images mostly waits for the disk
        now = pool.map(lambda record: task.mark(rows[record["id"]]), known)
        changed = [
            record["id"]
            for record, found in zip(known, now, strict=True)
            if record.get("asked") != found
        ]
    changed += [record["id"] for record in records if record["id"] not in rows]
    if changed:
        raise ConfigError(
            f"--workdir: {str(task.folder)!r} answers {len(records)} questions, of which {len(changed)} have other words or "
            f"pictures now, or are gone (first {changed[0]!r}); give another workdir, or delete it."
        )
