"""LLaVA's answers.jsonl as answers of every benchmark: its ids, its prompts, and one command that scores and converts it."""

import json

import native_files
import pytest
from native_files import FIXTURES, seed_question, write_json, write_lines

from vlm_jax import benchmarks, evaluate
from vlm_jax.benchmarks import answers
from vlm_jax.settings.checks import ConfigError


def line(question_id, text, prompt="", **more):
    """As LLaVA's scripts write one."""
    return {
        "question_id": question_id, "prompt": prompt, "text": text, "answer_id": "6Xq", "model_id": "llava",
        "metadata": {}, **more,
    }  # fmt: skip


def read(name, rows, path, lines):
    write_lines(path, lines)
    return answers.read(name, rows, path)


def prompt(row):
    return row["conversations"][-1]["value"].replace("<image>\n", "")


# LLaVA's question_ids of the fixtures, in the order of the rows (shared ones are told apart by the prompt).
LLAVA_IDS = {
    "gqa": ["201307251", "201307252", "7"],
    "vqav2": [42000, 42001, 42002],
    "vizwiz": [f"VizWiz_val_{i:08d}.jpg" for i in range(3)],
    "textvqa": ["003a", "003a", "3af0"],
    "textvqa_ocr": ["003a", "003a", "3af0"],
    "scienceqa": ["4", "5", "11", "12"],
    "mmbench": [7, 1_000_007, 2_000_007, 8, 1_000_008],
    "mmbench_cn": [7, 8],
    "mme": [
        "count/0001.png", "count/0001.png", "count/0002.png", "count/0002.png", "posters/images/tt01.jpg",
        "posters/images/tt01.jpg", "code_reasoning/0001.png", "code_reasoning/0001.png",
    ],
    "mmvet": [0, 1],
    "llava_bench": [0, 1],
    "seed": [101, 103, "104"],
}  # fmt: skip


@pytest.mark.parametrize("name", LLAVA_IDS)
def test_llavas_ids_name_the_rows(tmp_path, name):
    rows = benchmarks.get(name).rows(FIXTURES[name](tmp_path))
    if name.startswith("textvqa"):  # its first two questions are the same but for the picture's
        rows[1]["conversations"][0]["value"] = "<image>\nAnd this?\nAnswer the question using a"
    pairs = list(zip(LLAVA_IDS[name], rows, strict=True))
    lines = [line(i, f"to {row['id']}", prompt(row)) for i, row in reversed(pairs)]
    found = read(name, rows, tmp_path / "answers.jsonl", lines)
    assert found == [(row["id"], f"to {row['id']}") for _, row in reversed(pairs)]


@pytest.mark.parametrize("name", FIXTURES)
def test_the_ids_of_the_rows_do_as_question_ids_too(tmp_path, name):
    rows = benchmarks.get(name).rows(FIXTURES[name](tmp_path))
    lines = [line(row["id"], row["id"], prompt(row)) for row in rows]
    found = read(name, rows, tmp_path / "answers.jsonl", lines)
    assert found == [(row["id"], row["id"]) for row in rows]


def test_prompts_are_compared_by_what_they_ask():
    asked = "is it  red? Please answer yes or no."
    assert answers.question("<image>\nIs it red?\nAnswer the question using a single word.") == (
        answers.question(asked)
    )
    assert answers.question("What?\nReference OCR token: a, b\nAnswer the question using a") == (
        "what?"
    )
    assert answers.key("artwork/images/10.JPG") == answers.key("artwork/10.png") == "artwork/10"


POPE = {"adversarial": "cup", "popular": "dog", "random": "car"}


@pytest.fixture
def pope_rows(tmp_path):
    """Two questions per split; the first is the same everywhere."""
    for split, thing in POPE.items():
        lines = [
            {"question_id": i, "image": "1.jpg", "text": f"Is there a {x}?", "label": "yes"}
            for i, x in enumerate(("cat", thing), start=1)
        ]
        write_lines(tmp_path / f"coco_pope_{split}.json", lines)
    return benchmarks.get("pope").rows(tmp_path)


@pytest.mark.parametrize("order", [("adversarial", "popular", "random"), ("random", "adversarial", "popular")])  # fmt: skip
@pytest.mark.parametrize("first", [0, 1])
def test_running_numbers_of_pope_follow_the_order_that_the_prompts_show(
    tmp_path, pope_rows, order, first
):
    names = [f"{split}/{i}" for split in order for i in (1, 2)]
    asked = [f"Is there a {x}?\nAnswer the question using a" for s in order for x in ("cat", POPE[s])]  # fmt: skip
    lines = [line(first + i, name, asked[i]) for i, name in enumerate(names)]
    found = read("pope", pope_rows, tmp_path / "a.jsonl", lines[::-1])
    assert found == [(name, name) for name in names]


def test_pope_numbered_anew_in_each_split_goes_by_the_order_of_the_lines(tmp_path, pope_rows):
    lines = [line(i, f"{s}/{i}", f"Is there a {x}?") for s in ("popular", "random", "adversarial") for i, x in ((1, "cat"), (2, POPE[s]))]  # fmt: skip
    found = read("pope", pope_rows, tmp_path / "a.jsonl", lines)
    assert all(row_id == text for row_id, text in found) and len(found) == 6


def test_running_numbers_that_the_prompts_contradict_are_refused(tmp_path, pope_rows):
    lines = [line(i, "yes", "Is there a cat?") for i in range(6)]
    with pytest.raises(ConfigError, match=r"a.jsonl: its 6 question ids \(first 0\) are not those"):
        read("pope", pope_rows, tmp_path / "a.jsonl", lines)
    with pytest.raises(ConfigError, match=r"its 2 question ids \(first 1\) are not those of pope"):
        read("pope", pope_rows, tmp_path / "a.jsonl", [line(1, "a"), line(2, "b")])


def test_an_order_of_pope_that_the_prompts_do_not_tell_is_llavas_with_a_warning(
    tmp_path, pope_rows, caplog
):
    names = [f"{split}/{i}" for split in POPE for i in (1, 2)]
    lines = [line(i, name) for i, name in enumerate(names)]
    assert read("pope", pope_rows, tmp_path / "a.jsonl", lines) == [(n, n) for n in names]
    (said,) = caplog.messages
    assert said.startswith("pope: several orders") and said.endswith("adversarial popular random")


def test_running_numbers_of_other_benchmarks_need_the_prompts(tmp_path):
    rows = benchmarks.get("vizwiz").rows(native_files.vizwiz(tmp_path))
    lines = [line(i, row["id"], prompt(row)) for i, row in enumerate(rows)]
    found = read("vizwiz", rows, tmp_path / "a.jsonl", lines)
    assert found == [(row["id"], row["id"]) for row in rows]
    with pytest.raises(ConfigError, match=r"its 3 question ids .first 0. are not those of vizwiz"):
        read("vizwiz", rows, tmp_path / "a.jsonl", [line(i, "x") for i in range(3)])


def test_one_split_of_pope_goes_by_its_own_numbers(tmp_path, pope_rows):
    rows = [row for row in pope_rows if row["split"] == "popular"]
    found = read("pope", rows, tmp_path / "a.jsonl", [line(2, "no"), line(1, "yes")])
    assert found == [("popular/2", "no"), ("popular/1", "yes")]


@pytest.fixture
def seed_twice(tmp_path):
    """Version 1 gives one id to two questions."""
    questions = [
        seed_question(501, "A"),
        seed_question(502, "B"),
        seed_question(501, "C", question="Where?"),
        seed_question("v", "C", kind="video"),
    ]
    write_json(tmp_path / "SEED-Bench.json", {"question_type": {}, "questions": questions})
    return tmp_path


def test_both_questions_with_one_id_are_kept_and_scored(seed_twice):
    rows = benchmarks.get("seed").rows(seed_twice)
    assert [(row["id"], row["answer"]) for row in rows] == [("501", "A"), ("502", "B"), ("501#1", "C")]  # fmt: skip
    asked = [prompt(row) for row in rows]
    lines = [line(501, "C", asked[2]), line("v", "A"), line(501, "B", asked[0]), line(502, "B")]
    found = read("seed", rows, seed_twice / "a.jsonl", lines)
    assert found == [("501#1", "C"), ("501", "B"), ("502", "B")]
    ours = [{"id": "501", "text": "A"}, {"id": "502", "text": "A"}, {"id": "501", "text": "C"}]
    again = read("seed", rows, seed_twice / "b.jsonl", ours)
    assert again == [("501", "A"), ("502", "A"), ("501#1", "C")]
    assert benchmarks.score_answers("seed", rows, again)["score"] == pytest.approx(2 / 3)
    upload = benchmarks.submission("seed", rows, again)["seed_submission.jsonl"]
    assert [json.loads(text) for text in upload.splitlines()] == [
        {"question_id": "501", "prediction": "A"},
        {"question_id": "502", "prediction": "A"},
        {"question_id": "501", "prediction": "C"},
    ]


def test_a_shared_id_without_prompts_goes_by_order_and_with_a_wrong_prompt_is_refused(seed_twice):
    rows = benchmarks.get("seed").rows(seed_twice)
    found = read("seed", rows, seed_twice / "a.jsonl", [line(501, "x"), line(502, "y"), line(501, "z")])  # fmt: skip
    assert found == [("501", "x"), ("502", "y"), ("501#1", "z")]
    with pytest.raises(
        ConfigError, match=r"a.jsonl:1: 2 questions have the id 501, and the prompt"
    ):
        read("seed", rows, seed_twice / "a.jsonl", [line(501, "x", "Why?"), line(501, "z", "How?")])


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"question_id": None}, ":2: 'question_id' must be a string or a whole number"),
        ({"question_id": 1.5}, ":2: 'question_id' must be a string or a whole number"),
        ({"question_id": True}, ":2: 'question_id' must be a string or a whole number"),
        ({"text": 3}, ":2: 'text' must be a string"),
        ({"prompt": ["x"]}, ":2: 'prompt' must be a string"),
        ({"question_id": 99}, "a.jsonl: 1 of 2 question ids are not in gqa .first 99."),
    ],
)
def test_a_bad_line_of_llavas_is_named(tmp_path, bad, match):
    rows = benchmarks.get("gqa").rows(native_files.gqa(tmp_path))
    with pytest.raises(ConfigError, match=match):
        read("gqa", rows, tmp_path / "a.jsonl", [line(7, "left"), line(201307251, "no") | bad])


def test_two_answers_to_one_question_are_duplicates(tmp_path):
    rows = benchmarks.get("gqa").rows(native_files.gqa(tmp_path))
    found = read("gqa", rows, tmp_path / "a.jsonl", [line(7, "left"), line(7, "right")])
    with pytest.raises(ConfigError, match=r"1 duplicate .first '7'."):
        benchmarks.score_answers("gqa", rows, found, allow_missing=True)


def test_one_command_scores_and_converts_llavas_answers(tmp_path, capsys):
    native_files.gqa(tmp_path)
    write_lines(tmp_path / "a.jsonl", [line("7", "Left."), line("201307251", "no"), line("201307252", "x")])  # fmt: skip
    command = ["--score", "--benchmark=gqa", f"--predictions={tmp_path / 'a.jsonl'}", f"--annotations={tmp_path}"]  # fmt: skip
    out = tmp_path / "out"
    assert evaluate.main([*command, f"--convert={out}"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(2 / 3)
    assert (out / "predictions.jsonl").read_text() == (
        '{"id": "7", "text": "Left."}\n{"id": "201307251", "text": "no"}\n{"id": "201307252", "text": "x"}\n'
    )
    upload = json.loads((out / "testdev_balanced_predictions.json").read_text())
    assert upload[2] == {"questionId": "7", "prediction": "left"}
    assert evaluate.main([*command[:2], f"--predictions={out / 'predictions.jsonl'}", command[3]]) == 0  # fmt: skip


def test_hidden_gold_is_converted_without_a_score(tmp_path, capsys):
    native_files.mmvet(tmp_path)
    write_lines(tmp_path / "a.jsonl", [line(1, "b"), line(0, "a")])
    command = ["--score", "--benchmark=mmvet", f"--predictions={tmp_path / 'a.jsonl'}", f"--annotations={tmp_path}"]  # fmt: skip
    assert evaluate.main([*command, f"--convert={tmp_path / 'out'}"]) == 0
    expected = {"benchmark": "mmvet", "score": None, "error": None, "n": 2}
    assert json.loads(capsys.readouterr().out) == expected
    upload = json.loads((tmp_path / "out" / "mm-vet_answers.json").read_text())
    assert upload == {"v1_0": "a", "v1_1": "b"}
    assert evaluate.main(command) == 2
    assert "upload mm-vet_answers.json" in capsys.readouterr().err
