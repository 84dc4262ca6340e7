"""Parquet files as the hub ships them, and POPE on other pictures: the same questions as in the official files."""

import bench
import native_files
import pytest
from native_files import embedded, png, write_json, write_lines, write_parquet, write_shards

from vlm_jax import benchmarks
from vlm_jax.settings.checks import ConfigError


def test_gqa_finds_the_pictures_in_their_own_files(tmp_path):
    rows = benchmarks.get("gqa").rows(native_files.gqa(tmp_path))
    questions = [
        {"id": row["id"], "imageId": row["image"][7:9], "question": q, "answer": row["answer"]}
        for row, q in zip(rows, ("Is it a cat?", "Who is tall?", "Where?"), strict=True)
    ]
    hub = tmp_path / "hub"
    name = "testdev-00000-of-00001.parquet"
    write_parquet(hub / "testdev_balanced_instructions" / name, questions)
    pictures = [{"id": i, "image": embedded()} for i in ("n2", "n1")]
    write_parquet(hub / "testdev_balanced_images" / name, pictures)
    assert bench.same_but_for_the_image(rows, benchmarks.get("gqa").rows(hub), tmp_path)
    inside = benchmarks.get("gqa").rows(hub / "testdev_balanced_instructions")
    assert [row["id"] for row in inside] == [row["id"] for row in rows]
    write_parquet(hub / "testdev_balanced_images" / name, pictures[:1])
    with pytest.raises(
        ConfigError, match="row 0: there is no image 'n1' in testdev_balanced_images"
    ):
        benchmarks.get("gqa").rows(hub)


@pytest.mark.parametrize("folder", ["ScienceQA-FULL", "data", ".", "ScienceQA-IMG"])
def test_scienceqa_numbers_the_rows_of_the_hub(tmp_path, folder):
    rows = benchmarks.get("scienceqa").rows(native_files.scienceqa(tmp_path))
    problems = [
        native_files.science_problem(0, embedded(), "See the picture."),
        native_files.science_problem(1, hint=None),
        native_files.science_problem(2, embedded()),
        native_files.science_problem(1, hint="Read.", choices=("a", "b")),
    ]
    hub = tmp_path / "hub"
    write_parquet(hub / folder / "test-00000-of-00001.parquet", problems)
    found = benchmarks.get("scienceqa").rows(hub)
    assert [row["id"] for row in found] == ["0", "1", "2", "3"]
    for one, other in zip(found, rows, strict=True):
        assert ("image" in one) == ("image" in other)
        assert {**one, "id": 0, "image": 0} == {**other, "id": 0, "image": 0}
    result = bench.score("scienceqa", found, ["A", "B", "A", "B"])
    assert (result["score"], result["details"]["all"]) == (0.5, 0.75)


def test_vqav2_reads_the_hubs_validation_before_its_tests(tmp_path):
    rows = benchmarks.get("vqav2").rows(native_files.vqav2(tmp_path))
    golds = {42000: [("yes", 10)], 42001: [("no", 10)], 42002: [("2", 7), ("3", 3)]}
    records = [
        {"question_id": row["question_id"], "image_id": 42 + i, "question": f"What is {i}?",
         "answers": native_files.humans(*golds[row["question_id"]]), "answer_type": row["answer_type"]}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    hub = tmp_path / "hub"
    write_shards(hub, "validation", records, [tmp_path / row["image"] for row in rows])
    test = [{"question_id": 5, "question": "?", "image": embedded(), "answers": None}]
    write_parquet(hub / "data" / "testdev-00000-of-00001.parquet", test)
    assert bench.same_but_for_the_image(rows, benchmarks.get("vqav2").rows(hub), tmp_path)
    hidden = benchmarks.get("vqav2").rows(hub / "data" / "testdev-00000-of-00001.parquet")
    assert [row["answer"] for row in hidden] == [None]
    (name,) = benchmarks.submission("vqav2", hidden, [("5", "x")])
    assert name == "v2_OpenEnded_mscoco_test-dev2015_vlmjax_results.json"


def test_vizwiz_reads_the_hubs_validation_before_its_test(tmp_path):
    rows = benchmarks.get("vizwiz").rows(native_files.vizwiz(tmp_path))
    records = [
        {"question_id": row["id"][:-4], "question": "What is this?", "answers": row["answer"],
         "category": row["answer_type"]}
        for row in rows
    ]  # fmt: skip
    hub = tmp_path / "hub"
    write_shards(hub, "val", records, [tmp_path / row["image"] for row in rows])
    test = {"question_id": "VizWiz_test_00000000.jpg", "question": "?", "image": embedded()}
    write_parquet(hub / "data" / "test-00000-of-00001.parquet", [test])
    assert bench.same_but_for_the_image(rows, benchmarks.get("vizwiz").rows(hub), tmp_path)
    (row,) = benchmarks.get("vizwiz").rows(hub / "data" / "test-00000-of-00001.parquet")
    assert (row["id"], row["answer"]) == ("VizWiz_test_00000000.jpg", None)


@pytest.mark.parametrize(("name", "split"), [("mmvet", "test"), ("llava_bench", "train")])
def test_judged_benchmarks_of_the_hub_are_the_same_questions(tmp_path, name, split):
    rows = benchmarks.get(name).rows(native_files.FIXTURES[name](tmp_path))
    records = [
        {"question_id": row["id"] if name == "mmvet" else int(row["id"]), "question": row["question"], "answer": "x"}
        for row in rows
    ]  # fmt: skip
    hub = tmp_path / "hub"
    write_shards(hub, split, records, [tmp_path / row["image"] for row in rows])
    assert bench.same_but_for_the_image(rows, benchmarks.get(name).rows(hub), tmp_path)


@pytest.mark.parametrize("folder", ["Full", "."])
def test_pope_full_has_a_parquet_file_per_split(tmp_path, folder):
    rows = benchmarks.get("pope").rows(native_files.pope(tmp_path))
    hub = tmp_path / "hub"
    for split in ("adversarial", "popular", "random"):
        records = [
            {"id": str(i), "question_id": row["llava_id"], "question": "Is there a cat in the image?",
             "answer": row["answer"], "category": split, "image": embedded()}
            for i, row in enumerate(rows) if row["split"] == split
        ]  # fmt: skip
        write_parquet(hub / folder / f"{split}-00000-of-00001.parquet", records)
    assert bench.same_but_for_the_image(rows, benchmarks.get("pope").rows(hub), tmp_path)
    popular = hub / folder / "popular-00000-of-00001.parquet"
    assert len(benchmarks.get("pope").rows(popular)) == 4
    popular.unlink()
    with pytest.raises(ConfigError, match=r"holds none of Full/popular-\*.parquet, popular-"):
        benchmarks.get("pope").rows(hub)


@pytest.mark.parametrize(("source", "images"), [("gqa", "images"), ("aokvqa", "val2014"), ("coco", "val2014")])  # fmt: skip
@pytest.mark.parametrize("write", [write_json, write_lines])
def test_pope_on_other_pictures_reads_lists_and_lines(tmp_path, source, images, write):
    for split in ("random", "popular", "adversarial"):
        records = [{"question_id": i, "image": "1.jpg", "text": "Is there a cup?", "label": label} for i, label in ((1, "yes"), (2, "no"))]  # fmt: skip
        seem = "" if source == "coco" else "_seem"
        write(tmp_path / f"{source}_pope{seem}_{split}.json", records)
    rows = benchmarks.get("pope").rows(tmp_path)
    assert [row["id"] for row in rows][:3] == ["random/1", "random/2", "popular/1"]
    assert {row["image"] for row in rows} == {f"{images}/1.jpg"} and len(rows) == 6
    assert bench.score("pope", rows, ["yes", "no"] * 3)["score"] == 1.0
    write_json(tmp_path / "llava_pope_test.jsonl", [])  # no file of POPE's
    assert benchmarks.get("pope").rows(tmp_path) == rows
    other = "gqa" if source == "coco" else "coco"
    write(tmp_path / f"{other}_pope_random.json", records)
    with pytest.raises(ConfigError, match=r"holds files of .*; keep those of one in a folder"):
        benchmarks.get("pope").rows(tmp_path)


@pytest.mark.parametrize("name", ["artwork/images/0002.jpg", "artwork/0002.jpg"])
def test_mme_of_the_hub_may_name_the_folder_of_the_images(tmp_path, name):
    records = [
        {"question_id": name, "question": f"Is it {x}? Please answer yes or no.", "answer": gold, "category": "artwork",
         "image": embedded()}
        for x, gold in (("red", "Yes"), ("blue", "No"))
    ]  # fmt: skip
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", records)
    rows = benchmarks.get("mme").rows(tmp_path)
    assert [row["id"] for row in rows] == ["artwork/0002.jpg/0", "artwork/0002.jpg/1"]
    assert rows[0]["task"] == "artwork" and rows[1]["image"]() == png()


def test_two_blanks_before_mmes_sentence_leave_none(tmp_path):
    native_files.mme_task(tmp_path, "count", "1")
    (tmp_path / "count" / "1.txt").write_text(
        "Is it 3?  Please answer yes or no.\tYes\nIs it 4? \tNo\n"
    )
    asked = [bench.asked(row) for row in benchmarks.get("mme").rows(tmp_path)]
    ending = "\nAnswer the question using a single word or phrase."
    assert asked == [f"Is it {i}?{ending}" for i in (3, 4)]
