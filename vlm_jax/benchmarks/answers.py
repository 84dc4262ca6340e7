"""A file of answers for the rows of a benchmark: our predictions.jsonl, or the answers.jsonl that LLaVA's scripts write.

LLaVA's lines are {"question_id", "prompt", "text", ...}. Its question_id is that of the native file for GQA, VQAv2, ScienceQA,
SEED-Bench, MMBench (the index) and LLaVA-Bench; the image's file name for VizWiz, the image's id for TextVQA,
<task>/<image> or <task>/images/<image> for MME, N of v1_N for MM-Vet, and one running number over the three splits for POPE.
A row says in "llava_id" what its question_id is where that is not its id. Where questions share one, the prompt decides.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from vlm_jax import benchmarks, files
from vlm_jax.benchmarks import predictions
from vlm_jax.benchmarks.predictions import Answer
from vlm_jax.benchmarks.records import Question
from vlm_jax.files import Path, to_path
from vlm_jax.settings.checks import ConfigError

# The order of POPE's splits in LLaVA's question file. Used, with a warning, where the prompts also fit other orders.
POPE_ORDER = ("adversarial", "popular", "random")
_ENDINGS = re.compile(
    r"reference ocr token:|answer the question using|answer with the option's letter|please answer yes or no"
)
_NOT_ASKED = re.compile(r"<image>|please answer yes or no\.?$")

log = logging.getLogger(__name__)


def read(name: str, rows: Sequence[Question], path: str | Path) -> list[Answer]:
    """The answers of a file with the ids of `rows`, in the order of the file.

    Raises ConfigError with the line's number for a line that is no answer, and for question_ids that belong to no question.
    An id that occurs again belongs to the next question with that id ("501", then "501#1").
    """
    lines = predictions.read_lines(path)
    if lines and "question_id" in lines[0][1] and "id" not in lines[0][1]:
        return _matched(name, rows, [_Line(where, line) for where, line in lines], to_path(path))
    return _numbered(rows, [predictions.answer(where, line) for where, line in lines])


def _numbered(rows: Sequence[Question], answers: Sequence[Answer]) -> list[Answer]:
    known, times = {row["id"] for row in rows}, Counter[str]()
    found = []
    for row_id, text in answers:
        again = f"{row_id}#{times[row_id]}"
        found.append((again if times[row_id] and again in known else row_id, text))
        times[row_id] += 1
    return found


class _Line:
    """One line of an answer file of LLaVA."""

    def __init__(self, where: str, line: dict[str, Any]):
        name, prompt = line.get("question_id"), line.get("prompt", "")
        for field, value, kinds in (
            ("question_id", name, (str, int)), ("text", line.get("text"), str), ("prompt", prompt, str),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, kinds):
                kind = "a string or a whole number" if field == "question_id" else "a string"
                raise ConfigError(f"predictions: {where}: {field!r} must be {kind}.")
        self.where, self.text = where, line["text"]
        self.number: Any = name
        self.key, self.asked = key(str(name)), question(prompt)


def key(question_id: str) -> str:
    """A question_id without the suffix of an image and without MME's folder images/."""
    return re.sub(r"\.(jpe?g|png)$", "", question_id, flags=re.I).replace("/images/", "/")


def question(prompt: str) -> str:
    """The question of a prompt in lower case, without OCR tokens, the prompt's ending and the image placeholder."""
    lines = [" ".join(line.lower().split()) for line in prompt.split("\n")]
    asked = [_NOT_ASKED.sub("", line).strip() for line in lines if not _ENDINGS.match(line)]
    return " ".join(filter(None, asked))


def _asked(row: Question) -> str:
    return question(row["conversations"][-1]["value"])


def _matched(
    name: str, rows: Sequence[Question], lines: Sequence[_Line], path: Path
) -> list[Answer]:
    by_key: dict[str, list[Question]] = defaultdict(list)
    for row in rows:
        for own in {key(row["id"]), key(row.get("llava_id", row["id"]))}:
            by_key[own].append(row)
    unknown = [line for line in lines if line.key not in by_key]
    shared = name == "pope" and any(
        len(by_key[line.key]) > 1 for line in lines if line.key in by_key
    )
    if shared or len(unknown) == len(lines):
        return _running(name, rows, lines, path)
    if unknown and name == "seed":  # LLaVA's file asks about videos, too
        log.info("seed: %d answers are to no question about an image: left out", len(unknown))
    elif unknown:
        raise ConfigError(
            f"predictions: {path}: {len(unknown)} of {len(lines)} question ids are not in {name} (first "
            f"{unknown[0].number!r}); give the answers and the annotations of one split."
        )
    groups: dict[str, list[_Line]] = defaultdict(list)
    for line in lines:
        if line.key in by_key:
            groups[line.key].append(line)
    pairs = [pair for own, group in groups.items() for pair in _group(by_key[own], group)]
    texts = {id(line): (row["id"], line.text) for row, line in pairs}
    return [texts[id(line)] for line in lines if id(line) in texts]


def _group(rows: Sequence[Question], lines: Sequence[_Line]) -> Iterable[tuple[Question, _Line]]:
    """The questions with one question_id and their answers: by the prompt, or by their order where no prompt is given."""
    if len(rows) == 1:
        return [(rows[0], line) for line in lines]
    if len(rows) == len(lines) and not any(line.asked for line in lines):
        return list(zip(rows, lines, strict=True))
    left, pairs = list(rows), []
    for line in lines:
        fitting = [row for row in left if _asked(row) == line.asked]
        if not fitting:
            raise ConfigError(
                f"predictions: {line.where}: {len(rows)} questions have the id {line.number!r}, and the prompt "
                "is that of none that is left; one line per question, with its prompt, is needed."
            )
        left.remove(fitting[0])
        pairs.append((fitting[0], line))
    return pairs


def _running(
    name: str, rows: Sequence[Question], lines: Sequence[_Line], path: Path
) -> list[Answer]:
    """Pairs answers whose ids are running numbers with the questions in order. Raises ConfigError where a prompt differs."""
    numbers = [line.number for line in lines]
    if len(set(numbers)) == len(numbers) and all(isinstance(number, int) for number in numbers):
        lines = sorted(lines, key=lambda line: line.number)
    orders = [list(rows)] if all(line.asked for line in lines) else []
    if name == "pope":
        splits = [split for split in POPE_ORDER if any(row["split"] == split for row in rows)]
        orders = [
            [row for split in order for row in rows if row["split"] == split]
            for order in itertools.permutations(splits)
        ]
    fitting = [order for order in orders if len(order) == len(lines) and _prompts_fit(order, lines)]
    if fitting:
        of_rows = [row.get("split", "") for row in fitting[0]]
        order = " ".join(dict.fromkeys(filter(None, of_rows))) or "in the order of the file"
        if len(fitting) > 1:
            log.warning(
                "%s: several orders of the splits fit the prompts of %s: taken as %s",
                name,
                path,
                order,
            )
        else:
            log.info("%s: the ids of %s count the questions: %s", name, path, order)
        return [(row["id"], line.text) for row, line in zip(fitting[0], lines, strict=True)]
    raise ConfigError(
        f"predictions: {path}: its {len(lines)} question ids (first {numbers[0]!r}) are not those of {name}, and its "
        f"prompts are not those of the {len(rows)} questions in order; give the annotations that were asked."
    )


def _prompts_fit(rows: Sequence[Question], lines: Sequence[_Line]) -> bool:
    """Whether every line that has a prompt has that of its question."""
    return all(line.asked in ("", _asked(row)) for row, line in zip(rows, lines, strict=True))


def write(
    folder: str | Path, answers: Sequence[Answer], uploads: dict[str, str | bytes]
) -> list[str]:
    """Writes predictions.jsonl and the uploads into `folder`; returns their paths."""
    folder = to_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.jsonl").unlink(missing_ok=True)
    predictions.append(folder / "predictions.jsonl", answers)
    for name, content in uploads.items():
        files.write_whole(folder / name, content)
    return [str(folder / name) for name in ("predictions.jsonl", *uploads)]


def score(
    benchmark: str, file: str, annotations: str, allow_missing: bool = False, convert: str = ""
) -> dict[str, Any]:
    """Scores a saved predictions.jsonl, or LLaVA's answers.jsonl; convert: writes ours and the upload into that folder.

    The result is that of `benchmarks.score_answers`. Where the gold is hidden and `convert` is given, score and error are None. Raises ConfigError for missing files and ids
    that do not pair up.
    """
    rows = benchmarks.get(benchmark).rows(annotations)
    found = read(benchmark, rows, file)
    if convert:
        uploads = benchmarks.submission(benchmark, rows, found, allow_missing)
        predictions.pair(rows, found, allow_missing)
        log.info("%s: wrote %s", benchmark, ", ".join(write(convert, found, uploads)))
        if not benchmarks.has_gold(rows):
            return {"benchmark": benchmark, "score": None, "error": None, "n": len(found)}
    return benchmarks.score_answers(benchmark, rows, found, allow_missing)
