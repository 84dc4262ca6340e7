"""Measured cells beside published ones: which are shared, how far apart they are, and the laws of both."""

import dataclasses

import pytest

from vlm_jax.laws import comparison, fitting
from vlm_jax.settings.checks import ConfigError

THEIRS = comparison.published("paper_reasoning")


def shifted(by, **changes):
    """Rows with the published errors and a shift, two seeds each, of which the second is shifted twice as far."""
    return [
        dataclasses.replace(row, error=row.error + by * (1 + seed), seed=seed, **changes)
        for row in THEIRS
        for seed in (0, 1)
    ]


def test_shared_cells_are_compared_and_others_left_out():
    rows = [row for row in shifted(0.01) if row.visual_tokens < 144]
    rows += [dataclasses.replace(row, visual_tokens=100) for row in shifted(0.5) if row.visual_tokens == 1]  # fmt: skip
    fit = fitting.fit_family(rows, "reasoning", draws=100)
    found = comparison.compare(rows, fit, THEIRS, (0.077, 0.015))
    assert len(found.errors) == 4 * 5 and (5e8, 100) not in found.errors
    assert found.differences == pytest.approx([0.015] * 20)
    assert found.laws[1].num_cells == found.laws[0].num_cells == 20
    assert found.laws[1].num_seeds == 1 and found.laws[0].num_seeds == 2
    assert "20 cells are published too; the errors here are +0.015 on average" in comparison.sentence(found)  # fmt: skip
    lines = {line[0]: line[1:] for line in comparison.constants([found]).rows}
    assert [lines[f"reasoning {name}"][2] for name in ("A", "alpha", "beta", "alpha/beta")] == ["-", "0.077", "0.015", "5.13"]  # fmt: skip
    assert lines["reasoning alpha"][0] != lines["reasoning alpha"][1]


def test_few_shared_cells_are_drawn_without_a_law_and_none_are_refused():
    rows = shifted(0.0)
    fit = fitting.fit_family(rows, "reasoning", draws=100)
    found = comparison.compare(rows, fit, [row for row in THEIRS if row.visual_tokens == 4], None)
    assert found.laws == (None, None) and len(found.errors) == 4
    (axes,) = comparison.figure(found).axes
    assert len(axes.lines) == 8  # a mark per cell and side
    with pytest.raises(ConfigError, match="no cell has an LM size and a number of visual tokens"):
        comparison.compare(rows, fit, [dataclasses.replace(THEIRS[0], lm_params=3e9)], None)
    with pytest.raises(ConfigError, match=r"holds paper_ocr, paper_reasoning\."):
        comparison.published("paper")
