"""What holds for every benchmark, over the tiny native files of native_files.FIXTURES."""

import bench
import numpy as np
import pytest
from native_files import FIXTURES

from vlm_jax import benchmarks, files
from vlm_jax.data import images
from vlm_jax.settings.checks import ConfigError

REPLIES = ("scienceqa", "mmbench", "mmbench_cn", "seed", "ai2d", "mmmu", "mathvista", "pope", "mme")
LETTERS = ("A", "B", "C", "D", "E")


def test_every_benchmark_has_a_fixture():
    assert set(FIXTURES) == set(benchmarks.BENCHMARKS)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_row_is_one_that_the_pipeline_takes_and_its_pictures_decode(tmp_path, name):
    rows = benchmarks.get(name).rows(FIXTURES[name](tmp_path))
    pictures = 0
    for row in rows:
        assert bench.asked(row)
        for image in images_of(row):
            source = str(tmp_path / image) if isinstance(image, str) else image
            assert images.load(source, 4, "pad", (0.0, 0.0, 0.0), 100).shape == (4, 4, 3)
            pictures += 1
    assert rows and pictures


def images_of(row):
    image = row.get("image", [])
    return image if isinstance(image, list) else [image]


@pytest.mark.parametrize("name", FIXTURES)
def test_of_the_replies_of_a_closed_question_only_the_gold_one_scores(tmp_path, name):
    closed = 0
    for row in benchmarks.get(name).rows(FIXTURES[name](tmp_path)):
        if "replies" not in row:
            continue
        closed += 1
        replies = row["replies"]
        assert replies in (("Yes", "No"), *(LETTERS[:n] for n in range(2, 6)))
        scores = [benchmarks.get(name).score(reply, row) for reply in replies]
        assert sorted(scores) == [0.0] * (len(replies) - 1) + [1.0]
        assert gold_reply(row) == replies[scores.index(1.0)]
        options = [line for line in bench.asked(row).split("\n") if line[1:3] == ". "]
        if options:
            assert [line[0] for line in options] == list(replies)
    assert bool(closed) == (name in REPLIES)


def gold_reply(row):
    """From the row alone: the letter, the letter of the option's text, or yes and no with a capital."""
    gold = row["answer"][0] if isinstance(row["answer"], list) else row["answer"]
    by_text = {option: letter for letter, option in row["options"].items()} if "options" in row else {}  # fmt: skip
    return by_text[gold] if gold in by_text else gold.title()


@pytest.mark.parametrize(("name", "open_ones"), [("mmmu", 1), ("mathvista", 2)])
def test_open_questions_have_no_replies(tmp_path, name, open_ones):
    rows = benchmarks.get(name).rows(FIXTURES[name](tmp_path))
    assert sum("replies" not in row for row in rows) == open_ones


# How many rows of the fixture the first score needs: a whole circle.
NEEDS = {"mmbench": 3}


@pytest.mark.parametrize("name", FIXTURES)
def test_too_few_rows_for_a_score_are_an_error_before_anything_is_asked(tmp_path, name):
    rows = benchmarks.get(name).rows(FIXTURES[name](tmp_path))
    for limit in range(1, len(rows) + 1):
        chosen = rows[:limit]
        if limit < NEEDS.get(name, 1):
            with pytest.raises(ConfigError, match="has all its rotations answered; ask more rows"):
                benchmarks.check_scorable(name, chosen)
            continue
        benchmarks.check_scorable(name, chosen)
        if benchmarks.has_gold(chosen):
            assert bench.score(name, chosen, ["x"] * limit)["n"] == limit


@pytest.mark.parametrize("name", FIXTURES)
def test_in_a_bucket_the_questions_and_pictures_are_those_of_a_disk(name, tmp_path, server):
    where = FIXTURES[name](tmp_path)
    there = files.to_path(f"gs://bucket/benchmarks/{name}")
    files.upload(tmp_path, there)
    rows = benchmarks.get(name).rows(where)
    found = benchmarks.get(name).rows(there / where.relative_to(tmp_path))
    assert [{**row, "image": 0} for row in found] == [{**row, "image": 0} for row in rows]
    for one, other in zip(rows, found, strict=True):
        shown = [
            [images.load(str(root / x) if isinstance(x, str) else x, 4, "pad", (0.0, 0.0, 0.0), 100) for x in images_of(row)]
            for row, root in ((one, tmp_path), (other, there))
        ]  # fmt: skip
        np.testing.assert_array_equal(*shown)
