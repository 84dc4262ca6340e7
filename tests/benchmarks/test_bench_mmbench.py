"""MMBench: letters, circles, the two languages, and the spreadsheet for its server."""

import io

import native_files
import openpyxl
import pytest
from bench import asked, fuzz, score
from native_files import MMBENCH_COLUMNS as COLUMNS
from native_files import MMBENCH_LINES as LINES
from native_files import embedded, png, write_parquet, write_tsv

from vlm_jax import benchmarks
from vlm_jax.benchmarks import mmbench
from vlm_jax.settings.checks import ConfigError

OPTIONS = {"A": "red cat", "B": "blue dog", "C": "a tree", "D": "none of these"}


@pytest.fixture
def english(tmp_path):
    native_files.mmbench_cn(tmp_path)
    return native_files.mmbench(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("(C)", "C"),
        ("D: none", "D"),
        ("The answer is B", "B"),
        ("The answer is (B).", "B"),
        ("A or B", None),
        ("A, B", "B"),  # one letter is a word of its own, "A," is not
        ("ABCD", None),
        ("A B", None),
        ("I see a red cat", "A"),
        ("A blue dog is here", "B"),  # a lone A among more than three words is an article
        ("A small green bird", None),
        ("red cat and blue dog", None),
        ("E", "E"),
        ("b", None),
        ("", None),
        ("It is ：C", None),  # a full-width colon is no colon
        ("C) a tree", "C"),
        (":D", "D"),
        ("B. A small grey cat", "B"),  # after a lone article the next notation is tried
        ("A small bird: (D)", "D"),
        ("A small bird, A. or B.", None),
        ("A. A small bird", "A"),
        ("A dog here", "A"),  # three words: no article
        ("Answer: **C**", None),  # VLMEvalKit takes the stars for blanks
    ],
)
def test_a_letter_is_read_as_the_official_rules_do_without_their_judge(text, expected):
    assert mmbench.letter(text, OPTIONS) == expected


def test_rows_ask_hint_question_and_options_and_keep_a_circle_together(english):
    rows = benchmarks.get("mmbench").rows(english)
    assert [row["id"] for row in rows] == ["7", "1000007", "2000007", "8", "1000008"]
    assert asked(rows[0]) == (
        'Look\nwell.\nWhich "one"?\nA. x\nB. y\nC. z\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert asked(rows[3]) == (
        "Two?\nA. left\nB. right\nAnswer with the option's letter from the given choices directly."
    )
    assert [row["image"] for row in rows] == [png()] * 3 + [png(9)] * 2


def test_the_chinese_file_is_asked_in_chinese(english):
    rows = benchmarks.get("mmbench_cn").rows(english)
    assert asked(rows[1]) == "Two?\nA. left\nB. right\n请直接回答选项字母。"
    assert [row["id"] for row in rows] == ["7", "8"]


def test_one_wrong_rotation_loses_the_question(english):
    rows = benchmarks.get("mmbench").rows(english)
    result = score("mmbench", rows, ["A", "B", "A", "right", "A."])
    assert result["score"] == 0.5
    assert result["details"] == {
        "circular": 0.5, "vanilla": 1.0, "color": 0.0, "place": 1.0, "l2.color_l2": 0.0, "l2.place_l2": 1.0,
    }  # fmt: skip


def test_the_hubs_parquet_gives_the_same_rows(english):
    names = [name.replace("l2-category", "L2-category") for name in COLUMNS]
    records = [dict(zip(names, one, strict=True)) for one in LINES]
    for record in records:
        record["index"] = int(record["index"])
        record["image"] = embedded(9 if record["category"] == "place" else 0)
        record |= {letter: record[letter] or None for letter in "ABCD"}
    write_parquet(english / "hub" / "en" / "dev-00000-of-00001.parquet", records)
    found = benchmarks.get("mmbench").rows(english / "hub")
    wanted = benchmarks.get("mmbench").rows(english)
    for one, other in zip(found, wanted, strict=True):
        assert {**one, "columns": 0, "image": one["image"]()} == {**other, "columns": 0}
    with pytest.raises(ConfigError, match=r"holds none of .*, cn/dev-"):
        benchmarks.get("mmbench_cn").rows(english / "hub")


def test_a_file_without_rotations_scores_vanilla(english):
    rows = benchmarks.get("mmbench_cn").rows(english)
    result = score("mmbench_cn", rows, ["A", "A"])
    assert (result["score"], result["details"]["vanilla"]) == (0.5, 0.5)
    assert "circular" not in result["details"]


def test_a_circle_with_a_rotation_unanswered_is_left_out(english):
    rows = benchmarks.get("mmbench").rows(english)
    answers = [("7", "B"), ("8", "B"), ("1000008", "A")]
    result = benchmarks.score_answers("mmbench", rows, answers, allow_missing=True)
    assert (result["score"], result["n"], result["details"]["vanilla"]) == (1.0, 3, 0.5)
    with pytest.raises(ConfigError, match="none of the 1 questions has all its rotations"):
        benchmarks.score_answers("mmbench", rows, answers[:1], allow_missing=True)


def test_random_texts_never_crash_mmbench(english):
    fuzz("mmbench", benchmarks.get("mmbench").rows(english))


def test_the_test_split_has_no_gold_and_its_upload_holds_the_predictions(tmp_path):
    hidden = [c for c in COLUMNS if c not in ("answer", "split")]
    lines = [[v for v, c in zip(one, COLUMNS, strict=True) if c in hidden] for one in LINES[:2]]
    write_tsv(tmp_path / "mmbench_test_20230712.tsv", hidden, lines)
    rows = benchmarks.get("mmbench").rows(tmp_path)
    assert [row["answer"] for row in rows] == [None, None]
    answers = [("8", "<B> &\x00 \ud7ff\ufffe\ud800"), ("7", "=1+1")]
    (upload,) = benchmarks.submission("mmbench", rows, answers).values()
    sheet = openpyxl.load_workbook(io.BytesIO(upload)).worksheets[0]
    assert list(sheet.values) == [
        ("index", "question", "A", "B", "C", "D", "prediction"),
        (7, 'Which "one"?', "x", "y", "z", None, "=1+1"),
        (8, "Two?", "left", "right", None, None, "<B> & \ud7ff"),
    ]
    assert [cell.data_type for cell in sheet[2] if cell.value] == ["n", *"sssss"]


@pytest.mark.parametrize(
    ("cells", "options"),
    [
        (["None", "One", "Two", "Three"], "ABCD"),
        (["One", "None", "NA", "null"], "ABCD"),
        (["One", "Two", "nan", ""], "AB"),
        (["One", "Two", " ", "NaN"], "AB"),
    ],
)
def test_only_an_empty_cell_or_nan_is_no_option(tmp_path, cells, options):
    path = tmp_path / "mmbench_dev_20230712.tsv"
    write_tsv(path, COLUMNS, [native_files.mmbench_line(7, "How many?", cells, "A")])
    (row,) = benchmarks.get("mmbench").rows(tmp_path)
    assert row["options"] == dict(zip(options, cells, strict=False))
    assert row["replies"] == tuple(options) and f"\nA. {cells[0]}\n" in asked(row)


@pytest.mark.parametrize(
    ("column", "value", "match"),
    [
        ("index", "7.5", r"dev_20230712.tsv row 1: 'index' must be a whole number, got '7.5'"),
        ("index", "7" * 5000, "row 1: 'index' must be a whole number, got '777"),
        ("answer", "C", "row 1: answer 'C' is none of A, B"),
        ("image", "?" * 80, "row 1: 'image' is not base64"),
        ("image", "é" * 80, "row 1: 'image' is not base64"),
        ("image", "1234", "row 1: 'image' names row 1234, which is not in the file"),
        ("image", "", "row 1: 'image' must be an image or its path, got ''"),
        ("index", "7", "two questions with id '7'"),
    ],
)
def test_a_bad_cell_is_named_with_its_row(tmp_path, column, value, match):
    bad = list(LINES[1])
    bad[COLUMNS.index(column)] = value
    write_tsv(tmp_path / "mmbench_dev_20230712.tsv", COLUMNS, [LINES[0], bad])
    with pytest.raises(ConfigError, match=match):
        benchmarks.get("mmbench").rows(tmp_path)


def test_a_short_line_and_two_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds none of"):
        benchmarks.get("mmbench").rows(tmp_path)
    write_tsv(tmp_path / "mmbench_dev_20230712.tsv", COLUMNS, [LINES[0][:5]])
    with pytest.raises(ConfigError, match="row 0: does not have 14 columns"):
        benchmarks.get("mmbench").rows(tmp_path)
    write_tsv(tmp_path / "mmbench_test_20230712.tsv", COLUMNS, LINES)
    with pytest.raises(ConfigError, match=r"holds mmbench_dev_20230712.tsv, mmbench_test"):
        benchmarks.get("mmbench").rows(tmp_path)
