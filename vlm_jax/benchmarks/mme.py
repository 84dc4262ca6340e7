"""MME: fourteen tasks of yes-or-no questions, two per image, with points for right answers and for images with both right.

Files: <task>/<name>.txt, each with two lines "question<TAB>Yes|No", beside <task>/<name>.jpg or .png; or, where a task has
these folders, <task>/questions_answers_YN/<name>.txt and <task>/images/<name>.jpg. Or the hub's parquet files
test-*.parquet {"question_id" (task/image name, or task/images/image name), "question", "answer", "image", and "category", the
task}.

Answers are read as by the official tool (eval_tool/calculation.py), after white space around them is removed.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence
from typing import Any

from vlm_jax.benchmarks import files, prompts, records
from vlm_jax.benchmarks.records import ImageSource, Question
from vlm_jax.files import Path, to_path
from vlm_jax.settings.checks import ConfigError

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
MOST_PERCEPTION, MOST = 2000.0, 2800.0  # points: 200 per task
ROOTS = (".", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark")

log = logging.getLogger(__name__)


def rows(annotations: str | Path) -> list[Question]:
    """Ids "<task>/<image name with extension>/<0|1>", tasks in the order above, images by name.

    All task folders that exist are read; one is enough. Raises ConfigError when there is none.
    """
    base = to_path(annotations)
    tasks = [
        (root, task)
        for root in ROOTS
        for task in PERCEPTION + COGNITION
        if (base / root / task).is_dir()
    ]
    shards = [] if tasks else files.matches("mme", base, *files.shards("test"))
    if shards:
        return records.distinct(_hub_rows(shards), f"mme: {base}")
    if not tasks:
        raise ConfigError(
            f"mme: {base} holds no task folder; give the directory of existence, count, ..."
        )
    found = []
    for root, task in tasks:
        if root != tasks[0][0]:
            raise ConfigError(f"mme: {base} holds tasks in {tasks[0][0]} and {root}; keep one.")
        found += _task_rows(base, to_path(root) / task, task)
    return records.distinct(found, f"mme: {base}")


def _task_rows(base: Path, folder: Path, task: str) -> list[Question]:
    split = (base / folder / "questions_answers_YN").is_dir()
    texts = base / folder / "questions_answers_YN" if split else base / folder
    pictures = folder / "images" if split else folder
    named: dict[str, list[str]] = collections.defaultdict(list)
    for image in sorted((base / pictures).glob("*")):
        if image.suffix != ".txt" and image.is_file() and not image.name.startswith("."):
            named[image.stem].append(image.name)
    found = []
    for path in sorted(texts.glob("*.txt")):
        images = named[path.stem]
        if len(images) != 1:
            raise ConfigError(
                f"mme: {path} needs one image of that name in {base / pictures}, found {len(images)}; keep one."
            )
        lines = [line for line in files.text("mme", path).split("\n") if line.strip()]
        if len(lines) != 2:
            raise records.fault(f"mme: {path}", f"must hold two questions, not {len(lines)}")
        for number, line in enumerate(lines):
            question, _, answer = line.strip().rpartition("\t")
            gold = answer.strip().lower()
            if not question or gold not in ("yes", "no"):
                reason = f"must be question<TAB>Yes or No, got {line!r:.60}"
                raise records.fault(f"mme: {path} line {number + 1}", reason)
            image = (pictures / images[0]).as_posix()
            found.append(_row(task, images[0], number, image, question, gold))
    return found


def _hub_rows(shards: Sequence[Path]) -> list[Question]:
    found, asked = [], collections.Counter()
    for record in files.read("mme", shards):
        name, question = record.text("question_id"), record.text("question")
        task, picture = name.split("/")[0], name.split("/")[-1]
        name = f"{task}/{picture}"
        gold = record.text("answer").strip().lower()
        if task not in PERCEPTION + COGNITION or gold not in ("yes", "no") or asked[name] == 2:
            raise record.fault(f"{name!r}, {gold!r} is not one of a picture's two questions")
        found.append(_row(task, picture, asked[name], record.image("image"), question, gold))
        asked[name] += 1
    return found


def _row(
    task: str, picture: str, number: int, image: ImageSource, question: str, gold: str
) -> Question:
    # Seven questions have two blanks before that sentence, which LLaVA's file does not have.
    text = question.strip().replace(" Please answer yes or no.", "").rstrip() + prompts.SHORT
    stem = to_path(picture).stem
    more = {
        "replies": prompts.YES_NO, "task": task, "picture": picture, "llava_id": f"{task}/{stem}",
    }  # fmt: skip
    return records.row(f"{task}/{picture}/{number}", image, text, gold, **more)


def parse(text: str) -> str:
    """yes if the first four characters contain it, else no if they contain that, else other, which is wrong."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(text: str, row: Question) -> float:
    return float(parse(text) == row["answer"])


def reduce(scores: Sequence[float], rows: Sequence[Question]) -> dict[str, Any]:
    """score: (perception + cognition) / 2800 points. A task without answers has 0 points, and a warning names it.

    A task has 100 acc + 100 acc_plus points: acc is the share of questions that are right, acc_plus that of images with both
    right. details also contain perception_score = perception / 2000, which papers report.
    """
    right: dict[str, dict[str, list[float]]] = {}
    for value, row in zip(scores, rows, strict=True):
        right.setdefault(row["task"], {}).setdefault(row["picture"], []).append(value)
    points: dict[str, float] = {}
    details: dict[str, float] = {}
    for task, pictures in right.items():
        values = [value for pair in pictures.values() for value in pair]
        acc = sum(values) / len(values)
        acc_plus = sum(pair == [1.0, 1.0] for pair in pictures.values()) / len(pictures)
        points[task] = 100.0 * acc + 100.0 * acc_plus
        details |= {f"{task}.acc": acc, f"{task}.acc_plus": acc_plus}
    absent = [task for task in PERCEPTION + COGNITION if task not in points]
    if absent:
        log.warning("mme: no answer in %s: 0 of their points are in the score", ", ".join(absent))
    perception = sum(value for task, value in points.items() if task in PERCEPTION)
    cognition = sum(value for task, value in points.items() if task in COGNITION)
    score = (perception + cognition) / MOST
    sums = {
        "perception": perception,
        "cognition": cognition,
        "perception_score": perception / MOST_PERCEPTION,
        "tasks": len(points),
    }
    return {"score": score, "error": 1.0 - score, "n": len(rows), "details": sums | details}
