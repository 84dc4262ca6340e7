"""Errors without groups of pictures: whole pictures, the same groups for every model, any metric."""

import logging

import numpy as np
import pytest

from vlm_jax import benchmarks


def asked(pictures, per_picture=2):
    return [
        {"id": f"{p}/{q}", "image": f"{p}.jpg", "answer": "yes", "conversations": []}
        for p in range(pictures) for q in range(per_picture)
    ]  # fmt: skip


def test_a_group_leaves_out_whole_pictures_and_the_same_for_every_model():
    rows = asked(300)
    found, good = (
        benchmarks.errors_without_groups(
            "llava", rows, [(r["id"], "no" if r["image"] == bad else "yes") for r in rows]
        )
        for bad in ("3.jpg", "none.jpg")
    )
    assert len(found) == benchmarks.GROUPS and set(good) <= {0.0, None}
    assert [e is None for e in found] == [e is None for e in good]
    kept = [e for e in found if e is not None]
    assert len(kept) > 80  # pictures are spread over nearly all groups
    assert kept.count(0.0) == 1 and max(kept) < 2 / 560  # both questions about it go together
    again = [(r["id"], "no" if r["image"] == "3.jpg" else "yes") for r in rows[::-1]]
    assert found == benchmarks.errors_without_groups("llava", rows[::-1], again)


def test_the_jackknife_of_a_mean_is_about_its_variance_over_pictures():
    rng = np.random.default_rng(0)
    rows = asked(500, 2)
    right = dict(zip(range(500), rng.random(500) < 0.7, strict=True))  # both or none
    answers = [(r["id"], "yes" if right[int(r["id"].split("/")[0])] else "no") for r in rows]
    found = np.array(benchmarks.errors_without_groups("llava", rows, answers))
    groups = len(found)
    error = (groups - 1) / groups**0.5 * np.std(found)
    share = np.mean(list(right.values()))
    assert error == pytest.approx((share * (1 - share) / 500) ** 0.5, rel=0.25)


def test_a_metric_that_is_no_mean_is_reduced_again_and_warns_once(caplog):
    rows = [
        {"id": f"{p}/{q}", "image": f"{p}.jpg", "picture": str(p), "task": "color", "answer": "yes", "conversations": []}
        for p in range(50) for q in range(2)
    ]  # fmt: skip
    answers = [(r["id"], "yes" if r["id"] != "0/0" else "no") for r in rows]
    with caplog.at_level(logging.WARNING):
        found = [e for e in benchmarks.errors_without_groups("mme", rows, answers) if e is not None]
    best = min(found)  # without picture 0, all of one task's 200 points
    assert best == pytest.approx(1 - 200 / 2800) and len(found) > 20
    assert not caplog.records
