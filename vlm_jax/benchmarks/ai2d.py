"""AI2D: science diagrams with four options.

Native files: the hub's test-*.parquet, or ai2d_test.json(l), with "question", "options", "answer" (index of the right
option, from 0), "image". Scored as lmms-eval does (tasks/ai2d: its filter, then exact match without case and punctuation).
"""

from __future__ import annotations

import re
import string

from vlm_jax.benchmarks import files, prompts, records
from vlm_jax.benchmarks.records import Question, RawRecord
from vlm_jax.files import Path

FILES = (*files.shards("test"), "ai2d_test.json*")
LEADING = re.compile(r"\s*([A-Z])\.")  # "B. a leaf"; a lower-case letter does not count
PUNCTUATION = str.maketrans("", "", string.punctuation)


def rows(path: str | Path) -> list[Question]:
    """Ids are row numbers from 0."""
    found = files.read("ai2d", files.find("ai2d", path, *FILES))
    return records.distinct([_row(record, n) for n, record in enumerate(found)], f"ai2d: {path}")


def _row(record: RawRecord, number: int) -> Question:
    options, answer = record.texts("options"), record.text("answer")
    if answer not in map(str, range(len(options))):
        raise record.fault(f"'answer' must be an index 0..{len(options) - 1}, got {answer!r:.60}")
    text = prompts.with_options(record.text("question"), options) + prompts.LETTER
    letters = tuple(prompts.lettered(options))
    image = record.image("image")
    return records.row(str(number), image, text, letters[int(answer)], replies=letters)


def score(text: str, row: Question) -> float:
    """1.0 for the right letter.

    The letter is a capital at the start with a period after it ("B. a leaf"), or else the whole text without punctuation, in
    either case ("(b)"). "b. a leaf" is therefore wrong, and so is "A .", because its blank stays. White space around the text
    is removed first, as our decoder and most of lmms-eval's models do.
    """
    text = text.strip()
    leading = LEADING.match(text)
    said = leading[1] if leading else text.translate(PUNCTUATION)
    return float(said.lower() == row["answer"].lower())
