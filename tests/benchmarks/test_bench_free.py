"""OCRBench, and the two benchmarks whose answers are judged elsewhere: MM-Vet and LLaVA-Bench."""

import json

import native_files
import pytest
from bench import asked, fuzz, score
from native_files import embedded, png, write_parquet

from vlm_jax import benchmarks
from vlm_jax.benchmarks import ocrbench
from vlm_jax.settings.checks import ConfigError


@pytest.mark.parametrize(
    ("dataset", "text", "golds", "expected"),
    [
        ("IIIT5K", "JOINT", ["joint"], 1),
        ("IIIT5K", "The word is Joint.", ["JOINT"], 1),
        ("IIIT5K", "JOIN T", ["JOINT"], 0),
        ("IIIT5K", "", ["JOINT"], 0),
        ("DocVQA", "first\nline", ["first line"], 1),
        ("DocVQA", "first line", ["first\nline "], 1),
        ("DocVQA", "2", ["1", "2"], 1),
        ("DocVQA", "12", ["2"], 1),  # contained is enough
        ("DocVQA", "1, 000", ["1,000"], 0),
        ("DocVQA", "ÉTÉ", ["été"], 1),
        ("HME100k", "x ^ 2 + 1", ["x^2+1"], 1),
        ("HME100k", "x^2 +\n1", ["x ^ 2 + 1"], 1),
        ("HME100k", "X^2+1", ["x^2+1"], 0),  # case is kept
        ("HME100k", "y=x^2", ["x ^ 2"], 1),
    ],
)
def test_ocrbench_looks_for_a_gold_answer_in_the_answer(dataset, text, golds, expected):
    assert ocrbench.score(text, {"dataset": dataset, "answer": golds}) == expected


def test_ocrbench_asks_the_bare_question_and_scores_by_type(tmp_path):
    rows = benchmarks.get("ocrbench").rows(native_files.ocrbench(tmp_path))
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    assert (asked(rows[0]), rows[0]["image"]) == ("What?", "OCRBench_Images/IIIT5K/1.png")
    result = score("ocrbench", rows, ["joint", "3", "no"])
    assert result["score"] == pytest.approx(1 / 3)
    assert result["details"] == {"Key Information Extraction": 0.0, "Regular Text Recognition": 0.5}
    fuzz("ocrbench", rows)


def test_ocrbench_reads_the_hubs_parquet(tmp_path):
    record = {
        "dataset": "HME100k", "question_type": "Handwritten", "question": "Q", "answer": ["x y"],
        "image": embedded(2),
    }  # fmt: skip
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [record])
    rows = benchmarks.get("ocrbench").rows(tmp_path)
    assert (rows[0]["image"](), rows[0]["answer"]) == (png(2), ["x y"])
    assert score("ocrbench", rows, ["xy"])["score"] == 1.0


def test_mmvet_writes_the_answers_that_its_judge_reads(tmp_path):
    rows = benchmarks.get("mmvet").rows(native_files.mmvet(tmp_path))
    assert [(row["id"], row["image"], asked(row)) for row in rows] == [
        ("v1_0", "images/v1_0.png", "Q0"),
        ("v1_1", "images/v1_1.png", "Q1"),
    ]
    answers = [("v1_1", "b\u2028é"), ("v1_0", "a")]
    upload = benchmarks.submission("mmvet", rows, answers)
    assert json.loads(upload["mm-vet_answers.json"]) == {"v1_0": "a", "v1_1": "b\u2028é"}
    with pytest.raises(ConfigError, match=r"upload mm-vet_answers.json"):
        benchmarks.score_answers("mmvet", rows, answers)


def test_llava_bench_writes_the_answers_that_its_judge_reads(tmp_path):
    rows = benchmarks.get("llava_bench").rows(native_files.llava_bench(tmp_path))
    assert [(row["id"], row["image"], asked(row)) for row in rows] == [
        ("0", "images/001.jpg", "Q0"),
        ("1", "images/001.jpg", "Q1"),
    ]
    upload = benchmarks.submission("llava_bench", rows, [("1", "b\nc"), ("0", "a")])
    written = [json.loads(line) for line in upload["answers.jsonl"].splitlines()]
    assert [(w["question_id"], w["prompt"], w["text"]) for w in written] == [
        (0, "Q0", "a"),
        (1, "Q1", "b\nc"),
    ]
    with pytest.raises(ConfigError, match=r"upload answers.jsonl"):
        benchmarks.score_answers("llava_bench", rows, [("1", "b"), ("0", "a")])
