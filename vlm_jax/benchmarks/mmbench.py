"""MMBench and MMBench-CN: a question counts when the answer is right in every rotation of its options.

Native files: the hub's en/dev-*.parquet and cn/dev-*.parquet, or a TSV with the columns index, question, hint, A..D, answer, category, image (base64, or the index of a
row with the same image), l2-category, split. The copy of question i with its options rotated k times has index
i + k * 1,000,000. The test files have no column "answer".

Letters are read as opencompass/VLMEvalKit does without its ChatGPT judge, which gets what these rules leave open; here
that is wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.benchmarks import metrics, native, prompts, spreadsheet, tabular
from vlm_jax.config import ConfigError

TSV = "[mM][mM][bB]ench*.tsv"
ROTATION = 1_000_000  # index of a rotated copy minus that of its original
OPTIONS = "ABCD"
CHINESE = "\n请直接回答选项字母。"  # haotian-liu/LLaVA, model_vqa_mmbench.py --lang cn
INDEX_LENGTH = 64  # an image shorter than this is the index of the row that holds it
AROUND = (
    ("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","),
    (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip

Row = dict[str, Any]


def rows(path: str | Path) -> list[Row]:
    """The English questions. A directory must hold one mmbench*.tsv without "cn" in its name."""
    return _rows("mmbench", path, chinese=False)


def rows_cn(path: str | Path) -> list[Row]:
    """The Chinese questions. A directory must hold one mmbench*.tsv with "cn" in its name."""
    return _rows("mmbench_cn", path, chinese=True)


def _rows(name: str, path: str | Path, chinese: bool) -> list[Row]:
    instruction = CHINESE if chinese else prompts.LETTER
    records = [
        pair for file in _files(name, path, chinese) for pair in tabular.read(name, file, ())
    ]
    made = [
        _row(located, image, instruction)
        for located, image in zip(records, _images(records), strict=True)
    ]
    circles = Counter(row["question"] for row in made)
    for row in made:
        row["rotations"] = circles[row["question"]]
    # A circle stands together, so that the first N rows hold whole ones.
    return native.distinct(
        sorted(made, key=lambda row: (row["question"], int(row["id"]))), Path(path)
    )


def _files(name: str, path: str | Path, chinese: bool) -> list[Path]:
    found = tabular.find(name, path, [TSV, f"{'cn' if chinese else 'en'}/dev-*.parquet"])
    if Path(path).is_file() or found[0].suffix == ".parquet":
        return found
    found = [file for file in found if ("cn" in file.stem.lower()) == chinese]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ConfigError(f"{name}: {path} must hold one such TSV, found {names}; name the file.")
    return found


def _images(records: Sequence[tabular.Located]) -> Iterator[bytes]:
    """One per record; rows that repeat an image share its bytes (4,377 rows show 1,164 images)."""
    by_index = {tabular.text(located, "index"): located for located in records}
    decoded: dict[str, bytes] = {}
    for located in records:
        value = tabular.image(located, "image")
        if isinstance(value, bytes):
            yield value
            continue
        if len(value) < INDEX_LENGTH and value in by_index:
            value = tabular.text(by_index[value], "image")
        if value not in decoded:
            decoded[value] = tabular.decode(located[0], value)
        yield decoded[value]


def _row(located: tabular.Located, image: bytes, instruction: str) -> Row:
    where = located[0]
    index = tabular.text(located, "index")
    if not index.isascii() or not index.isdigit():
        raise ConfigError(f"{where}: 'index' must be a whole number, got {index!r:.60}.")
    options: dict[str, str] = {}
    for letter in OPTIONS:
        option = tabular.optional(located, letter)
        if not option:
            break  # a missing option ends the list
        options[letter] = option
    answer = tabular.optional(located, "answer") or None
    if answer is not None and answer not in options:
        raise ConfigError(f"{where}: answer {answer!r:.60} is none of {', '.join(options)}.")
    question, hint = tabular.text(located, "question"), tabular.optional(located, "hint")
    text = prompts.with_options(f"{hint}\n{question}" if hint else question, list(options.values()))
    columns = ("index", "question", *OPTIONS, "answer", "split")
    return {
        "id": index,
        "image": image,
        "conversations": prompts.ask(text + instruction),
        "answer": answer,
        "options": options,
        "replies": tuple(options),
        "question": int(index) % ROTATION,
        "category": tabular.optional(located, "category"),
        "l2": tabular.optional(located, "l2-category") or tabular.optional(located, "L2-category"),
        "columns": {name: located[1][name] or "" for name in columns if name in located[1]},
    }


def letter(text: str, options: Mapping[str, str]) -> str | None:
    """The chosen letter A..E, or None.

    The first notation (A, then A. A, A: A) ...) in which exactly one letter is a word of the text; a lone A among more
    than three words may be an article and decides nothing. Then the only option whose text is part of the answer.
    """
    words = set(text.split())
    for before, after in AROUND:
        found = [c for c in "ABCDE" if before + c + after in words]
        if len(found) == 1:
            if not before + after and "A" in words and len(text.split()) > 3:
                break
            return found[0]
    named = [c for c, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def score(text: str, row: Row) -> float:
    """1.0 if this rotation is answered with the right letter."""
    return float(letter(text, row["options"]) == row["answer"])


def reduce(scores: Sequence[float], rows: Sequence[Row]) -> dict[str, Any]:
    """Score: the share of questions with all rotations right (of originals where the file has no rotations).

    details: "circular" (where there are rotations), "vanilla" (originals alone), one per category, "l2.<name>" per
    l2-category. A question with unanswered rotations is left out; n counts answers. Raises ConfigError if none is left.
    """
    circles: dict[int, list[float]] = defaultdict(list)
    first: dict[int, Row] = {}
    for value, row in zip(scores, rows, strict=True):
        circles[row["question"]].append(value)
        first.setdefault(row["question"], row)
    whole = {q: min(c) for q, c in circles.items() if len(c) == first[q]["rotations"]}
    if not whole:
        raise ConfigError(
            f"mmbench: none of the {len(circles)} questions has all its rotations answered; answer more rows."
        )
    names = [(first[q]["category"], first[q]["l2"] and f"l2.{first[q]['l2']}") for q in whole]
    by_part = metrics.means(list(whole.values()), (filter(None, pair) for pair in names))
    main = sum(whole.values()) / len(whole)
    originals = [s for s, row in zip(scores, rows, strict=True) if int(row["id"]) < ROTATION]
    details = {"circular": main} if any(row["rotations"] > 1 for row in rows) else {}
    if originals:
        details["vanilla"] = sum(originals) / len(originals)
    return {"score": main, "error": 1.0 - main, "n": len(scores), "details": {**details, **by_part}}


def submission(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, str | bytes]:
    """The spreadsheet that the server at mmbench.opencompass.org.cn takes: the TSV's columns and "prediction"."""
    present = list(rows[0]["columns"]) if rows else []
    before = [name for name in present if name in ("index", "question", *OPTIONS)]
    columns = [*before, "prediction", *(name for name in present if name not in before)]
    lines = [
        [{**row["columns"], "index": int(row["id"]), "prediction": text}[name] for name in columns]
        for row, text in zip(rows, texts, strict=True)
    ]
    return {"submission.xlsx": spreadsheet.xlsx(columns, lines)}
