"""ChartQA, DocVQA and InfographicVQA: relaxed accuracy and ANLS from the official rules, by hand."""

import json

import native_files
import pytest
from bench import asked, fuzz, score
from native_files import DOCUMENTS, embedded, png, write_json, write_parquet

from vlm_jax import benchmarks
from vlm_jax.benchmarks import chartqa, docvqa
from vlm_jax.settings.checks import ConfigError


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("10", "10", 1),
        ("10.5", "10", 1),  # exactly 5 % off
        ("10.51", "10", 0),
        ("9.5", "10", 1),
        ("-10", "10", 0),
        ("-9.6", "-10", 1),
        ("50%", "0.5", 1),
        ("0.51", "50%", 1),
        ("50", "50%", 0),  # a percentage is its hundredth
        ("0", "0", 1),
        ("0.0", "0", 0),  # a gold 0 is compared as text
        ("1,000", "1000", 0),  # a comma makes it text
        ("1,000", "1,000", 1),
        ("1e1", "10", 1),
        ("yes", "Yes", 1),
        ("Yes.", "Yes", 0),
        (" Yes\n", "Yes", 1),
        ("10 cm", "10", 0),
        ("nan", "10", 0),
        ("inf", "10", 0),
        ("", "10", 0),
        ("%", "%", 1),
        ("2010", "2009", 1),  # a year is a number, too
        ("Groß", "groß", 1),
    ],
)
def test_relaxed_accuracy_allows_a_twentieth_of_the_gold_number(text, gold, expected):
    assert chartqa.score(text, {"answer": gold}) == expected


@pytest.fixture
def charts(tmp_path):
    return native_files.chartqa(tmp_path)


def test_chartqa_counts_rows_in_each_split(charts):
    rows = benchmarks.get("chartqa").rows(charts)
    assert [row["id"] for row in rows] == ["human/0", "human/1", "augmented/0"]
    assert [row["image"] for row in rows] == ["png/1.png", "png/1.png", "png/2.png"]
    assert asked(rows[0]) == "How many?\nAnswer the question with a single word."


def test_chartqa_is_the_mean_of_all_questions_and_names_both_splits(charts):
    rows = benchmarks.get("chartqa").rows(charts)
    result = score("chartqa", rows, ["14.5", "no", "0.2"])
    assert result["score"] == pytest.approx(2 / 3)
    assert result["details"] == {"human": 0.5, "augmented": 1.0}
    fuzz("chartqa", rows)


def test_chartqa_reads_the_hubs_parquet_and_one_file_alone(charts):
    records = [
        {"type": f"{split}_test", "question": q, "answer": "14", "image": embedded()}
        for split, q in [("human", "a"), ("augmented", "b"), ("human", "c")]
    ]  # fmt: skip
    write_parquet(charts / "hub" / "data" / "test-00000-of-00001.parquet", records)
    rows = benchmarks.get("chartqa").rows(charts / "hub")
    found = [(row["id"], asked(row)[0], row["image"]()) for row in rows]
    assert found == [("human/0", "a", png()), ("human/1", "c", png()), ("augmented/0", "b", png())]
    alone = benchmarks.get("chartqa").rows(charts / "test_augmented.json")
    assert [row["id"] for row in alone] == ["augmented/0"]


def test_a_missing_split_and_a_bad_record_are_named(charts):
    write_json(charts / "test_human.json", [{"imgname": "1.png", "query": "How many?"}])
    with pytest.raises(ConfigError, match=r"test_human.json row 0: has no 'label' or 'answer'"):
        benchmarks.get("chartqa").rows(charts)
    (charts / "test_human.json").unlink()
    with pytest.raises(ConfigError, match=r"has no test_human.json"):
        benchmarks.get("chartqa").rows(charts)


@pytest.mark.parametrize(
    ("text", "golds", "expected"),
    [
        ("Paris", ["paris"], 1.0),
        ("  New   York ", ["new york"], 1.0),
        ("pariz", ["Paris"], 0.8),
        ("paris france", ["paris"], 0.0),  # 7 edits of 12
        ("abcd", ["ab"], 0.5),  # exactly one half is kept
        ("abcde", ["ab"], 0.0),  # 0.4
        ("abc", ["xyz", "abd"], pytest.approx(2 / 3)),
        ("", ["paris"], 0.0),
        ("", [""], 1.0),
        ("$1,000", ["$1000"], pytest.approx(5 / 6)),
        ("10 %", ["10%"], 0.75),
        ("été", ["ete"], 0.0),  # 2 of 3 differ
        ("漢字", ["漢字"], 1.0),
        ("yes.", ["yes"], 0.75),
        ("pariz  ", ["Paris"], pytest.approx(6 / 7)),  # one edit of the seven characters written
        ("ab  cd x", ["ab cd y"], 0.875),
        ("  New   York ", ["new yorx"], pytest.approx(12 / 13)),
        ("strasze", ["straße"], pytest.approx(5 / 7)),  # in upper case the gold answer has seven
        ("ab", ["", "a       b"], pytest.approx(8 / 9)),
    ],
)
def test_anls_is_the_similarity_with_the_nearest_gold_answer_or_nothing(text, golds, expected):
    assert docvqa.anls(text, golds) == expected


def test_docvqa_takes_validation_before_test_and_averages_anls(tmp_path):
    hidden = [{k: v for k, v in record.items() if k != "answers"} for record in DOCUMENTS]
    write_json(tmp_path / "test_v1.0.json", {"dataset_name": "docvqa", "data": hidden})
    test = benchmarks.get("docvqa").rows(tmp_path)
    assert [row["answer"] for row in test] == [None, None]
    upload = benchmarks.submission("docvqa", test, [("12", "b\u00e9"), ("11", "a")])
    assert json.loads(upload["docvqa_submission.json"]) == [
        {"questionId": 11, "answer": "a"},
        {"questionId": 12, "answer": "b\u00e9"},
    ]
    rows = benchmarks.get("docvqa").rows(native_files.docvqa(tmp_path))
    assert [(row["id"], row["image"]) for row in rows] == [
        ("11", "documents/a_1.png"),
        ("12", "documents/a_1.png"),
    ]
    assert asked(rows[0]) == "What?\nAnswer the question using a single word or phrase."
    assert score("docvqa", rows, ["cat", "1998"])["score"] == 0.875
    fuzz("docvqa", rows)
    write_json(tmp_path / "val_v1.0.json", {"data": DOCUMENTS})
    with pytest.raises(ConfigError, match=r"holds val_v1.0.json, val_v1.0_withQT.json; name the"):
        benchmarks.get("docvqa").rows(tmp_path)


def test_infovqa_finds_its_images_in_the_archives_folder(tmp_path):
    rows = benchmarks.get("infovqa").rows(native_files.infovqa(tmp_path))
    assert rows[0]["image"] == "infographicsvqa_images/2.jpeg"
    assert score("infovqa", rows, ["Anna"])["score"] == 0.75
    (upload,) = benchmarks.submission("infovqa", rows, [("65718", "Ann")])
    assert upload == "infovqa_submission.json"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"questions": []}, "json: has no 'data'"),
        ({"data": [3]}, "row 0: must be an object, got 3"),
        ({"data": [{**DOCUMENTS[0], "answers": []}]}, "row 0: 'answers' is empty"),
        ({"data": [{**DOCUMENTS[0], "answers": [["x"]]}]}, "must be a list of strings"),
        ({"data": [{**DOCUMENTS[0], "question": None}]}, "row 0: has no 'question'"),
        ({"data": [{**DOCUMENTS[0], "image": 3}]}, "must be an image or its path, got 3"),
        ({"data": [DOCUMENTS[0], DOCUMENTS[0]]}, "two questions with id '11'"),
        ({"data": []}, "holds no question"),
    ],
)
def test_a_bad_docvqa_file_is_named(tmp_path, content, match):
    write_json(tmp_path / "val_v1.0.json", content)
    with pytest.raises(ConfigError, match=match):
        benchmarks.get("docvqa").rows(tmp_path)
    (tmp_path / "val_v1.0.json").write_text("{")
    with pytest.raises(ConfigError, match=r"val_v1.0.json: is not valid JSON"):
        benchmarks.get("docvqa").rows(tmp_path)


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "validation-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"of-00001.parquet: is not valid parquet"):
        benchmarks.get("docvqa").rows(tmp_path)
