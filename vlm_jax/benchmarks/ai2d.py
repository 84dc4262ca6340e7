"""AI2D: science diagrams with four options.

Native files: the hub's test-*.parquet, or ai2d_test.json(l), with "question", "options", "answer" (index of the right
option, from 0), "image". Scored as lmms-eval does: the answer is the letter, whatever its case and punctuation.
"""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

from vlm_jax.benchmarks import native, prompts, tabular
from vlm_jax.config import ConfigError

FILES = ("test-*.parquet", "data/test-*.parquet", "ai2d_test.json*")
LEADING = re.compile(r"\s*([A-Za-z])\.")  # "B. a leaf"
PUNCTUATION = str.maketrans("", "", string.punctuation)

Row = dict[str, Any]


def rows(path: str | Path) -> list[Row]:
    """Ids are row numbers from 0."""
    located = tabular.read("ai2d", path, FILES)
    return native.distinct([_row(pair, number) for number, pair in enumerate(located)], Path(path))


def _row(located: tabular.Located, number: int) -> Row:
    options = tabular.texts(located, "options")
    answer = tabular.text(located, "answer")
    if not answer.isascii() or not answer.isdigit() or int(answer) >= len(options):
        raise ConfigError(
            f"{located[0]}: 'answer' must be an index 0..{len(options) - 1}, got {answer!r:.60}."
        )
    text = prompts.with_options(tabular.text(located, "question"), options) + prompts.LETTER
    letters = tuple(prompts.lettered(options))
    return {
        "id": str(number),
        "image": tabular.image(located, "image"),
        "conversations": prompts.ask(text),
        "answer": letters[int(answer)],
        "replies": letters,
    }


def score(text: str, row: Row) -> float:
    """1.0 for the right letter, alone or leading ("b.", "B. a leaf"); a letter with more behind it is wrong."""
    leading = LEADING.match(text)
    said = leading[1] if leading else text.translate(PUNCTUATION).strip()
    return float(said.upper() == row["answer"])
