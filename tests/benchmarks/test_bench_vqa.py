"""VQA accuracy and its normaliser, then VQAv2, VizWiz and TextVQA from their native files."""

import json

import bench
import native_files
import pytest
from native_files import golds

from vlm_jax import benchmarks
from vlm_jax.benchmarks import vqa
from vlm_jax.settings.checks import ConfigError

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"), ("A red  cat", "red cat"), ("the", ""), ("", ""), ("...", ""),
        ("two dogs", "2 dogs"), ("None", "0"), ("ten", "10"), ("eleven", "eleven"),
        ("dont", "don't"), ("don't", "don't"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"),
        ("Im", "im"), ("somebody'd", "somebodyd"), ("yalld've", "yalld've"), ("y'alld've", "y'all'd've"),
        ("the dog's bowl", "dog 's bowl"), ("1,000", "1000"), ("10 1/2", "10 1 2"), ("10 1 / 2", "10 1 2"),
        ("3.5", "3.5"), ("3.", "3"), ("St. Louis", "st louis"), ("4:30 p.m.", "4:30 pm"), ("$5", "$5"),
        ("black/white", "black white"), ("black / white", "black white"), ("black- white", "black white"),
        ("t-shirt", "t shirt"), ("really?", "really"), ("wow!", "wow"), ("wow! yes", "wow yes"), ("why?not", "whynot"),
        ("é,è", "éè"), ("a\nb", "b"), ("漢 字", "漢 字"), ("?", ""), ("one, two; three", "1 2 3"),
    ],
)  # fmt: skip
def test_the_normaliser_follows_its_five_steps(text, expected):
    assert vqa.normalise(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a-b", "a b"), ("a- b", "a b"), ("a -b", "a b"), ("a-b c- d", "ab c d"), ("1,000", "1000"),
        ("1,000-x", "1000x"), ("x,y", "x y"), ("x,y-z", "x y z"), ("5.", "5"), (".5", ".5"), ("a.b", "ab"),
        ("wow!", "wow "), ("'", "'"),
    ],
)  # fmt: skip
def test_a_mark_goes_where_it_stands_beside_a_blank_or_the_text_has_a_number_with_comma(
    text, expected
):
    assert vqa.strip_punctuation(text) == expected


def test_at_most_32_periods_are_dropped():
    assert vqa.strip_punctuation("." * 40) == "." * 8


def test_the_table_of_contractions_is_the_official_one_but_for_what_lower_case_words_cannot_meet():
    assert len(vqa.CONTRACTIONS) == 114  # of 120; let's and she's stand for themselves
    for wrong, right in {
        "aint": "ain't", "maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
        "ow's'at": "'ow's'at", "hed've": "he'd've", "he'dve": "he'd've", "yall'll": "y'all'll", "y'allll": "y'all'll",
        "yall'd've": "y'all'd've", "y'all'dve": "y'all'd've", "whyre": "why're",
    }.items():  # fmt: skip
        assert vqa.CONTRACTIONS[wrong] == right


@pytest.mark.parametrize(
    ("humans", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)],
)
def test_agreement_is_the_mean_over_the_ten_ways_to_leave_one_human_out(humans, expected):
    golds = ["x"] * humans + ["y"] * (10 - humans)
    left_out = [golds[:i] + golds[i + 1 :] for i in range(10)]
    slow = sum(min(1.0, others.count("x") / 3) for others in left_out) / 10
    assert vqa.agreement("x", golds) == pytest.approx(slow)
    assert vqa.agreement("x", golds) == expected


MIXED = golds(("a red cat", 2), ("Red-cat", 3), ("dog", 4), ("1,000", 1))


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("red cat", MIXED, 1.0),  # "a red cat" and "Red-cat" become the same: five humans
        ("A red cat.", MIXED, 1.0),
        ("Dog", MIXED, 1.0),
        ("1000", MIXED, 0.3),
        ("1,000", MIXED, 0.3),
        ("cat", MIXED, 0.0),
        ("", MIXED, 0.0),
        ("Yes", golds(("yes", 10)), 1.0),
        ("yes.", golds(("yes", 10)), 1.0),
        ("two", golds(("2", 10)), 1.0),
        ("2", golds(("two", 10)), 0.0),  # equal golds stay as they are
        ("2", golds(("two", 9), ("3", 1)), 1.0),
        ("a cat", golds(("a cat", 10)), 0.0),  # the upload has lost its article, the equal golds keep it
        ("t shirt", golds(("t-shirt", 3), ("shirt", 7)), 0.9),
        ("2", golds((" 2\n", 10)), 1.0),
        ("dont know", golds(("don't know", 2), ("no", 8)), 0.6),
    ],
)  # fmt: skip
def test_vqa_accuracy_follows_the_newer_evaluator(text, answers, expected):
    assert vqa.accuracy(text, {"answer": answers}) == expected


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("a cat", golds(("a cat", 10)), 1.0),
        ("2", golds(("two", 10)), 1.0),
        ("Nokia", golds(("nokia", 2), ("NOKIA.", 1), ("phone", 7)), 0.9),
        ("nokia?", golds(("nokia", 1), ("phone", 9)), 0.3),
        ("", golds(("", 4), ("x", 6)), 1.0),
        ("10 1/2", golds(("10 1 2", 3), ("10.5", 7)), 0.9),
    ],
)
def test_textvqa_normalises_golds_and_answer_alike(text, answers, expected):
    assert vqa.normalised_accuracy(text, {"answer": answers}) == expected


@pytest.fixture
def vqav2_dir(tmp_path):
    return native_files.vqav2(tmp_path)


def test_vqav2_reads_questions_with_their_ten_answers(vqav2_dir):
    rows = benchmarks.get("vqav2").rows(vqav2_dir)
    assert [row["id"] for row in rows] == ["42000", "42001", "42002"]
    assert bench.asked(rows[1]) == "What is 1?" + SHORT
    assert rows[0]["image"] == "val2014/COCO_val2014_000000000042.jpg"
    assert (vqav2_dir / rows[0]["image"]).is_file()
    assert rows[2]["answer"] == ["2"] * 7 + ["3"] * 3


def test_vqav2_scores_by_answer_type(vqav2_dir):
    rows = benchmarks.get("vqav2").rows(vqav2_dir)
    result = bench.score("vqav2", rows, ["Yes", "yes", "three"])
    assert result["score"] == pytest.approx((1.0 + 0.0 + 0.9) / 3)
    assert result["details"] == {"number": pytest.approx(0.9), "yes/no": 0.5}
    assert result["n"] == 3
    bench.fuzz("vqav2", rows)


def test_vqav2_test_split_is_uploaded_and_not_scored(vqav2_dir):
    (vqav2_dir / "v2_OpenEnded_mscoco_val2014_questions.json").rename(
        vqav2_dir / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    )
    rows = benchmarks.get("vqav2").rows(vqav2_dir)
    assert rows[0]["image"] == "test2015/COCO_test2015_000000000042.jpg"
    assert not benchmarks.has_gold(rows)
    answers = [("42002", "Two dogs."), ("42001", "a t-shirt"), ("42000", "yes")]
    uploads = benchmarks.submission("vqav2", rows, answers)
    (name,) = uploads
    assert name == "v2_OpenEnded_mscoco_test-dev2015_vlmjax_results.json"
    assert json.loads(uploads[name]) == [
        {"question_id": 42000, "answer": "yes"},
        {"question_id": 42001, "answer": "t shirt"},
        {"question_id": 42002, "answer": "2 dogs"},
    ]
    with pytest.raises(ConfigError, match=r"upload v2_OpenEnded_mscoco_test-dev2015_vlmjax"):
        benchmarks.score_answers("vqav2", rows, answers)


def test_vqav2_faults_are_named(vqav2_dir):
    gold = vqav2_dir / "v2_mscoco_val2014_annotations.json"
    records = json.loads(gold.read_text())
    records["annotations"][1]["answers"].pop()
    gold.write_text(json.dumps(records))
    with pytest.raises(
        ConfigError, match=r"annotations.json row 1: 'answers' must be 10 texts, got 9"
    ):
        benchmarks.get("vqav2").rows(vqav2_dir)
    del records["annotations"][1]
    gold.write_text(json.dumps(records))
    with pytest.raises(ConfigError, match=r"row 2: question 42002 has no answers"):
        benchmarks.get("vqav2").rows(vqav2_dir)
    gold.unlink()
    with pytest.raises(ConfigError, match=r"v2_mscoco_val2014_annotations.json does not exist"):
        benchmarks.get("vqav2").rows(vqav2_dir)
    val = vqav2_dir / "v2_OpenEnded_mscoco_val2014_questions.json"
    (vqav2_dir / "v2_OpenEnded_mscoco_test2015_questions.json").write_bytes(val.read_bytes())
    with pytest.raises(ConfigError, match=r"name the file that is meant"):
        benchmarks.get("vqav2").rows(vqav2_dir)
    rows = benchmarks.get("vqav2").rows(vqav2_dir / "v2_OpenEnded_mscoco_test2015_questions.json")
    assert len(rows) == 3


@pytest.fixture
def vizwiz_dir(tmp_path):
    return native_files.vizwiz(tmp_path)


def test_vizwiz_asks_with_the_way_out(vizwiz_dir):
    rows = benchmarks.get("vizwiz").rows(vizwiz_dir)
    assert [row["id"] for row in rows] == [f"VizWiz_val_0000000{i}.jpg" for i in range(3)]
    assert bench.asked(rows[0]) == (
        "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        + SHORT
    )
    assert (vizwiz_dir / rows[0]["image"]).is_file()


def test_vizwiz_validation_is_scored_here(vizwiz_dir):
    rows = benchmarks.get("vizwiz").rows(vizwiz_dir)
    result = bench.score("vizwiz", rows, ["Unanswerable", "a can", "soap"])
    assert result["score"] == pytest.approx((1.0 + 0.9 + 0.0) / 3)
    assert result["details"] == {"other": pytest.approx(0.45), "unanswerable": 1.0}
    bench.fuzz("vizwiz", rows)


def test_vizwiz_test_is_uploaded(vizwiz_dir):
    asked = [{"image": f"VizWiz_test_{i}.jpg", "question": "What?"} for i in range(2)]
    (vizwiz_dir / "test.json").write_text(json.dumps(asked))
    with pytest.raises(
        ConfigError, match=r"holds test.json, val.json; name the file that is meant"
    ):
        benchmarks.get("vizwiz").rows(vizwiz_dir)
    rows = benchmarks.get("vizwiz").rows(vizwiz_dir / "test.json")
    assert rows[1]["image"] == "test/VizWiz_test_1.jpg" and not benchmarks.has_gold(rows)
    answers = [("VizWiz_test_1.jpg", "Unanswerable."), ("VizWiz_test_0.jpg", "Two")]
    uploads = benchmarks.submission("vizwiz", rows, answers)
    assert json.loads(uploads["vizwiz_answers.json"]) == [
        {"image": "VizWiz_test_0.jpg", "answer": "2"},
        {"image": "VizWiz_test_1.jpg", "answer": "unanswerable"},
    ]


@pytest.fixture
def textvqa_dir(tmp_path):
    return native_files.textvqa(tmp_path)


def test_the_two_variants_of_textvqa_differ_by_the_line_of_tokens(textvqa_dir):
    alone = benchmarks.get("textvqa").rows(textvqa_dir)
    helped = benchmarks.get("textvqa_ocr").rows(textvqa_dir)
    assert [row["id"] for row in alone] == ["34602", "34603", "34604"]
    assert bench.asked(alone[0]) == "what brand is it?" + SHORT
    line = "\nReference OCR token: "
    assert bench.asked(helped[1]) == f"what brand is it?{line}DAKOTA, DIGITAL{SHORT}"
    assert bench.asked(helped[2]) == f"what brand is it?{line}{SHORT}"
    assert (textvqa_dir / alone[2]["image"]).is_file()
    same = ("id", "image", "answer")
    assert [[row[k] for k in same] for row in alone] == [[row[k] for k in same] for row in helped]


@pytest.mark.parametrize("name", ["textvqa", "textvqa_ocr"])
def test_textvqa_scores_agreement(textvqa_dir, name):
    rows = benchmarks.get(name).rows(textvqa_dir)
    result = bench.score(name, rows, ["Nous les gosses", "dakota digital.", "five"])
    assert result["score"] == pytest.approx((1.0 + 0.9 + 0.0) / 3)
    bench.fuzz(name, rows)


def test_textvqa_with_tokens_needs_the_tokens_of_every_image(textvqa_dir):
    tokens = textvqa_dir / "TextVQA_Rosetta_OCR_v0.2_val.json"
    data = json.loads(tokens.read_text())["data"]
    tokens.write_text(json.dumps({"data": data[:1]}))
    with pytest.raises(ConfigError, match=r"row 2: there are no OCR tokens of image '3af0'"):
        benchmarks.get("textvqa_ocr").rows(textvqa_dir)
    tokens.unlink()
    with pytest.raises(
        ConfigError, match=r"holds none of TextVQA_Rosetta_OCR_v0.2_val.json, llava_"
    ):
        benchmarks.get("textvqa_ocr").rows(textvqa_dir)
    assert len(benchmarks.get("textvqa").rows(textvqa_dir)) == 3


def test_llava_question_file_gives_the_same_tokens(textvqa_dir):
    rows = benchmarks.get("textvqa_ocr").rows(textvqa_dir)
    lines = [
        {"question_id": row["image"][13:-4], "image": row["image"], "text": bench.asked(row)}
        for row in rows
    ]
    file = textvqa_dir / "llava_textvqa_val_v051_ocr.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match="name the file that is meant"):
        benchmarks.get("textvqa_ocr").rows(textvqa_dir)
    (textvqa_dir / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    assert benchmarks.get("textvqa_ocr").rows(textvqa_dir) == rows
    lines[1]["text"] = "what brand is it?" + SHORT
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match=r"row 1: 'text' has no line 'Reference OCR token:'"):
        benchmarks.get("textvqa_ocr").rows(textvqa_dir)


def test_a_question_file_of_llava_is_answered_in_its_answer_file(tmp_path):
    rows = benchmarks.get("llava_questions").rows(native_files.llava_questions(tmp_path))
    assert [row["id"] for row in rows] == ["count/1.png", "count/1.png#1", "7"]
    assert [bench.asked(row) for row in rows] == ["Two?", "Three?", "Why?"]
    answers = [("7", "so"), ("count/1.png#1", "No"), ("count/1.png", "Yes")]
    uploads = benchmarks.submission("llava_questions", rows, answers)
    written = [json.loads(line) for line in uploads["answers.jsonl"].splitlines()]
    assert [(w["question_id"], w["prompt"], w["text"]) for w in written] == [
        ("count/1.png", "Two?", "Yes"), ("count/1.png", "Three?", "No"), (7, "Why?", "so"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"upload answers\.jsonl"):
        benchmarks.score_answers("llava_questions", rows, answers)


def test_two_questions_of_one_id_are_refused(textvqa_dir):
    path = textvqa_dir / "TextVQA_0.5.1_val.json"
    records = json.loads(path.read_text())["data"]
    path.write_text(json.dumps({"data": [*records, records[0]]}))
    with pytest.raises(ConfigError, match="has two questions with id '34602'"):
        benchmarks.get("textvqa").rows(textvqa_dir)


@pytest.mark.parametrize("name", ["textvqa", "textvqa_ocr"])
def test_textvqa_of_the_hub_is_the_same_questions(textvqa_dir, tmp_path, name):
    rows = benchmarks.get(name).rows(textvqa_dir)
    tokens = [["DAKOTA", "DIGITAL"], ["DAKOTA", "DIGITAL"], []]
    records = [
        {"question_id": int(row["id"]), "image_id": row["llava_id"], "question": "what brand is it?",
         "answers": row["answer"], "ocr_tokens": seen}
        for row, seen in zip(rows, tokens, strict=True)
    ]  # fmt: skip
    hub = tmp_path / "hub"
    native_files.write_shards(
        hub, "validation", records, [textvqa_dir / row["image"] for row in rows]
    )
    assert bench.same_but_for_the_image(rows, benchmarks.get(name).rows(hub), textvqa_dir)
