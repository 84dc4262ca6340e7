"""GQA and ScienceQA: native files, prompts, parsing and scores worked out by hand."""

import json

import bench
import native_files
import pytest
from native_files import science_problem as problem

from vlm_jax import benchmarks
from vlm_jax.benchmarks import gqa, scienceqa
from vlm_jax.settings.checks import ConfigError


@pytest.fixture
def gqa_dir(tmp_path):
    return native_files.gqa(tmp_path)


def test_gqa_asks_for_a_word_or_phrase(gqa_dir):
    rows = benchmarks.get("gqa").rows(gqa_dir)
    assert [row["id"] for row in rows] == ["201307251", "201307252", "7"]
    assert bench.asked(rows[0]) == (
        "Is it a cat?\nAnswer the question using a single word or phrase."
    )
    assert all((gqa_dir / row["image"]).is_file() for row in rows)
    assert benchmarks.get("gqa").rows(gqa_dir / "testdev_balanced_questions.json") == rows


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("no", "no", 1), ("No", "no", 1), ("No.", "no", 1), ("no...", "no", 1), (" no \n", "no", 1),
        ("no, it is not", "no", 0), ("no .", "no", 0), ("", "no", 0), (".", "no", 0),
        ("the man", "man", 0), ("men", "man", 0), ("Éclair", "éclair", 1), ("two", "2", 0), ("no\nyes", "no", 0),
    ],
)  # fmt: skip
def test_gqa_counts_equality_after_case_and_closing_periods(text, gold, expected):
    assert gqa.score(text, {"answer": gold}) == expected


def test_gqa_scores_the_share_of_equal_answers(gqa_dir):
    rows = benchmarks.get("gqa").rows(gqa_dir)
    result = bench.score("gqa", rows, ["No.", "woman", "left"])
    assert result["score"] == pytest.approx(2 / 3)
    assert (result["error"], result["n"]) == (pytest.approx(1 / 3), 3)
    bench.fuzz("gqa", rows)


def test_gqa_writes_the_file_of_its_evaluator_and_refuses_to_score_hidden_answers(gqa_dir):
    path = gqa_dir / "testdev_balanced_questions.json"
    hidden = {
        i: {k: v for k, v in q.items() if k != "answer"}
        for i, q in json.loads(path.read_text()).items()
    }
    path.write_text(json.dumps(hidden))
    rows = benchmarks.get("gqa").rows(gqa_dir)
    answers = [("7", "Left."), ("201307252", "Man"), ("201307251", "no")]
    with pytest.raises(ConfigError, match=r"upload testdev_balanced_predictions\.json"):
        benchmarks.score_answers("gqa", rows, answers)
    (content,) = benchmarks.submission("gqa", rows, answers).values()
    assert json.loads(content) == [
        {"questionId": "201307251", "prediction": "no"},
        {"questionId": "201307252", "prediction": "man"},
        {"questionId": "7", "prediction": "left"},
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not valid JSON"), ("[]", "holds no question"), ("{}", "holds no question"),
        ('{"5": {"imageId": "n"}}', "row 5: has no 'question'"),
        ('{"5": {"imageId": [], "question": "?"}}', "'imageId' must be a string, got"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_one_line_that_names_it(gqa_dir, text, match):
    (gqa_dir / "testdev_balanced_questions.json").write_text(text)
    with pytest.raises(ConfigError, match=match) as error:
        benchmarks.get("gqa").rows(gqa_dir)
    assert "\n" not in str(error.value) and "testdev_balanced_questions.json" in str(error.value)


@pytest.fixture
def scienceqa_dir(tmp_path):
    return native_files.scienceqa(tmp_path)


def test_scienceqa_asks_the_test_split_with_context_and_lettered_options(scienceqa_dir):
    rows = benchmarks.get("scienceqa").rows(scienceqa_dir)
    assert [row["id"] for row in rows] == ["4", "5", "11", "12"]
    ending = "\nAnswer with the option's letter from the given choices directly."
    assert bench.asked(rows[0]) == (
        "Context: See the picture.\nWhich?\nA. red\nB. blue\nC. green" + ending
    )
    assert bench.asked(rows[1]) == "Which?\nA. red\nB. blue\nC. green" + ending
    assert bench.asked(rows[3]) == "Context: Read.\nWhich?\nA. a\nB. b" + ending
    assert [row["answer"] for row in rows] == ["A", "B", "C", "B"]
    assert (scienceqa_dir / rows[0]["image"]).is_file() and "image" not in rows[1]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), (" B\n", "B"), ("B. blue", "B"), ("B.", ""), ("B.blue", ""), ("b", ""), ("F", ""), ("", ""),
        ("AB", ""), ("(B)", ""), ("The answer is B.", "B"), ("So: The answer is B, I think", "B"),
        ("The answer is B", ""), ("The answer is A. Or: The answer is B.", ""), ("F. blue", ""), ("é", ""),
        ("D. The answer is B.", "D"),
    ],
)  # fmt: skip
def test_scienceqa_reads_the_letter_as_llava_does(text, letter):
    assert scienceqa.parse(text) == letter


def test_scienceqa_scores_questions_with_a_picture_and_tells_all(scienceqa_dir):
    rows = benchmarks.get("scienceqa").rows(scienceqa_dir)
    result = bench.score("scienceqa", rows, ["A", "B. blue", "A", "C"])
    assert (result["score"], result["error"], result["n"]) == (0.5, 0.5, 4)
    assert result["details"] == {"img": 0.5, "all": 0.5, "img.n": 2}
    result = bench.score("scienceqa", rows, ["A", "B. blue", "C", "C"])
    assert (result["score"], result["details"]["all"]) == (1.0, 0.75)
    bench.fuzz("scienceqa", rows)


def test_scienceqa_without_a_picture_has_no_score(scienceqa_dir):
    rows = [row for row in benchmarks.get("scienceqa").rows(scienceqa_dir) if "image" not in row]
    with pytest.raises(ConfigError, match="none of the 2 questions has a picture"):
        benchmarks.score_answers("scienceqa", rows, [("5", "B"), ("12", "B")])
    with pytest.raises(ConfigError, match=r"none of the 2 questions .* ask more of them"):
        benchmarks.check_scorable("scienceqa", rows)


def test_scienceqa_names_a_problem_that_is_wrong(scienceqa_dir):
    path = scienceqa_dir / "problems.json"
    problems = json.loads(path.read_text())
    path.write_text(json.dumps(problems | {"5": problem(3)}))
    with pytest.raises(ConfigError, match="row 5: answer 3 of 3 choices"):
        benchmarks.get("scienceqa").rows(scienceqa_dir)
    del problems["11"]
    path.write_text(json.dumps(problems))
    with pytest.raises(ConfigError, match=r"pid_splits.json: problem 11 is not in problems.json"):
        benchmarks.get("scienceqa").rows(scienceqa_dir)
