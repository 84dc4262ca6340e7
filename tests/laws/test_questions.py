"""Intervals over questions: paired between cells, whole pictures, each benchmark's part."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from vlm_jax.laws import fit, fitting, questions, table
from vlm_jax.laws.law import load
from vlm_jax.laws.least_squares import Law
from vlm_jax.laws.table import Row
from vlm_jax.settings.checks import ConfigError

TRUE = Law(0.6, 0.2, 0.1, 0.0)
GROUPS = 40


def rows(names=("a",), noise=1e-3):
    rng = np.random.default_rng(0)
    return [
        Row(n * 1e9, v, float(TRUE.error(n * 1e9, v)) + rng.normal(0, noise), name, "f", f"{n}b")
        for name in names for n in (0.5, 1.8, 4.0, 7.0) for v in (1, 4, 16, 64)
    ]  # fmt: skip


def shifts(size, seed=0):
    """A relative change of the error per group."""
    return np.random.default_rng(seed).normal(0, size, GROUPS)


def se(moved):
    return (GROUPS - 1) * float(np.std(moved)) / (GROUPS - 1) ** 0.5


def test_questions_that_are_as_hard_for_every_cell_move_the_level_and_not_the_exponents():
    own, moved = rows(), shifts(1e-3)
    without = {row.key: list(row.error * (1 + moved)) for row in own}
    found = fitting.fit_family(own, "f", fixed_d=0, draws=100, without=without)
    spans = found.intervals["questions"]
    width = stats.t.ppf(0.975, GROUPS - 1) * se(moved) * found.law.A
    assert spans["A"] == pytest.approx((found.law.A - width, found.law.A + width), rel=1e-4)
    assert np.ptp(spans["alpha"]) < 1e-5 and np.ptp(spans["beta"]) < 1e-5
    assert found.question_error == pytest.approx(se(moved) * max(r.error for r in own), rel=1e-6)
    assert spans["D"] is None and found.profile["alpha"][1] - found.profile["alpha"][0] > 1e-4


def test_questions_that_suit_some_cells_move_the_exponents():
    """With errors that scale as N^-moved, alpha moves by exactly that."""
    own, moved = rows(noise=0), shifts(1e-3)
    without = {row.key: list(row.error * (row.lm_params / 1e9) ** -moved) for row in own}
    found = fitting.fit_family(own, "f", fixed_d=0, draws=100, without=without)
    low, high = found.intervals["questions"]["alpha"]
    width = stats.t.ppf(0.975, GROUPS - 1) * se(moved)
    assert (low, high) == pytest.approx((0.2 - width, 0.2 + width), abs=1e-6)
    assert np.ptp(found.intervals["questions"]["beta"]) < 1e-5


def test_each_benchmarks_part_of_the_variance_is_said_and_two_seeds_are_asked_the_same():
    """Two benchmarks whose questions move alpha and beta, the second twice as far: four fifths of the variance."""
    own = [dataclasses.replace(r, seed=s) for r in rows(("a", "b"), noise=0) for s in (0, 1)]
    moved = {"a": shifts(1e-3, 1), "b": 2 * shifts(1e-3, 1)}
    without = {
        r.key: list(r.error * ((r.lm_params / 1e9) * r.visual_tokens) ** -moved[r.benchmark])
        for r in own
    }
    found = fitting.fit_family(own, "f", fixed_d=0, draws=100, without=without)
    assert found.question_shares == pytest.approx({"a": 0.2, "b": 0.8}, abs=0.01)
    low, high = found.intervals["questions"]["alpha"]
    width = stats.t.ppf(0.975, GROUPS - 1) * np.hypot(se(moved["a"]), se(moved["b"])) / 2
    assert high - low == pytest.approx(2 * width, rel=0.01)
    (line,) = (s for s in found.statements if "other questions" in s)
    assert f"alpha in [{low:.3g}, {high:.3g}]" in line and "20% a, 80% b of that variance" in line


def test_the_command_reads_what_evaluations_write_and_names_a_row_that_is_missing(tmp_path, capsys):
    own, moved = rows(), shifts(1e-3)
    lines = {row.key: [None, *(row.error * (1 + moved))] for row in own}
    file, other = tmp_path / "questions.jsonl", tmp_path / "other.jsonl"
    questions.append(file, dict(list(lines.items())[:10]))
    questions.append(file, dict(list(lines.items())[5:10]))  # again: the same file
    questions.append(other, dict(list(lines.items())[10:]))
    assert questions.read([file, other]) == lines
    table.write(tmp_path / "errors.csv", own)
    given = [
        str(tmp_path / "errors.csv"),
        "--draws=100",
        "--fix-d=0",
        "--out",
        str(tmp_path / "law.json"),
    ]
    assert fit.main([*given, "--questions", str(file), str(other)]) == 0
    assert "over questions" in capsys.readouterr().out
    back = load(tmp_path / "law.json")["f"]
    again = fitting.fit_family(own, "f", fixed_d=0, draws=100, without=lines)
    assert back.intervals["questions"] == again.intervals["questions"]
    assert fit.main([*given, "--questions", str(file)]) == 2
    said = capsys.readouterr().err
    assert "--questions has no line for a of 4.0b, 16 visual tokens, seed 0; evaluate it" in said
    other.write_text(json.dumps({"without": 3}))
    with pytest.raises(ConfigError, match=r"other\.jsonl:1: is no line of questions\.jsonl"):
        questions.read([other])
