"""MMMU: college questions with options or open answers, read and scored as MMMU-Benchmark/MMMU, eval/utils, does.

Native files: the hub's validation-*.parquet, one folder per subject or all in one, or JSON with the same fields (id,
question, options as a list or its text, answer, question_type, image_1 .. image_7). Test answers are "?": the server
on EvalAI scores them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import random
import re
from collections.abc import Mapping, Sequence

from vlm_jax.benchmarks import files, metrics, prompts, records
from vlm_jax.benchmarks.records import Question, RawRecord
from vlm_jax.files import Path

FILES = ("**/validation-*.parquet", "validation.json*", "**/test-*.parquet", "test.json*")
MOST_IMAGES = 7
SEED = 42  # of the choice for an answer that names no option; the official script's seed
# Every question_type but "multiple-choice" is open, such as "short-answer" in the official answers.
CHOICE, OPEN = "multiple-choice", "open"
# Words before an answer, and texts that are no answer.
ANNOUNCE = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
PUNCTUATION = (":", ",", ".", "!", "?", ";", "'")
# 1,000 | 1.5e3 | other numbers
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def rows(path: str | Path) -> list[Question]:
    """Ids are MMMU's own. All images precede the question, whose "<image k>" refers to the k-th."""
    found = files.read("mmmu", files.find("mmmu", path, *FILES))
    return records.distinct([_row(record) for record in found], f"mmmu: {path}")


def _row(record: RawRecord) -> Question:
    name = record.text("id")
    kind = CHOICE if record.text("question_type") == CHOICE else OPEN
    options = prompts.lettered(_strings(record, "options") if kind == CHOICE else [])
    golds, question = _strings(record, "answer"), record.text("question")
    if kind == CHOICE:
        if not options:
            raise record.fault("'options' is empty")
        if golds != ["?"] and not set(golds) <= set(options):
            raise record.fault(f"answer {golds!r:.60} is none of {', '.join(options)}")
        text = prompts.with_options(question, list(options.values())) + "\n" + prompts.LETTER
    else:
        text = question + "\n" + prompts.SHORT
    fields = [f"image_{k}" for k in range(1, MOST_IMAGES + 1)]
    images = [record.image(field) for field in fields if record.has(field)]
    if not images:
        raise record.fault("has no image_1")
    return {
        "id": name,
        "image": images,
        "conversations": prompts.ask(text, len(images)),
        "answer": None if golds == ["?"] else golds,
        "type": kind,
        "options": options,
        **({"replies": tuple(options)} if options else {}),
        "subject": "_".join(name.split("_")[1:-1]) or name,  # validation_Art_Theory_3
    }


def _strings(record: RawRecord, name: str) -> list[str]:
    """A field as a list of strings. The hub stores it as the source text of a Python list."""
    value = record.field(name)
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise record.fault(f"{name!r} is not a list: {value!r:.60}") from None
    return dataclasses.replace(record, values={name: value}).texts(name)


def score(text: str, row: Question) -> float:
    """1.0 for the right letter, or for an open answer that contains a gold answer."""
    if row["type"] == CHOICE:
        return float(choice(text, row["options"], row["id"]) in row["answer"])
    return float(_is_right(open_answers(text), row["answer"]))


def choice(text: str, options: Mapping[str, str], name: str) -> str:
    """The letter that an answer names: as "(B)", else as " B ", else, in answers of more than five words, by an option's text.

    Punctuation at the ends of the answer is removed first, so that "B." is " B "; a "B." inside is no letter. If several
    letters are named, the last one counts. If none is, a random option is chosen; its seed is the question's id, so that the
    score depends neither on the order of the answers nor on the run.
    # Differs from MMMU-Benchmark/MMMU: there one generator is used for all answers in turn.
    """
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        text = text.strip(mark)
    text = f" {text} "
    for notation in ("({})", " {} "):
        found = [letter for letter in options if notation.format(letter) in text]
        if found:
            return _last(found, [text.rfind(notation.format(letter)) for letter in found])
    if len(text.split()) > 5:
        lower = text.lower()
        found = [letter for letter, option in options.items() if option.lower() in lower]
        if found:
            return _last(found, [lower.rfind(options[letter].lower()) for letter in found])
    return random.Random(f"{SEED}/{name}").choice(sorted(options))


def _last(letters: Sequence[str], offsets: Sequence[int]) -> str:
    """The letter that occurs at the largest offset, of equals the first."""
    return letters[offsets.index(max(offsets))]


def open_answers(text: str) -> list[str | float]:
    """The possible meanings of an open answer: the end of each sentence after a word of ANNOUNCE, and every number in it.

    Texts are lower case; numbers are rounded to 2 decimals.
    """
    text = text.strip().strip(".").lower()
    # The text is lower case already, so this splits at line ends only, as the official script does.
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    tails = []
    for index, sentence in enumerate(sentences):
        marks = ANNOUNCE + (("=",) if index == len(sentences) - 1 else ())
        shortest = ""
        for mark in marks:
            tail = sentence.split(mark)[-1].strip()
            if mark in sentence and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in PUNCTUATION:
            tails.append(shortest)
    tails = tails or [text]
    numbers = [n for tail in tails for pattern in NUMBERS for n in pattern.findall(tail)]
    return [value for part in (*tails, *numbers) for value in _normal(part)]


def _normal(text: str) -> list[str | float]:
    """A number with 2 decimals, or the lower-case text. A single character must have a blank before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def _is_right(said: Sequence[str | float], golds: Sequence[str]) -> bool:
    """Whether a gold text is part of a text of the answer, or a gold number equals a number of the answer."""
    wanted = [value for gold in golds for value in _normal(gold)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(
        any(t in value for t in texts) if isinstance(value, str) else value in wanted
        for value in said
    )


reduce = functools.partial(metrics.mean_by_parts, lambda row: [row["subject"], row["type"]])


def submission(rows: Sequence[Question], texts: Sequence[str]) -> dict[str, str | bytes]:
    """{id: letter or open answer}, which the server and the official main_eval_only.py take."""
    answers = {
        row["id"]: choice(text, row["options"], row["id"]) if row["type"] == CHOICE else text
        for row, text in zip(rows, texts, strict=True)
    }
    return {"mmmu_submission.json": json.dumps(answers, indent=1)}
