"""What is wrong in a benchmark's file is one line that names file and place; a hidden gold answer hides no other."""

import json

import native_files
import pyarrow
import pyarrow.parquet
import pytest
from native_files import FIXTURES, dialogue, write_json, write_lines, write_parquet

from vlm_jax import benchmarks, evaluate
from vlm_jax.benchmarks import files, llava, predictions
from vlm_jax.settings.checks import ConfigError

# Those whose fixture is text, and the file that holds the questions.
TEXTS = {
    "llava": "any.json", "mini_ocr": "ocr_test.json", "llava_questions": "llava_mme.jsonl",
    "gqa": "testdev_balanced_questions.json", "pope": "coco_pope_popular.json", "mme": "count/0001.txt",
    "scienceqa": "problems.json", "textvqa": "TextVQA_0.5.1_val.json",
    "textvqa_ocr": "TextVQA_Rosetta_OCR_v0.2_val.json", "vqav2": "v2_mscoco_val2014_annotations.json",
    "vizwiz": "val.json", "mmbench": "mmbench_dev_20230712.tsv", "mathvista": "testmini.json",
    "chartqa": "test_human.json", "docvqa": "val_v1.0_withQT.json",
    "infovqa": "infographicsVQA_val_v1.0_withQT.json", "seed": "SEED-Bench.json", "ocrbench": "OCRBench.json",
    "mmvet": "mm-vet.json", "llava_bench": "questions.jsonl",
}  # fmt: skip


def without_pictures(rows):
    return [{**row, "image": 0} for row in rows]


@pytest.mark.parametrize("name", TEXTS)
def test_a_byte_order_mark_changes_nothing_and_other_encodings_are_named(tmp_path, name):
    FIXTURES[name](tmp_path)
    rows, path = benchmarks.get(name).rows(tmp_path), tmp_path / TEXTS[name]
    data = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + data)
    assert without_pictures(benchmarks.get(name).rows(tmp_path)) == without_pictures(rows)
    for bad, match in [
        (data.decode().encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (data + b"\n\n\xff", "is not UTF-8: invalid start byte .*line"),
    ]:
        path.write_bytes(bad)
        with pytest.raises(ConfigError, match=f"{path.name}: {match}") as error:
            benchmarks.get(name).rows(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [n for n in TEXTS if n not in ("mme", "mmbench", "textvqa_ocr")])
def test_deep_nesting_is_one_line(tmp_path, name):
    FIXTURES[name](tmp_path)
    path = tmp_path / TEXTS[name]
    for depth in (300, 900, 100_000):
        deep = '[{"id": "1", "x": ' + "[" * depth + "]" * depth + "}]"
        path.write_text(deep)
        with pytest.raises(ConfigError) as error:
            benchmarks.get(name).rows(tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_deep_value_where_a_text_is_due_is_one_line(tmp_path):
    value = "x"
    for _ in range(5000):
        value = [value]
    record = files.RawRecord("gqa: f row 3", "", {"answer": value})
    with pytest.raises(ConfigError, match="row 3: 'answer' must be a string, got"):
        record.text("answer")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.json", '{"1": {"k": 1}, "1": {"k": 2}}', "is not valid JSON: an object has two values named '1'"),
        ("a.jsonl", '{"k": 1}\n{"k": 1, "k": 2}', "line 2: is not valid JSON: an object has two values named 'k'"),
        ("a.tsv", "k\tj\tk\n1\t2\t3\n", "has two columns named 'k'"),
        ("a.tsv", 'k\tj\n0\t1\n1\t"2\n3\t4\n', "row 1: has a quote that is not closed"),
    ],
)  # fmt: skip
def test_what_would_be_lost_without_a_word_is_named(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"{name}.*{match}"):
        list(files.read("x", [tmp_path / name]))


def test_half_a_pair_of_surrogates_is_no_text(tmp_path):
    write_json(tmp_path / "testdev_balanced_questions.json", {})
    path = tmp_path / "testdev_balanced_questions.json"
    path.write_text('{"5": {"imageId": "n", "question": "\\ud83d?", "answer": "no"}}')
    with pytest.raises(ConfigError, match="row 5: 'question' is no Unicode text"):
        benchmarks.get("gqa").rows(tmp_path)


def test_a_number_that_is_none_counts_as_missing():
    record = files.RawRecord("x: f row 0", "", {"a": float("nan"), "b": [float("nan")], "c": True})
    assert not record.has("a")
    with pytest.raises(ConfigError, match="row 0: has no 'a'"):
        record.text("a")
    with pytest.raises(ConfigError, match="'b' must be a list of strings"):
        record.texts("b")


@pytest.mark.parametrize("kept", [0, 3, 200, -1, -9])
def test_a_truncated_parquet_file_is_one_line(tmp_path, kept):
    path = tmp_path / "test-00000-of-00001.parquet"
    write_parquet(path, [native_files.diagram()] * 50)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"of-00001.parquet: is not valid parquet: ") as error:
        benchmarks.get("ai2d").rows(tmp_path)
    assert "\n" not in str(error.value)


def test_pages_of_a_parquet_file_that_are_damaged_are_one_line(tmp_path):
    path = tmp_path / "test-00000-of-00001.parquet"
    record = {k: v for k, v in native_files.diagram(image="1.png").items()}
    rows = [record | {"question": f"question {i}"} for i in range(1000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="snappy")
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="is not valid parquet"):
        benchmarks.get("ai2d").rows(tmp_path)


def test_text_in_parquet_that_is_not_utf8_is_one_line(tmp_path):
    column = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
    )
    path = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": column}), path)
    with pytest.raises(ConfigError, match=r"is not valid parquet: .*utf-8"):
        benchmarks.get("ai2d").rows(tmp_path)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"id": "b", "text": "\xff"}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"id": "b", "text": null}', "must be {"),
        (b'{"id": "b", "text": 3}', "must be {"),
        (b"3", "must be an object, got 3"),
    ],
)
def test_a_bad_line_of_predictions_is_one_line(tmp_path, line, match):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "text": "b"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=f"predictions.jsonl:2 {match}") as error:
        predictions.read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("value", [3, ["a"], {"a": 1}, True, 1.5])
@pytest.mark.parametrize("name", ["llava", "mini_ocr"])
def test_an_answer_that_is_no_text_is_named(tmp_path, name, value, capsys):
    native_files.mini(tmp_path)
    (tmp_path / "reasoning_test.json").unlink()
    write_json(tmp_path / "ocr_test.json", [dialogue("Q", "A"), dialogue("Q", value)])
    write_lines(tmp_path / "p", [])
    command = ["--score", f"--benchmark={name}", f"--predictions={tmp_path / 'p'}", f"--annotations={tmp_path}"]  # fmt: skip
    assert evaluate.main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "row 1: message 1 of 'conversations': 'value' must be" in said


def test_an_answer_that_is_null_leaves_the_others(tmp_path, caplog):
    records = [dialogue("Q", "A"), dialogue("Q", None), dialogue("Q", "A", "Q", None)]
    write_json(tmp_path / "a.json", records)
    rows = benchmarks.get("llava").rows(tmp_path)
    assert [row["answer"] for row in rows] == ["A", None, "A", None]
    answers = [(row["id"], text) for row, text in zip(rows, "Axxx", strict=True)]
    result = benchmarks.score_answers("llava", rows, answers)
    assert (result["score"], result["n"]) == (0.5, 2)
    assert caplog.messages == [
        "llava: 2 of 4 questions have no gold answer: they are not scored (first '1/0')"
    ]
    with pytest.raises(ConfigError, match="none of the 1 answered questions has a gold answer"):
        benchmarks.score_answers("llava", rows, answers[1:2], allow_missing=True)
    with pytest.raises(ConfigError, match="hold no gold answers"):
        benchmarks.score_answers("llava", rows[1:2], answers[1:2])
    assert [benchmarks.has_gold(rows[i:]) for i in (0, 1, 3)] == [True, True, False]
    write_json(tmp_path / "a.json", [dialogue("Q", None, "Q", "A")])
    with pytest.raises(ConfigError, match=r"row 0: message 1 .* must be a string, got None"):
        llava.rows(tmp_path)


def test_a_question_of_gqa_without_an_answer_leaves_the_others(tmp_path, caplog):
    path = native_files.gqa(tmp_path) / "testdev_balanced_questions.json"
    questions = json.loads(path.read_text())
    questions["7"]["answer"] = None
    write_json(path, questions)
    rows = benchmarks.get("gqa").rows(tmp_path)
    answers = [(row["id"], "no") for row in rows]
    assert benchmarks.score_answers("gqa", rows, answers)["score"] == 0.5
    assert caplog.messages[0].startswith("gqa: 1 of 3 questions have no gold answer")
    assert len(json.loads(*benchmarks.submission("gqa", rows, answers).values())) == 3


@pytest.mark.parametrize("name", ["ai2d", "seed", "chartqa", "docvqa", "gqa", "vizwiz", "textvqa"])
def test_a_file_of_another_kind_says_what_is_read(tmp_path, name):
    path = tmp_path / "Some_TEST.tsv"
    path.write_text("index\tquestion\n1\tWhat?\n")
    for place, said in ((path, "is not read here; give "), (tmp_path, "holds none of ")):
        with pytest.raises(ConfigError, match=said) as error:
            benchmarks.get(name).rows(place)
        assert ".parquet" in str(error.value)
