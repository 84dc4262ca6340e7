"""MMBench and MMBench-CN: a question counts when the answer is right in every rotation of its options.

Native files: the hub's en/dev-*.parquet and cn/dev-*.parquet, or a TSV with the columns index, question, hint, A..D,
answer, category, image (base64, or the index of a row with the same image), l2-category, split. The copy of question i
with its options rotated k times has index i + k * 1,000,000. The test files have no column "answer".

Letters are read by the rules of lmms-eval (tasks/mmbench/mmbench_evals.py). Where the rules find no letter, lmms-eval asks a
language model; here the answer is wrong. (The rules come from opencompass/VLMEvalKit, which now replaces the marks
.()[],:;!*#{} by blanks first, so that "**C**" is C there and no letter here.)
"""

from __future__ import annotations

import base64
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_jax.benchmarks import files, metrics, prompts, records
from vlm_jax.benchmarks.records import ImageSource, Question, RawRecord
from vlm_jax.files import Path, to_path
from vlm_jax.settings.checks import ConfigError

TSV = "[mM][mM][bB]ench*.tsv"
ROTATION = 1_000_000  # index of a rotated copy minus that of its original
OPTIONS = "ABCD"
CHINESE = "\n请直接回答选项字母。"  # haotian-liu/LLaVA, model_vqa_mmbench.py --lang cn
MOST_DIGITS = 18  # of an index
NO_OPTION = ("", "nan")  # a cell without an option; "None" and "NA" are options
INDEX_LENGTH = 64  # an image shorter than this is the index of the row that holds it
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
AROUND = (
    ("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","),
    (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip


def rows(path: str | Path) -> list[Question]:
    """The English questions. A directory must hold one mmbench*.tsv without "cn" in its name."""
    return _rows("mmbench", path, chinese=False)


def rows_cn(path: str | Path) -> list[Question]:
    """The Chinese questions. A directory must hold one mmbench*.tsv with "cn" in its name."""
    return _rows("mmbench_cn", path, chinese=True)


def _rows(name: str, path: str | Path, chinese: bool) -> list[Question]:
    instruction = CHINESE if chinese else prompts.LETTER
    found = list(files.read(name, _files(name, path, chinese)))
    made = [
        _row(record, image, instruction)
        for record, image in zip(found, _images(found), strict=True)
    ]
    circles = Counter(row["question"] for row in made)
    for row in made:
        row["rotations"] = circles[row["question"]]
    # The rotations of a question are adjacent, so that the first N rows contain few incomplete questions.
    made.sort(key=lambda row: (row["question"], int(row["id"])))
    return records.distinct(made, f"{name}: {path}")


def _files(name: str, path: str | Path, chinese: bool) -> list[Path]:
    found = files.find(name, path, TSV, f"{'cn' if chinese else 'en'}/dev-*.parquet")
    if to_path(path).is_file() or found[0].suffix == ".parquet":
        return found
    found = [file for file in found if ("cn" in file.stem.lower()) == chinese]
    if not found:
        kind = "with" if chinese else "without"
        raise ConfigError(f"{name}: {path} holds no TSV {kind} 'cn' in its name; name the file.")
    return [files.only(name, path, found)]


def _images(found: Sequence[RawRecord]) -> Iterator[ImageSource]:
    """One image per record. Rows with the same image share its bytes (4,377 rows have 1,164 images)."""
    by_index = {record.text("index"): record for record in found}
    decoded: dict[str, bytes] = {}
    for record in found:
        value = record.image("image")
        if not isinstance(value, str):
            yield value
            continue
        if len(value) < INDEX_LENGTH and value.isdecimal():
            if value not in by_index:
                raise record.fault(f"'image' names row {value}, which is not in the file")
            value = by_index[value].text("image")
        if value not in decoded:
            try:
                decoded[value] = base64.b64decode(value, validate=True)
            except ValueError as error:  # also for letters beyond ASCII
                raise record.fault(f"'image' is not base64: {error}") from error
        yield decoded[value]


def _row(record: RawRecord, image: ImageSource, instruction: str) -> Question:
    index = record.text("index")
    if not index.isascii() or not index.isdigit() or len(index) > MOST_DIGITS:
        raise record.fault(f"'index' must be a whole number, got {index!r:.60}")
    options: dict[str, str] = {}
    for letter in OPTIONS:
        option = str(record.values[letter]) if record.has(letter) else ""
        if option.strip().lower() in NO_OPTION:
            break  # a missing option ends the list
        options[letter] = option
    answer = record.optional("answer") or None
    if answer is not None and answer not in options:
        raise record.fault(f"answer {answer!r:.60} is none of {', '.join(options)}")
    question, hint = record.text("question"), record.optional("hint")
    text = prompts.with_options(f"{hint}\n{question}" if hint else question, list(options.values()))
    columns = ("index", "question", *OPTIONS, "answer", "split")
    return records.row(
        index,
        image,
        text + instruction,
        answer,
        options=options,
        replies=tuple(options),
        question=int(index) % ROTATION,
        category=record.optional("category"),
        l2=record.optional("l2-category") or record.optional("L2-category"),
        columns={name: record.values[name] or "" for name in columns if name in record.values},
    )


def letter(text: str, options: Mapping[str, str]) -> str | None:
    """The chosen letter A..E, or None.

    The notations A, then A. A, A: A) ... are tried in turn: the first one in which exactly one letter is a word of the text
    decides. A bare A among more than three words may be an article and does not decide. If no notation decides, the letter of
    the only option whose text is part of the answer is taken.
    """
    words = set(text.split())
    for before, after in AROUND:
        found = [c for c in "ABCDE" if before + c + after in words]
        if len(found) == 1:
            if not before + after and "A" in words and len(text.split()) > 3:
                continue
            return found[0]
    named = [c for c, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def score(text: str, row: Question) -> float:
    """1.0 if this rotation is answered with the right letter."""
    return float(letter(text, row["options"]) == row["answer"])


def reduce(scores: Sequence[float], rows: Sequence[Question]) -> dict[str, Any]:
    """Score: the share of questions with all rotations right (of originals where the file has no rotations).

    details: "circular" (where there are rotations), "vanilla" (originals alone), one per category, "l2.<name>" per
    l2-category. A question with unanswered rotations is left out; n counts answers. Raises ConfigError if none is left.
    """
    circles: dict[int, list[float]] = defaultdict(list)
    first: dict[int, Question] = {}
    for value, row in zip(scores, rows, strict=True):
        circles[row["question"]].append(value)
        first.setdefault(row["question"], row)
    whole = {q: min(c) for q, c in circles.items() if len(c) == first[q]["rotations"]}
    if not whole:
        raise ConfigError(
            f"mmbench: none of the {len(circles)} questions has all its rotations answered; ask more rows (eval.limit)."
        )
    names = [(first[q]["category"], first[q]["l2"] and f"l2.{first[q]['l2']}") for q in whole]
    by_part = metrics.means(list(whole.values()), (filter(None, pair) for pair in names))
    main = sum(whole.values()) / len(whole)
    originals = [s for s, row in zip(scores, rows, strict=True) if int(row["id"]) < ROTATION]
    details = {"circular": main} if any(row["rotations"] > 1 for row in rows) else {}
    if originals:
        details["vanilla"] = sum(originals) / len(originals)
    return {"score": main, "error": 1.0 - main, "n": len(scores), "details": {**details, **by_part}}


def submission(rows: Sequence[Question], texts: Sequence[str]) -> dict[str, str | bytes]:
    """The spreadsheet for the server at mmbench.opencompass.org.cn: the columns of the TSV and "prediction"."""
    present = list(rows[0]["columns"]) if rows else []
    before = [name for name in present if name in ("index", "question", *OPTIONS)]
    columns = [*before, "prediction", *(name for name in present if name not in before)]
    lines = [
        [{**row["columns"], "index": int(row["id"]), "prediction": text}[name] for name in columns]
        for row, text in zip(rows, texts, strict=True)
    ]
    return {"submission.xlsx": _spreadsheet([columns, *lines])}


def _spreadsheet(lines: Sequence[Sequence[str | int]]) -> bytes:
    """A workbook with one sheet. An int becomes a number, a str always a text ("=1+1" is no formula).

    Characters that XML cannot represent are removed. openpyxl cuts a text after 32,767 characters, the most that Excel allows.
    """
    import openpyxl  # takes 0.2 s to import, so only for the upload

    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    for number, line in enumerate(lines, start=1):
        for column, value in enumerate(line, start=1):
            plain = value if isinstance(value, int) else NOT_XML.sub("", value)
            cell = sheet.cell(number, column, plain)
            cell.data_type = "n" if isinstance(value, int) else "s"
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()
