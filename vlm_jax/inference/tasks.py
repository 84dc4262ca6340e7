"""What an evaluation asks, and what its workdir holds of it already: settings, questions, answers that still count."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vlm_jax import benchmarks, files
from vlm_jax.benchmarks import predictions
from vlm_jax.benchmarks.predictions import Answer
from vlm_jax.data import sources
from vlm_jax.data.rows import Features
from vlm_jax.data.templates import QUERIES
from vlm_jax.inference import content
from vlm_jax.settings.checks import ConfigError, check_choice, check_positive
from vlm_jax.storage import run as experiment

# How answers are found -> what the names of its results end in. likelihood generates only what has no "replies".
MODES = {"generation": "", "likelihood": "_likelihood"}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What to ask, and how."""

    checkpoint: str  # workdir of the training run
    benchmarks: tuple[str, ...]  # keys of BENCHMARKS
    annotations: tuple[str, ...]  # one directory per benchmark
    image_roots: tuple[str, ...]  # one folder per benchmark ("": its annotations'); () = all ""
    batch_size: int
    mode: str  # a key of MODES
    max_new_tokens: int
    temperature: float  # 0 = greedy
    top_p: float
    seed: int  # of sampling
    limit: int  # first questions only; 0 = all
    features_dir: str  # cached encoder features; "" = encode the images
    visual_tokens: int  # per image; 0 = as the model's config says
    query: str  # a key of data.templates.QUERIES; "" = as in training
    with_questions: bool  # predictions.jsonl holds each question and its gold answer too

    def __post_init__(self):
        check_positive("eval", batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        if not self.checkpoint:
            raise ConfigError("eval: checkpoint is empty; give the workdir of a training run.")
        if not self.benchmarks:
            names = ", ".join(benchmarks.BENCHMARKS)
            raise ConfigError(f"eval: benchmarks is empty; name one or more of {names}.")
        if len(self.benchmarks) != len(self.annotations):
            raise ConfigError(
                f"eval: {len(self.benchmarks)} benchmarks but {len(self.annotations)} annotations; give one "
                "directory per benchmark."
            )
        if self.image_roots and len(self.benchmarks) != len(self.image_roots):
            raise ConfigError(
                f"eval: {len(self.benchmarks)} benchmarks but {len(self.image_roots)} image_roots; give one folder per "
                "benchmark ('' for the folder of its annotations), or none."
            )
        if len(set(self.benchmarks)) != len(self.benchmarks):
            raise ConfigError(
                f"eval: benchmarks {self.benchmarks} names one twice; name each once."
            )
        if self.temperature < 0:
            raise ConfigError(
                f"eval: temperature must be 0 (greedy) or more, got {self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"eval: top_p must lie in (0, 1], got {self.top_p}.")
        check_choice("eval", "query", self.query, ("", *QUERIES))
        check_choice("eval", "mode", self.mode, MODES)
        if self.limit < 0:
            raise ConfigError(f"eval: limit must be 0 (all) or more, got {self.limit}.")
        for name in self.benchmarks:
            benchmarks.get(name)

    def image_root(self, number: int) -> str:
        """The folder that image paths of a benchmark start from."""
        if self.image_roots and self.image_roots[number]:
            return self.image_roots[number]
        place = Path(self.annotations[number])
        return str(place if place.is_dir() else place.parent)


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark of a run: its questions and where its answers are kept."""

    name: str
    mode: str
    image_root: str
    folder: Path
    rows: list[dict[str, Any]]  # those to be scored
    beyond: frozenset[str]  # ids left out by the limit
    unanswered: list[dict[str, Any]]
    features: Features | None  # read instead of the images
    ignored: tuple[str, ...]  # fields of rows that count as absent
    with_questions: bool

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions.jsonl"

    @property
    def label(self) -> str:
        """The name of its results."""
        return self.name + MODES[self.mode]

    def is_chosen(self, row: dict[str, Any]) -> bool:
        """Whether the answer is the likeliest of the row's replies."""
        return self.mode == "likelihood" and "replies" in row

    def mark(self, row: dict[str, Any]) -> str:
        """The fingerprint of a question."""
        replies = row["replies"] if self.is_chosen(row) else None
        return content.of_question(row, self.image_root, self.features, replies, self.ignored)

    @functools.cached_property
    def _by_id(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.unanswered}

    def keep(self, answers: list[Answer]) -> None:
        """Adds answers to the predictions, each with the fingerprint of its question, and the question if it is wanted."""
        beside: dict[str, dict[str, Any]] = {}
        for i, _ in answers:
            row = self._by_id[i]
            beside[i] = {"asked": self.mark(row)}
            if self.with_questions:
                said = row["conversations"][-1]["value"]
                beside[i] |= {"question": said, "gold": row["answer"]}
        predictions.append(self.predictions, answers, beside)


def open_tasks(settings: EvalConfig, workdir: Path) -> list[Task]:
    """Reads the questions and what `workdir` answers already.

    Raises ConfigError when those are answers of another run or to other questions.
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
    features = Features(settings.features_dir) if settings.features_dir else None
    return [
        _open(number, settings, made_with, features, workdir)
        for number in range(len(settings.benchmarks))
    ]


def _open(
    number: int,
    settings: EvalConfig,
    made_with: Mapping[str, Any],
    features: Features | None,
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
        name, settings.mode, settings.image_root(number), folder, chosen,
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
    """Writes run.json; where things lay is for the reader, and not compared."""
    places = {
        "checkpoint": str(Path(checkpoint).absolute()),
        "step": experiment.last_step(checkpoint),
        "annotations": str(Path(annotations).absolute()),
    }
    part = path.with_suffix(f".part{os.getpid()}")  # another process may be reading
    part.write_text(json.dumps({**places, **made_with}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


CHANGED = {
    "weights": "of other weights: {checkpoint} was trained since, or is another run",
    "prompts": "made with another model or prompt: config.json or the tokenizer of {checkpoint} changed since",
}


def _check_run(task: Task, checkpoint: str, made_with: Mapping[str, Any]) -> None:
    """Raises ConfigError unless run.json says that the answers were made as they would be now."""
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
    """Raises ConfigError when an answer in the predictions is to a question that is another one now, or gone."""
    records = [line for _, line in predictions.read_lines(task.predictions)]
    known = [record for record in records if record["id"] in rows]
    with ThreadPoolExecutor(8) as pool:  # pictures are read, mostly waiting for the disk
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
