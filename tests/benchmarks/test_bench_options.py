"""AI2D, SEED-Bench and MathVista: questions with options or numbers, by hand."""

import native_files
import pytest
from bench import asked, fuzz, score
from native_files import diagram, embedded, png, seed_question, write_json, write_parquet
from native_files import math_problem as problem

from vlm_jax import benchmarks
from vlm_jax.benchmarks import ai2d, mathvista, seed
from vlm_jax.settings.checks import ConfigError

LETTER = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", 1), ("b", 1), ("B.", 1), ("b.", 1), ("b. a leaf", 0), ("B.a leaf", 1), ("B .", 0), ("( B )", 0), ("B.C.", 1),
        ("A.B", 0), (" B\n", 1), ("(B)", 1), ("B)", 1),
        ("'B'", 1), ("A", 0), ("B a leaf", 0), ("a leaf", 0), ("A. B", 0), ("", 0), (".", 0), ("The answer is B", 0),
        ("Ｂ", 0),
    ],
)  # fmt: skip
def test_ai2d_takes_the_letter_whatever_its_case_and_punctuation(text, expected):
    assert ai2d.score(text, {"answer": "B"}) == expected


def test_ai2d_reads_all_shards_in_order_and_counts_rows(tmp_path):
    native_files.ai2d(tmp_path)
    first = tmp_path / "data" / "test-00000-of-00002.parquet"
    aside = first.rename(tmp_path / "aside")
    with pytest.raises(ConfigError, match=r"data holds 1 of the 2 files test-\*.parquet"):
        benchmarks.get("ai2d").rows(tmp_path)
    aside.rename(first)
    rows = benchmarks.get("ai2d").rows(tmp_path)
    assert [(row["id"], row["answer"]) for row in rows] == [("0", "B"), ("1", "B"), ("2", "D")]
    assert asked(rows[0]) == f"What?\nA. a root\nB. a leaf\nC. 3\nD. d\n{LETTER}"
    assert rows[2]["image"]() == png()
    assert score("ai2d", rows, ["B", "a leaf", "d."])["score"] == pytest.approx(2 / 3)
    fuzz("ai2d", rows)


@pytest.mark.parametrize("answer", ["4", "-1", "B", "²", "1" * 5000])
def test_ai2d_refuses_an_answer_that_is_no_index_of_an_option(tmp_path, answer):
    write_json(tmp_path / "ai2d_test.json", [diagram(image="1.png", answer=answer)])
    with pytest.raises(ConfigError, match=r"ai2d_test.json row 0: 'answer' must be an index 0..3"):
        benchmarks.get("ai2d").rows(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C", 1), ("C.", 1), ("C. a cat", 1), (" C", 1), ("\nC\n", 1), ("CD", 1), ("c", 1), ("(C)", 0), ("D", 0),
        ("", 0), ("The C", 0), ("A or C", 0), ("Ç", 0), ("cat", 1), (" c.", 1),
    ],
)  # fmt: skip
def test_seed_reads_the_first_character(text, expected):
    assert seed.score(text, {"answer": "C"}) == expected


def test_seed_asks_about_images_alone_and_names_the_dimensions(tmp_path):
    rows = benchmarks.get("seed").rows(native_files.seed(tmp_path))
    assert [row["id"] for row in rows] == ["101", "103", "104"]
    assert rows[0]["image"] == "SEED-Bench-image/101_0"
    assert asked(rows[0]) == f"What?\nA. w\nB. x\nC. y\nD. z\n{LETTER}"
    result = score("seed", rows, ["A", "D", "A"])
    assert result["score"] == pytest.approx(2 / 3)
    assert result["details"] == {"Instance Identity": 1.0, "Scene Understanding": 0.5}
    fuzz("seed", rows)


def test_seed_reads_the_hubs_parquet_and_names_a_bad_answer(tmp_path):
    image = [embedded(3)]
    write_parquet(tmp_path / "data" / "test-0.parquet", [seed_question(101, image=image)])
    (row,) = benchmarks.get("seed").rows(tmp_path)
    assert (row["image"](), row["dimension"]) == (png(3), "1")
    write_json(tmp_path / "SEED-Bench.json", {"questions": [seed_question(101, "E")]})
    with pytest.raises(ConfigError, match="row 0: 'answer' must be one of A, B, C, D, got 'E'"):
        benchmarks.get("seed").rows(tmp_path)


CHOICE = {"options": {"A": "3/11", "B": "8/11", "C": "8 cm"}, "answer_type": "text", "precision": 0}
INTEGER = {"options": {}, "answer_type": "integer", "precision": 0}
FLOAT = {"options": {}, "answer_type": "float", "precision": 2}
SWAPPED = {"options": {"A": "B", "B": "A"}, "answer_type": "text", "precision": 0}
MARKED = {"options": {"A": "(B)", "B": "(A)", "C": "x (b)"}, "answer_type": "text", "precision": 0}
LIST = {"options": {}, "answer_type": "list", "precision": 0}


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (CHOICE, "8/11", "8/11"),
        (CHOICE, "(b) 3/11", "8/11"),  # the letter in brackets decides
        (CHOICE, "C", "8 cm"),
        (SWAPPED, "A", "B"),  # a letter is the option's, not its text
        (SWAPPED, "(b)", "A"),
        (MARKED, "(A)", "(B)"),  # also where its text is another option's, in brackets
        (MARKED, "x (b)", "(A)"),
        (CHOICE, "A or (C)", "8 cm"),
        (CHOICE, "c", "8 cm"),  # no letter: the nearest option, 3 edits
        (CHOICE, "9 cm", "8 cm"),
        (
            CHOICE,
            "(D)",
            "3/11",
        ),  # beyond the options: "D" is as far from 3/11 as from 8/11, the first wins
        (CHOICE, "", "3/11"),
        (INTEGER, "14", "14"),
        (INTEGER, " 14.9\n", "14"),  # cut, not rounded
        (INTEGER, "14 apples", None),
        (INTEGER, "1e2", "100"),
        (INTEGER, "inf", None),
        (INTEGER, "nan", None),
        (INTEGER, "", None),
        (FLOAT, "1.456", "1.46"),
        (FLOAT, "2", "2.0"),
        (FLOAT, "50%", None),
        (FLOAT, "$1.45", None),
        (LIST, " [1, 2] ", "[1, 2]"),
    ],
)
def test_a_mathvista_answer_is_normalised_as_the_official_script_does(kind, text, expected):
    assert mathvista.normalise(text, kind) == expected


def test_mathvista_asks_the_files_query_and_scores_by_task(tmp_path):
    rows = benchmarks.get("mathvista").rows(native_files.mathvista(tmp_path))
    assert [(row["id"], asked(row)) for row in rows] == [(i, f"Q{i}") for i in "1234"]
    assert rows[0]["image"] == "images/1.jpg"
    result = score("mathvista", rows, ["1.2", "B", "7", "B"])
    assert result["score"] == pytest.approx(3 / 4)
    assert result["details"] == {
        "bar chart": 0.75, "figure question answering": pytest.approx(2 / 3), "geometry": 1.0,
    }  # fmt: skip
    fuzz("mathvista", rows)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"unit": "$"},
            "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, "
            "at the end.\nQuestion: How many? (Unit: $)",
        ),
        (
            {"question_type": "multi_choice", "answer_type": "text", "choices": ["3", "4"]},
            "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
            "Question: How many?\nChoices:\n(A) 3\n(B) 4",
        ),
        (
            {"answer_type": "float", "precision": 1.0},
            "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the "
            "final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How many?",
        ),
    ],
)
def test_a_problem_without_a_query_is_asked_as_mathvista_builds_it(tmp_path, change, expected):
    write_json(tmp_path / "testmini.json", {"5": problem("5", "3", query=None, **change)})
    (row,) = benchmarks.get("mathvista").rows(tmp_path)
    assert asked(row) == expected


@pytest.mark.parametrize("query", [None, " Q? \n"])
def test_no_prompt_of_mathvista_ends_in_a_blank(tmp_path, query):
    kind = {"question_type": "multi_choice", "answer_type": "text", "choices": ["rise", "stay "]}
    write_json(tmp_path / "testmini.json", {"5": problem("5", "stay ", query=query, **kind)})
    (row,) = benchmarks.get("mathvista").rows(tmp_path)
    assert asked(row) == row["conversations"][0]["value"].removeprefix("<image>\n")
    assert asked(row).endswith("(B) stay" if query is None else "Q?")
    assert score("mathvista", [row], ["B"])["score"] == 1.0


def test_mathvista_reads_the_hubs_parquet_and_knows_hidden_answers(tmp_path):
    image = embedded(5)
    record = problem("9", "", decoded_image=image, choices=["a"])
    write_parquet(tmp_path / "data" / "testmini-00000-of-00001-x.parquet", [record])
    (row,) = benchmarks.get("mathvista").rows(tmp_path)
    assert (row["image"](), row["answer"]) == (png(5), None)


def test_a_problem_without_a_pid_has_its_name_in_the_file(tmp_path):
    write_json(tmp_path / "testmini.json", {"8": problem(None, "3") | {"image": "8.jpg"}})
    (row,) = benchmarks.get("mathvista").rows(tmp_path)
    assert row["id"] == "8"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"question_type": "essay"}, "row 5: 'question_type' must be multi_choice or free_form"),
        ({"question_type": "multi_choice", "choices": []}, "row 5: 'choices' is empty"),
        ({"answer_type": "float", "precision": "two"}, "'precision' must be a number, got 'two'"),
        ({"answer_type": "float"}, "row 5: has no 'precision'"),
        (
            {"answer_type": "float", "precision": float("inf")},
            "'precision' must be a number, got inf",
        ),
        (
            {"query": None, "answer_type": "text"},
            "no 'query', and there is no hint for answer_type 'text'",
        ),
    ],
)
def test_a_bad_problem_is_named(tmp_path, change, match):
    write_json(tmp_path / "testmini.json", {"5": problem("5", "3", **change)})
    with pytest.raises(ConfigError, match=match):
        benchmarks.get("mathvista").rows(tmp_path)
