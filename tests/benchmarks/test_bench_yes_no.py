"""POPE and MME: native files, yes and no as their evaluators read them, points worked out by hand."""

import bench
import native_files
import pytest
from native_files import MME_QUESTION, POPE_LABELS, mme_task

from vlm_jax import benchmarks
from vlm_jax.benchmarks import mme, pope
from vlm_jax.settings.checks import ConfigError

# Per split of native_files.pope.
ANSWERS = {
    "random": ["Yes", "yes.", "No, it is not", "no"],  # all right
    "popular": ["Yes", "no", "Yes", "No"],  # one hit, one miss, one false alarm
    "adversarial": ["No", "no", "there is not a cat", "No."],  # never yes
}


@pytest.fixture
def pope_dir(tmp_path):
    return native_files.pope(tmp_path)


def test_pope_reads_its_three_splits(pope_dir):
    rows = benchmarks.get("pope").rows(pope_dir)
    assert [row["id"] for row in rows][:5] == [
        "random/1", "random/2", "random/3", "random/4", "popular/1",
    ]  # fmt: skip
    assert bench.asked(rows[0]) == (
        "Is there a cat in the image?\nAnswer the question using a single word or phrase."
    )
    assert len(rows) == 12 and (pope_dir / rows[11]["image"]).is_file()
    one = benchmarks.get("pope").rows(pope_dir / "coco_pope_popular.json")
    assert one == rows[4:8]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"), ("Yes, there is no doubt", "no"), ("No", "no"), ("no", "no"), ("No.", "no"), ("No,", "no"),
        ("Yes. No", "yes"), ("NO", "yes"), ("nothing", "yes"), ("it is not", "no"), ("", "yes"), ("yes, a cat", "yes"),
        ("No\nwhat", "yes"), (" no ", "no"), (".no", "yes"), ("否", "yes"), ("n,o", "no"), ("Not", "yes"),
    ],
)  # fmt: skip
def test_pope_reads_the_first_sentence_as_its_evaluator_does(text, expected):
    assert pope.parse(text) == expected


def test_pope_scores_the_mean_f1_and_tells_the_yes_ratio_of_the_answers(pope_dir):
    rows = benchmarks.get("pope").rows(pope_dir)
    result = bench.score("pope", rows, [text for split in ANSWERS for text in ANSWERS[split]])
    assert result["score"] == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert (result["error"], result["n"]) == (pytest.approx(0.5), 12)
    expected = {
        "random": (1.0, 1.0, 1.0, 1.0, 0.5),
        "popular": (0.5, 0.5, 0.5, 0.5, 0.5),
        "adversarial": (0.75, 0.0, 0.0, 0.0, 0.0),
    }
    names = ("accuracy", "f1", "precision", "recall", "yes_ratio")
    assert result["details"] == {
        f"{split}.{name}": value
        for split, values in expected.items()
        for name, value in zip(names, values, strict=True)
    }
    bench.fuzz("pope", rows)


def test_pope_f1_weighs_misses_and_false_alarms(pope_dir):
    """Always yes on the adversarial split: one hit, three false alarms, so F1 = 2 / (2 + 3)."""
    file = pope_dir / "coco_pope_adversarial.json"
    result = bench.score("pope", benchmarks.get("pope").rows(file), ["yes"] * 4)
    assert result["score"] == pytest.approx(0.4)
    details = {name.split(".")[1]: value for name, value in result["details"].items()}
    assert details == {
        "accuracy": 0.25, "f1": 0.4, "precision": 0.25, "recall": 1.0, "yes_ratio": 1.0,
    }  # fmt: skip


def test_pope_wants_every_split_and_good_labels(pope_dir):
    file = pope_dir / "coco_pope_random.json"
    with file.open("a") as out:
        out.write('{"question_id": 9, "image": "a.jpg", "text": "?", "label": "maybe"}\n')
    with pytest.raises(ConfigError, match=r"coco_pope_random.json row 4: 'label' must be yes"):
        benchmarks.get("pope").rows(pope_dir)
    file.unlink()
    with pytest.raises(ConfigError, match=r"holds no coco_pope_random\.json"):
        benchmarks.get("pope").rows(pope_dir)


@pytest.fixture
def mme_dir(tmp_path):
    return native_files.mme(tmp_path)


def test_mme_reads_both_layouts_of_a_task(mme_dir):
    rows = benchmarks.get("mme").rows(mme_dir)
    assert [row["id"] for row in rows] == [
        "count/0001.png/0", "count/0001.png/1", "count/0002.png/0", "count/0002.png/1", "posters/tt01.jpg/0",
        "posters/tt01.jpg/1", "code_reasoning/0001.png/0", "code_reasoning/0001.png/1",
    ]  # fmt: skip
    assert bench.asked(rows[0]) == (
        "Is there a cat here?\nAnswer the question using a single word or phrase."
    )
    assert [row["answer"] for row in rows[:2]] == ["yes", "no"]
    assert all((mme_dir / row["image"]).is_file() for row in rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"), ("Yes, it is", "yes"), ("NO", "no"), ("no.", "no"), ("not sure", "no"), ("It is no", "other"),
        ("", "other"), (" yes", "yes"), ("a no", "no"), ("\n\nNo", "no"), ("yno", "no"), ("oh yes", "other"),
        ("know", "no"), ("y", "other"), ("ye s", "other"), ("是", "other"),
    ],
)  # fmt: skip
def test_mme_looks_at_the_first_four_characters(text, expected):
    assert mme.parse(text) == expected


def test_mme_points_are_questions_and_whole_images(mme_dir, caplog):
    texts = [
        "Yes", "No",  # count/0001: both right
        "Yes", "Yes",  # count/0002: one right
        "maybe", "no",  # posters: one right, one other
        "yes, it is", "No.",  # code_reasoning: both right
    ]  # fmt: skip
    rows = benchmarks.get("mme").rows(mme_dir)
    result = bench.score("mme", rows, texts)
    # count: 75 + 50; posters: 50 + 0; code_reasoning: 100 + 100
    assert result["details"] == {
        "perception": 175.0, "cognition": 200.0, "perception_score": 175 / 2000, "tasks": 3,
        "count.acc": 0.75, "count.acc_plus": 0.5, "posters.acc": 0.5, "posters.acc_plus": 0.0,
        "code_reasoning.acc": 1.0, "code_reasoning.acc_plus": 1.0,
    }  # fmt: skip
    assert result["score"] == pytest.approx(375 / 2800)
    absent = set(mme.PERCEPTION + mme.COGNITION) - {"count", "posters", "code_reasoning"}
    said = caplog.messages[0].removeprefix("mme: no answer in ").partition(":")[0]
    assert set(said.split(", ")) == absent
    assert (result["error"], result["n"]) == (pytest.approx(1 - 375 / 2800), 8)
    bench.fuzz("mme", rows)


def test_mme_with_every_task_right_has_all_points(tmp_path, caplog):
    for task in mme.PERCEPTION + mme.COGNITION:
        mme_task(tmp_path / "MME_Benchmark_release_version", task, "1")
    rows = benchmarks.get("mme").rows(tmp_path)
    assert len(rows) == 28 and (tmp_path / rows[0]["image"]).is_file()
    result = bench.score("mme", rows, [row["answer"] for row in rows])
    assert (result["score"], result["error"]) == (1.0, 0.0)
    assert (result["details"]["perception"], result["details"]["cognition"]) == (2000.0, 800.0)
    assert not caplog.messages


def test_mme_image_with_one_question_answered_is_not_whole(mme_dir):
    rows = benchmarks.get("mme").rows(mme_dir)
    answers = [("count/0001.png/0", "yes")]
    result = benchmarks.score_answers("mme", rows, answers, allow_missing=True)
    assert (result["details"]["count.acc"], result["details"]["count.acc_plus"]) == (1.0, 0.0)


def test_mme_names_a_file_that_is_wrong(mme_dir):
    text = mme_dir / "count" / "0001.txt"
    text.write_text("Is it? Please answer yes or no.\tYes\n")
    with pytest.raises(ConfigError, match=r"0001.txt: must hold two questions, not 1"):
        benchmarks.get("mme").rows(mme_dir)
    text.write_text("Is it?\tYes\nIs it not? No\n")
    with pytest.raises(ConfigError, match=r"0001.txt line 2: must be question<TAB>Yes or No"):
        benchmarks.get("mme").rows(mme_dir)
    (mme_dir / "count" / "0001.png").unlink()
    with pytest.raises(ConfigError, match=r"0001.txt needs one image of that name"):
        benchmarks.get("mme").rows(mme_dir)
    with pytest.raises(ConfigError, match="holds no task folder"):
        benchmarks.get("mme").rows(mme_dir / "posters")


def test_pope_and_mme_of_the_hub_are_the_same_questions(pope_dir, mme_dir, tmp_path):
    rows = benchmarks.get("pope").rows(pope_dir)
    records = [
        {"question_id": row["id"].split("/")[1], "question": "Is there a cat in the image?", "answer": row["answer"],
         "category": row["split"]}
        for row in rows
    ]  # fmt: skip
    hub = tmp_path / "hub_pope"
    native_files.write_shards(hub, "test", records, [pope_dir / row["image"] for row in rows])
    hub_rows = benchmarks.get("pope").rows(hub)
    assert bench.same_but_for_the_image(rows, hub_rows, pope_dir)
    rows = benchmarks.get("mme").rows(mme_dir)
    records = [
        {"question_id": row["id"][:-2], "question": MME_QUESTION.format(("cat", "dog")[i % 2]), "category": row["task"],
         "answer": row["answer"].title()}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    hub = tmp_path / "hub_mme"
    native_files.write_shards(hub, "test", records, [mme_dir / row["image"] for row in rows])
    hub_rows = benchmarks.get("mme").rows(hub)
    assert bench.same_but_for_the_image(rows, hub_rows, mme_dir)
    (hub / "data" / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(ConfigError, match="add the others"):
        benchmarks.get("mme").rows(hub)
    (hub / "data" / "test-00000-of-00002.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ConfigError, match=r"test-00000-of-00002\.parquet: is not valid parquet"):
        benchmarks.get("mme").rows(hub / "data" / "test-00000-of-00002.parquet")


def test_pope_finds_its_images_beside_the_folder_of_its_files(pope_dir):
    coco = pope_dir / "coco"
    coco.mkdir()
    for split in POPE_LABELS:
        (pope_dir / f"coco_pope_{split}.json").rename(coco / f"coco_pope_{split}.json")
    (row, *_) = benchmarks.get("pope").rows(coco)
    assert row["image"] == "../val2014/COCO_val2014_1.jpg" and (coco / row["image"]).is_file()


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("pope", {"category": "easy"}, "'category' must be one of random, popular, adversarial"),
        ("pope", {"answer": "Yes"}, "'answer' must be yes or no, got 'Yes'"),
        ("mme", {"question_id": "size/1.png"}, "'size/1.png', 'yes' is not one of a picture's"),
        ("mme", {"answer": "maybe"}, "'count/1.png', 'maybe' is not one"),
    ],
)
def test_a_bad_row_of_the_hub_is_named(tmp_path, name, change, match):
    record = {
        "question_id": "count/1.png", "question": "?", "answer": "yes", "category": "random",
        "image": native_files.embedded(),
    }  # fmt: skip
    path = tmp_path / "test-00000-of-00001.parquet"
    native_files.write_parquet(path, [record, record | change])
    with pytest.raises(ConfigError, match=f"row 1: {match}"):
        benchmarks.get(name).rows(tmp_path)


def test_a_third_question_about_a_picture_of_mme_is_refused(tmp_path):
    record = {"question_id": "count/1.png", "question": "?", "answer": "yes", "image": native_files.embedded()}  # fmt: skip
    native_files.write_parquet(tmp_path / "test-0.parquet", [record] * 3)
    with pytest.raises(ConfigError, match=r"row 2: 'count/1.png', 'yes' is not one of a picture's"):
        benchmarks.get("mme").rows(tmp_path)
