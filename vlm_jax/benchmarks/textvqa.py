"""TextVQA validation: questions about text in pictures, asked alone or with OCR tokens in the prompt.

Files: TextVQA_0.5.1_val.json {"data": [{"question_id", "image_id", "question", "answers" x 10}]}; for the second variant
TextVQA_Rosetta_OCR_v0.2_val.json {"data": [{"image_id", "ocr_tokens"}]}, or LLaVA's question file, whose prompts contain the
same tokens; train_images/<image_id>.jpg. Or the hub's parquet files validation-*.parquet, which contain all of these
fields. The two variants are different benchmarks: LLaVA-1.5-7B scores 46.07 alone and 58.27 with OCR tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm_jax.benchmarks import files, prompts, records, vqa
from vlm_jax.benchmarks.records import ImageSource, Question, RawRecord
from vlm_jax.files import Path

QUESTIONS, TOKENS = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json"
LLAVA = "llava_textvqa_val_v051_ocr.jsonl"
IMAGES = "train_images"
LINE = "\nReference OCR token: "


def rows(annotations: str | Path) -> list[Question]:
    """The question alone. Ids are the native question_id; the test file has no answers."""
    return _rows("textvqa", _find("textvqa", annotations), None)


def rows_with_tokens(annotations: str | Path) -> list[Question]:
    """The question and "Reference OCR token: t1, t2": those of Rosetta, in its order, as LLaVA-1.5 asked."""
    found = _find("textvqa_ocr", annotations)
    if found[0].suffix == ".parquet":
        return _rows("textvqa_ocr", found, {})
    file = files.find_one("textvqa_ocr", found[0].parent, TOKENS, LLAVA)
    return _rows(
        "textvqa_ocr", found, _llava_tokens(file) if file.name == LLAVA else _rosetta(file)
    )


def _find(name: str, annotations: str | Path) -> list[Path]:
    """The official file, or else the hub's."""
    return files.find(name, annotations, QUESTIONS, *files.shards("validation"))


def _rosetta(file: Path) -> dict[str, str]:
    """image_id -> its tokens, joined."""
    found = files.read("textvqa_ocr", [file], inside="data")
    return {record.text("image_id"): _joined(record) for record in found}


def _joined(record: RawRecord) -> str:
    return ", ".join(record.texts("ocr_tokens"))


def _llava_tokens(file: Path) -> dict[str, str]:
    """image_id, which that file calls question_id -> the text between LINE and the prompt's ending."""
    tokens = {}
    for record in files.read_lines("textvqa_ocr", file):
        _, line, rest = record.text("text").partition(LINE)
        if not line or not rest.endswith(prompts.SHORT):
            raise record.fault(f"'text' has no line {LINE.strip()!r}")
        tokens[record.text("question_id")] = rest.removesuffix(prompts.SHORT)
    return tokens


def _rows(name: str, found: Sequence[Path], tokens: Mapping[str, str] | None) -> list[Question]:
    """tokens: by image_id, for records that have none; None: the prompt shows no OCR tokens."""
    made = [_row(r, tokens) for r in files.read(name, found, inside="data")]
    return records.distinct(made, f"{name}: {found[0]}")


def _row(record: RawRecord, tokens: Mapping[str, str] | None) -> Question:
    line = "" if tokens is None else LINE + _tokens(record, tokens)
    question = record.text("question") + line + prompts.SHORT
    golds = vqa.human_answers(record) if record.has("answers") else None
    question_id = record.text("question_id")
    more = {"question_id": record.values["question_id"]}
    if record.has("image_id"):
        more["llava_id"] = record.text("image_id")
    return records.row(question_id, _image(record), question, golds, **more)


def _image(record: RawRecord) -> ImageSource:
    hub = record.has("image")
    return record.image("image") if hub else f"{IMAGES}/{record.text('image_id')}.jpg"


def _tokens(record: RawRecord, tokens: Mapping[str, str]) -> str:
    if record.has("ocr_tokens"):
        return _joined(record)
    image_id = record.text("image_id")
    if image_id not in tokens:
        raise record.fault(f"there are no OCR tokens of image {image_id!r}")
    return tokens[image_id]


def submission(rows: Sequence[Question], texts: Sequence[str]) -> dict[str, str | bytes]:
    return {"textvqa_answers.json": vqa.upload("question_id", rows, "question_id", texts)}
