"""Rows, metrics and the pairing of predictions with questions; all without jax and without a model."""

import json

import native_files
import pytest
from bench import fuzz
from native_files import dialogue

from vlm_jax import benchmarks
from vlm_jax.benchmarks import llava, metrics, predictions
from vlm_jax.settings.checks import ConfigError


def write(path, records):
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def mini(tmp_path):
    return native_files.mini(tmp_path)


GOLD = [("s0/0", "q"), ("s0/1", "z"), ("s1/0", "k"), ("s1/1", "w")]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Red", "red", 1.0),
        ("red.", "Red", 1.0),
        ("  red \n", "red", 1.0),
        ("a  red\tcat", "A red cat.", 1.0),
        ("red ..", "red", 0.0),
        ("red .", "red", 1.0),
        ("a red", "red", 0.0),
        ("re d", "red", 0.0),
        ("", "red", 0.0),
        ("", "", 1.0),
        (".", "", 1.0),
        ("ÉTÉ", "été", 1.0),
        ("1.5", "1.5.", 1.0),
        ("10", "ten", 0.0),
    ],
)
def test_exact_match_ignores_case_white_space_and_one_closing_period_and_nothing_else(
    prediction, answer, expected
):
    assert metrics.exact_match(prediction, {"answer": answer}) == expected


def test_the_mean_of_one_right_answer_in_four_is_a_quarter():
    assert metrics.mean([1.0, 0.0, 0.0, 0.0], [{}] * 4) == {
        "score": 0.25, "error": 0.75, "n": 4, "details": {},
    }  # fmt: skip


def test_every_turn_of_the_miniature_is_asked_alone_with_the_image(mini):
    rows = benchmarks.get("mini_ocr").rows(mini)
    assert [(row["id"], row["answer"]) for row in rows] == GOLD
    assert rows[1]["conversations"] == [{"from": "human", "value": "<image>\nread b2"}]
    assert [row["image"] for row in rows] == ["images/0.png"] * 2 + ["images/1.png"] * 2


def test_a_question_asked_alone_keeps_the_system_message_and_every_image(tmp_path):
    record = dialogue(
        "<image><image> which?", "a", "why?", "b", image=["0.png", "1.png"], system="Be brief."
    )
    write(tmp_path / "x.json", [record])
    rows = llava.rows_asked_alone(tmp_path, "x.json")
    assert rows[1]["conversations"] == [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\n<image>\nwhy?"},
    ]


def test_a_llava_turn_is_asked_after_the_gold_dialogue(tmp_path):
    rows = benchmarks.get("llava").rows(native_files.llava(tmp_path))
    assert [(row["id"], row["answer"]) for row in rows] == [
        ("r/0", "A cat."),
        ("r/1", "At home."),
        ("1/0", "Hi"),
    ]
    assert [m["value"] for m in rows[1]["conversations"]] == ["<image>\nWhat?", "A cat.", "Where?"]
    assert "image" not in rows[2]


def test_jsonl_and_json_annotations_give_the_same_rows(tmp_path):
    records = [dialogue("Q", "A", name="x"), dialogue("Q", "B", name="y")]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(r) for r in records) + "\n")
    assert llava.rows(tmp_path / "lines.jsonl") == llava.rows(
        write(tmp_path / "list.json", records)
    )


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[{", "is not valid JSON"),
        ('{"a": 1}', "row a: must be an object, got 1"),
        ('[{"id": "x"}]', "row 0: has no 'conversations'"),
        ('[{"id": "x", "conversations": [{"value": "q"}]}]', "messages with 'from' and 'value'"),
        (
            '[{"id": "x", "conversations": [{"from": "human", "value": "q"}]}]',
            "no human message followed",
        ),
        (json.dumps([dialogue("Q", "A", name="x")] * 2), "two questions with id 'x'"),
    ],
)
def test_a_bad_annotation_is_named(tmp_path, content, match):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ConfigError, match=match):
        llava.rows(tmp_path)


def test_a_missing_annotation_and_an_unknown_benchmark_say_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match=r"ocr_test.json does not exist"):
        benchmarks.get("mini_ocr").rows(tmp_path)
    with pytest.raises(ConfigError, match=r"holds none of \*\.json, \*\.jsonl; give"):
        benchmarks.get("llava").rows(tmp_path)
    with pytest.raises(ConfigError, match="'mni_ocr'; use one of llava, mini_reasoning, mini_ocr"):
        benchmarks.get("mni_ocr")


def test_the_score_does_not_depend_on_the_order_of_the_predictions(mini):
    rows = benchmarks.get("mini_ocr").rows(mini)
    answers = [*GOLD[:3], ("s1/1", "wrong")]
    expected = {"benchmark": "mini_ocr", "score": 0.75, "error": 0.25, "n": 4, "details": {}}
    assert benchmarks.score_answers("mini_ocr", rows, answers) == expected
    assert benchmarks.score_answers("mini_ocr", rows, answers[::-1]) == expected


def test_missing_duplicate_and_unknown_predictions_are_counted(mini):
    rows = benchmarks.get("mini_ocr").rows(mini)
    answers = [GOLD[0], GOLD[0], ("x", "y"), ("z", "y")]
    with pytest.raises(
        ConfigError, match=r"3 missing \(first 's0/1'\), 1 duplicate .*'s0/0'.*, 2 unknown .*'x'"
    ):
        benchmarks.score_answers("mini_ocr", rows, answers)
    with pytest.raises(ConfigError, match="1 duplicate"):
        benchmarks.score_answers("mini_ocr", rows, [*GOLD, GOLD[2]], allow_missing=True)


def test_allowed_missing_predictions_are_left_out_of_n(mini):
    rows = benchmarks.get("mini_ocr").rows(mini)
    result = benchmarks.score_answers("mini_ocr", rows, GOLD[:3], allow_missing=True)
    assert (result["n"], result["error"]) == (3, 0.0)
    with pytest.raises(ConfigError, match="none of the 4 questions is answered"):
        benchmarks.score_answers("mini_ocr", rows, [], allow_missing=True)


@pytest.mark.parametrize("name", ["mini_ocr", "mini_reasoning"])
def test_random_texts_never_crash_a_scorer(mini, name):
    fuzz(name, benchmarks.get(name).rows(mini))


def test_answers_survive_the_file_unchanged(tmp_path):
    path = tmp_path / "predictions.jsonl"
    answers = [("a", 'q"\n\u2028é'), ("b", ""), ("c", "漢\r\n")]
    predictions.append(path, answers[:1])
    predictions.append(path, answers[1:])
    assert predictions.read(path) == answers
    assert len(path.read_bytes().splitlines()) == 3


def test_a_torn_last_line_is_dropped_on_resume_and_refused_when_scored(tmp_path):
    path = tmp_path / "predictions.jsonl"
    assert predictions.resume(path) == []
    predictions.append(path, [("a", "1"), ("b", "é")])
    whole = path.read_bytes()
    path.write_bytes(whole + '{"id": "c", "text": "é'.encode()[:-1])
    with pytest.raises(ConfigError, match=r"predictions.jsonl:3 is not valid JSON"):
        predictions.read(path)
    assert predictions.resume(path) == [("a", "1"), ("b", "é")]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["{", "[]", '{"id": 1, "text": "x"}', '{"id": "x"}'])
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "a", "text": "b"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"predictions.jsonl:2"):
        predictions.read(path)
