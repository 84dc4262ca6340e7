"""Figures: exactly the table's points and the fit's curves, the same bytes each time."""

import itertools

import numpy as np
import pytest
import tables

from vlm_jax.laws import drawing, figures, fit, planning
from vlm_jax.settings.checks import ConfigError


@pytest.fixture(scope="module")
def fits():
    return fit.fit_table(tables.rows(), draws=200)


def drawn(figure) -> list[tuple[float, float]]:
    """Single points of the axes."""
    lines = figure.axes[0].get_lines()
    return [
        (float(x.get_xdata()[0]), float(x.get_ydata()[0])) for x in lines if len(x.get_xdata()) == 1
    ]


@pytest.mark.parametrize("family", ["reasoning", "ocr"])
def test_each_cell_is_drawn_at_its_mean_and_its_flops(fits, family):
    rows = [r for r in tables.rows() if r.family == family and r.compressor == "tokenpacker"]
    points = drawn(figures.errors_figure(tables.rows(), fits[family], text_tokens=10))
    for lm, params in tables.SIZES.items():
        for v in tables.TOKENS:
            mean = np.mean([r.error for r in rows if r.cell == (lm, v) and not r.flag])
            x = 2 * params * (10 + v)
            assert any(np.allclose((x, mean), p, rtol=1e-9) for p in points), (lm, v)
    flagged = [r for r in rows if r.flag]
    assert all(any(np.isclose(r.error, y) for _, y in points) for r in flagged)
    assert len(points) == 12 + len(flagged)


def test_the_plan_s_figure_marks_budget_and_choice(fits):
    chosen = planning.choose(fits["ocr"], 5e6, 10)
    figure = figures.plan_figure(chosen, fits["ocr"])
    points = drawn(figure)
    assert (
        points.count((chosen.best.cost, pytest.approx(chosen.best.error))) == 2
    )  # the dot and its ring
    verticals = [x.get_xdata() for x in figure.axes[0].get_lines() if len(set(x.get_xdata())) == 1]
    assert any(np.allclose(v, 5e-3) for v in verticals)  # GFLOPs


def test_the_same_figure_gives_the_same_bytes(fits, tmp_path):
    for name in ("a", "b"):
        drawing.save_both(figures.errors_figure(tables.rows(), fits["ocr"]), tmp_path, name)
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_a_picture_of_another_kind_is_refused(fits, tmp_path):
    figure = figures.errors_figure(tables.rows(), fits["ocr"])
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg"):
        drawing.save(figure, tmp_path / "a.gif")
    with pytest.raises(ConfigError, match="does not exist"):
        drawing.save(figure, tmp_path / "nowhere" / "a.png")


@pytest.mark.parametrize("ratio", [1.3, 2.2, 4, 9, 30, 90, 110, 5000, 1e7])
@pytest.mark.parametrize("low", [8.6e8, 1.1e10, 4e12])
def test_the_labels_of_costs_never_touch(low, ratio):
    figure, axes = drawing.canvas()
    axes.plot([low, low * ratio], [0.5, 0.4])
    drawing.finish(axes, "cost", "error")
    labels = label_boxes(figure, axes)
    assert 2 <= len(labels) <= 9
    assert all(b.x0 - a.x1 > 4 for a, b in itertools.pairwise(labels))


def label_boxes(figure, axes):
    """Where the labels of the x axis are drawn, in pixels, from left to right."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    low, high = axes.get_xlim()
    ticks = [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
    shown = [t.label1 for t in ticks if t.label1.get_text() and low <= t.get_loc() <= high]
    return sorted((text.get_window_extent(renderer) for text in shown), key=lambda box: box.x0)


def test_sizes_that_lie_close_together_share_a_label():
    _, axes = drawing.canvas()
    axes.plot([1.06e8, 7e9], [0.5, 0.4])
    axes.set_xscale("log")
    assert drawing.apart([1.06e8, 1.34e8, 3.6e8, 6.9e9, 7e9], axes) == [1.34e8, 3.6e8, 7e9]
