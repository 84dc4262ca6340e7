"""MMMU: letters and open answers from the official rules, by hand; the seeded choice; the hub's parquet."""

import json

import native_files
import pytest
from bench import asked, fuzz, score
from native_files import mmmu_record as record
from native_files import png, write_json, write_parquet

from vlm_jax import benchmarks
from vlm_jax.benchmarks import mmmu
from vlm_jax.settings.checks import ConfigError

OPTIONS = {"A": "$6", "B": "the seven sisters", "C": "12 cm", "D": "Nothing"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("'C'", "C"),
        ("(D)", "D"),
        ("The answer is (B) and not (A)", "A"),  # the last in brackets
        ("(C) B ", "C"),  # brackets come first
        ("A then D", "D"),
        ("USA (C)", "C"),
        ("DNA was taken from the seven sisters", "B"),  # "A " that ends a word is no letter
        ("A, B or D, but C I would not say", "C"),  # beside a comma neither
        ("B: the answer is plainly 12 cm", "C"),  # beside a colon neither: then the text named
        ("(A) or rather D or else", "A"),  # brackets first, wherever they stand
        ("nothing at all but the SEVEN sisters", "B"),  # of texts, too, the last
        ("it must be the Seven Sisters of old", "B"),
        ("first nothing and then it was 12 cm", "C"),  # the last text
    ],
)
def test_a_choice_is_read_as_the_official_rules_do(text, expected):
    assert mmmu.choice(text, OPTIONS, "q1") == expected


def test_an_answer_without_an_option_gets_a_seeded_choice_per_question():
    guesses = [mmmu.choice("no idea", OPTIONS, f"validation_Art_{i}") for i in range(400)]
    assert guesses == [mmmu.choice("", OPTIONS, f"validation_Art_{i}") for i in range(400)]
    assert "".join(guesses[:8]) == "DCACBBAD"  # the same on every machine
    # "B," and "A." are in no notation, and five words are too few for an option's text
    for text in ("I think: B, 12 cm", "A. $6 or else", "D. or B. or else", "USA", "(b)", "(E)"):
        assert [mmmu.choice(text, OPTIONS, f"validation_Art_{i}") for i in range(9)] == guesses[:9]
    assert all(70 <= guesses.count(letter) <= 130 for letter in OPTIONS)


@pytest.mark.parametrize(
    ("text", "golds", "expected"),
    [
        ("5", ["5"], 1),
        ("5.004", ["5"], 1),  # two decimals
        ("5.006", ["5"], 0),
        ("The answer is 1,234.", ["1234"], 1),
        ("so it is 1.5e3", ["1500"], 1),
        ("x = 3 + 4 = 7", ["7"], 1),
        ("x = 3\ny = 4", ["3"], 0),  # "=" announces a result in the last line alone, where 4 is
        ("The result is the Golden Gate", ["golden gate"], 1),
        ("It is in Paris, so the answer is Rome", ["Paris"], 0),  # only the shortest tail counts
        ("b", ["b"], 1),
        ("bob", ["b"], 0),  # one letter needs a blank beside it
        ("maybe b or c", ["b"], 1),
        ("", ["5"], 0),
        ("24/7", ["24/7", "3.429"], 1),
        ("about 3.43 in all", ["24/7", "3.429"], 1),
        ("-5", ["5"], 0),
        ("50%", ["50"], 1),
        ("10 1/2", ["10.5"], 0),
        ("É", ["é"], 1),
    ],
)
def test_an_open_answer_must_hold_a_gold_text_or_number(text, golds, expected):
    assert mmmu.score(text, {"type": "open", "answer": golds}) == expected


@pytest.fixture
def folder(tmp_path):
    return native_files.mmmu(tmp_path)


def test_rows_keep_the_images_in_order_and_the_marks_in_the_question(folder):
    rows = benchmarks.get("mmmu").rows(folder)
    assert asked(rows[0]) == (
        "See <image 1>. Which?\nA. x\nB. it's\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert asked(rows[2]) == (
        "How many <image 1>?\n\nAnswer the question using a single word or phrase."
    )
    assert [[image() for image in row["image"]] for row in rows] == [
        [png(1)],
        [png(1), png(2)],
        [png(1)],
    ]


def test_the_score_is_the_mean_of_all_questions_and_each_subject_is_named(folder):
    rows = benchmarks.get("mmmu").rows(folder)
    result = score("mmmu", rows, ["B", "(B)", "It is 3.43"])
    assert result["score"] == pytest.approx(2 / 3)
    assert result["details"] == {"Art_Theory": 0.5, "Math": 1.0, "multiple-choice": 0.5, "open": 1.0}  # fmt: skip
    fuzz("mmmu", rows)


def test_the_test_split_is_uploaded_as_letters_and_open_answers(tmp_path):
    hidden = [record("test_Art_1", "?"), record("test_Art_2", "?", options="[]")]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", hidden)
    rows = benchmarks.get("mmmu").rows(tmp_path)
    upload = benchmarks.submission("mmmu", rows, [("test_Art_2", "3 cm"), ("test_Art_1", "(B) x")])
    assert json.loads(upload["mmmu_submission.json"]) == {"test_Art_1": "B", "test_Art_2": "3 cm"}
    with pytest.raises(ConfigError, match=r"upload mmmu_submission.json"):
        benchmarks.score_answers("mmmu", rows, [("test_Art_2", "3 cm"), ("test_Art_1", "B")])


def test_whatever_is_not_multiple_choice_is_open(tmp_path):
    raw = record("validation_Art_1", "7", options="[]") | {"image_1": "images/1.png"}
    write_json(tmp_path / "validation.json", [raw | {"question_type": "short-answer"}])
    (row,) = benchmarks.get("mmmu").rows(tmp_path)
    assert "replies" not in row and asked(row).endswith("using a single word or phrase.")
    assert score("mmmu", [row], ["7"])["details"] == {"Art": 1.0, "open": 1.0}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"options": "['x'"}, "row 0: 'options' is not a list"),
        ({"options": []}, "row 0: 'options' is empty"),
        ({"answer": "C"}, "is none of A, B"),
        ({"question_type": None}, "row 0: has no 'question_type'"),
        ({"options": "[{[]: 1}]"}, "row 0: 'options' is not a list"),
        ({"options": "[" * 5000}, "row 0: 'options' is not a list"),
        ({"image_1": None}, "row 0: has no image_1"),
        ({"id": None}, "row 0: has no 'id'"),
    ],
)
def test_a_bad_question_is_named(tmp_path, change, match):
    raw = record("validation_Art_1", "A") | {"image_1": "images/1.png"} | change
    write_json(tmp_path / "validation.json", [raw])
    with pytest.raises(ConfigError, match=match):
        benchmarks.get("mmmu").rows(tmp_path)
