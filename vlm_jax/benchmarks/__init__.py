"""The benchmarks: a literal table with one line each. Nothing here imports jax; scoring needs no model.

A benchmark reads its native files into rows, scores one answer, and reduces the scores. A row is a LLaVA-style record
whose last message is the question, {"id", "image"?, "conversations", "answer"}; image paths are relative to the
annotations directory. To add one: a file with its functions, a line in BENCHMARKS, a test with hand-worked cases.

A row of a closed question also has "replies", the possible answers as the model would write them ("A", "B", ... or "Yes",
"No"). `score` gives 1 for the gold reply and 0 for the others. A row of an open question has no such key.

A row may have "llava_id": the question_id of LLaVA's question file, where it differs from the row's id (see answers.py).

Where a gold answer is hidden, "answer" is None and the row is left out of the score. Where all are hidden, only the official
server can score; `submission` writes the files to upload.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

from vlm_jax.benchmarks import (
    ai2d,
    chartqa,
    docvqa,
    gqa,
    judged,
    llava,
    mathvista,
    metrics,
    mmbench,
    mme,
    mmmu,
    ocrbench,
    pope,
    predictions,
    question_file,
    scienceqa,
    seed,
    textvqa,
    vizwiz,
    vqa,
    vqav2,
)
from vlm_jax.files import Path
from vlm_jax.settings.checks import ConfigError

log = logging.getLogger(__name__)
GROUPS = 100  # of pictures, each of which an error is computed without


Submission = Callable[[Sequence[dict[str, Any]], Sequence[str]], dict[str, str | bytes]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How one benchmark asks and scores."""

    family: str  # the law that its errors are fitted by: reasoning | ocr | other
    # annotations directory -> questions with gold answers
    rows: Callable[[str | Path], list[dict[str, Any]]]
    score: Callable[[str, dict[str, Any]], float]  # prediction, row -> 0..1
    # scores, rows -> {"score" 0..1, "error" 0..1 as the law needs it, "n", "details"}
    reduce: Callable[[Sequence[float], Sequence[dict[str, Any]]], dict[str, Any]]
    # rows, texts -> {file name: content} for the official server or judge; None: it is only scored here
    submission: Submission | None = None


def _asked_alone(file: str) -> Callable[[str | Path], list[dict[str, Any]]]:
    return functools.partial(llava.rows_asked_alone, file=file)


_BY_TYPE = functools.partial(metrics.mean_by, "answer_type")

BENCHMARKS: dict[str, Benchmark] = {
    "llava": Benchmark("other", llava.rows, metrics.exact_match, metrics.mean),
    "mini_reasoning": Benchmark(
        "reasoning", _asked_alone("reasoning_test.json"), metrics.exact_match, metrics.mean
    ),
    "mini_ocr": Benchmark("ocr", _asked_alone("ocr_test.json"), metrics.exact_match, metrics.mean),
    "llava_questions": Benchmark(
        "other", question_file.rows, metrics.exact_match, metrics.mean, question_file.submission
    ),  # no gold: never scored here
    "gqa": Benchmark("reasoning", gqa.rows, gqa.score, metrics.mean, gqa.submission),
    "pope": Benchmark("reasoning", pope.rows, pope.score, pope.reduce),
    "mme": Benchmark("reasoning", mme.rows, mme.score, mme.reduce),
    "scienceqa": Benchmark("reasoning", scienceqa.rows, scienceqa.score, scienceqa.reduce),
    "textvqa": Benchmark(
        "ocr", textvqa.rows, vqa.normalised_accuracy, metrics.mean, textvqa.submission
    ),
    "textvqa_ocr": Benchmark(
        "other", textvqa.rows_with_tokens, vqa.normalised_accuracy, metrics.mean, textvqa.submission
    ),  # other: the prompt contains the text to read, and textvqa is in the ocr family already
    "vqav2": Benchmark("other", vqav2.rows, vqa.accuracy, _BY_TYPE, vqav2.submission),
    "vizwiz": Benchmark("other", vizwiz.rows, vqa.accuracy, _BY_TYPE, vizwiz.submission),
    "mmbench": Benchmark(
        "reasoning", mmbench.rows, mmbench.score, mmbench.reduce, mmbench.submission
    ),
    "mmbench_cn": Benchmark(
        "other", mmbench.rows_cn, mmbench.score, mmbench.reduce, mmbench.submission
    ),
    "mmmu": Benchmark("reasoning", mmmu.rows, mmmu.score, mmmu.reduce, mmmu.submission),
    "ai2d": Benchmark("reasoning", ai2d.rows, ai2d.score, metrics.mean),
    "mathvista": Benchmark("reasoning", mathvista.rows, mathvista.score, mathvista.reduce),
    "chartqa": Benchmark("reasoning", chartqa.rows, chartqa.score, chartqa.reduce),
    "docvqa": Benchmark("ocr", docvqa.rows, docvqa.score, metrics.mean, docvqa.submission_docvqa),
    "infovqa": Benchmark(
        "other", docvqa.rows_info, docvqa.score, metrics.mean, docvqa.submission_infovqa
    ),
    "seed": Benchmark("other", seed.rows, seed.score, seed.reduce, seed.submission),
    "ocrbench": Benchmark("other", ocrbench.rows, ocrbench.score, ocrbench.reduce),
    "mmvet": Benchmark(
        "other", judged.rows_mmvet, judged.score, judged.reduce, judged.submission_mmvet
    ),
    "llava_bench": Benchmark(
        "other", judged.rows_llava_bench, judged.score, judged.reduce, judged.submission_llava_bench
    ),
}


def get(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark {name!r}; use one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def score_answers(
    name: str,
    rows: Sequence[dict[str, Any]],
    answers: Sequence[predictions.Answer],
    allow_missing: bool = False,
) -> dict[str, Any]:
    """{"benchmark", "score", "error", "n", "details"}; does not depend on the order of answers.

    n and the score are those of the rows with a gold answer; a warning counts the others. Raises ConfigError when all are
    hidden, naming the files to upload instead.
    """
    scores, known = _scored(name, rows, answers, allow_missing)
    return {"benchmark": name, **get(name).reduce(scores, known)}


def errors_without_groups(
    name: str, rows: Sequence[dict[str, Any]], answers: Sequence[predictions.Answer]
) -> list[float | None]:
    """For each of GROUPS groups of pictures the error without the questions about them; None for a group without any.

    A picture is in the same group whatever the model, so that errors of different models can be compared group by group. A
    question without a picture is in a group by its id.
    """
    scores, known = _scored(name, rows, answers, allow_missing=True)
    groups = [zlib.crc32(_picture(row)) % GROUPS for row in known]
    found: list[float | None] = []
    with _quiet():
        for group in range(GROUPS):
            kept = [i for i, of in enumerate(groups) if of != group]
            if len(kept) in (0, len(known)):
                found.append(None)
                continue
            reduced = get(name).reduce([scores[i] for i in kept], [known[i] for i in kept])
            found.append(float(reduced["error"]))
    return found


def _picture(row: dict[str, Any]) -> bytes:
    """What is the same for all questions about a picture, in every process."""
    image = row.get("image")
    if not isinstance(image, (str, bytes)):  # none, or read from inside a file
        image = str(row.get("picture", row["id"]))
    return image.encode() if isinstance(image, str) else image


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """What a reduction warns of, it has said of all questions."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _scored(
    name: str,
    rows: Sequence[dict[str, Any]],
    answers: Sequence[predictions.Answer],
    allow_missing: bool,
) -> tuple[list[float], list[dict[str, Any]]]:
    """The scores of the answered rows that have a gold answer, and these rows; raises as `score_answers` does."""
    benchmark = get(name)
    paired = predictions.pair(rows, answers, allow_missing)
    if not has_gold(rows):
        uploads = submission(name, rows, answers, allow_missing)
        raise ConfigError(
            f"{name}: these annotations hold no gold answers, so nothing can be scored here; upload "
            f"{', '.join(uploads) or 'the predictions'}, which an evaluation writes beside its predictions.jsonl."
        )
    known = [(row, text) for row, text in paired if row["answer"] is not None]
    if len(known) < len(paired):
        log.warning(
            "%s: %d of %d questions have no gold answer: they are not scored (first %r)",
            name, len(paired) - len(known), len(paired),
            next(row["id"] for row, _ in paired if row["answer"] is None),
        )  # fmt: skip
    if not known:
        raise ConfigError(
            f"{name}: none of the {len(paired)} answered questions has a gold answer; answer others."
        )
    scores = [benchmark.score(text, row) for row, text in known]
    return scores, [row for row, _ in known]


def check_scorable(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Raises ConfigError when no answers to these rows could be scored, for instance because a limit left too few rows."""
    if has_gold(rows):
        score_answers(name, rows, [(row["id"], "") for row in rows])


def has_gold(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether any row can be scored here."""
    return any(row["answer"] is not None for row in rows)


def submission(
    name: str,
    rows: Sequence[dict[str, Any]],
    answers: Sequence[predictions.Answer],
    allow_missing: bool = False,
) -> dict[str, str | bytes]:
    """{file name: content} of the official upload, rows in their own order; empty for a benchmark without one."""
    write = get(name).submission
    if write is None:
        return {}
    paired = predictions.pair(rows, answers, allow_missing)
    return write([row for row, _ in paired], [text for _, text in paired])
