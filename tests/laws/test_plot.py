"""Figures: exactly the table's points and the fit's curves, the same bytes each time."""

import itertools

import numpy as np
import pytest
import tables

from vlm_jax.laws import drawing, figures, fitting, planning, table
from vlm_jax.settings.checks import ConfigError


@pytest.fixture(scope="module")
def fits():
    return fitting.fit_table(tables.rows(), draws=200)


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


@pytest.mark.parametrize("room", [drawing.X_ROOM, drawing.Y_ROOM])
def test_three_round_numbers_or_more_lie_in_every_range(room):
    for ratio in [1.05, *np.geomspace(1.1, 40, 40), 110, 1000, 1e7, 1e12]:
        for low in np.geomspace(0.01, 0.1, 23):
            found = drawing.round_numbers(low, low * ratio, room)
            assert low <= found[0] and found[-1] <= low * ratio
            assert 3 <= len(found) <= drawing.MOST_LABELS
            assert min(np.diff(np.log(found))) >= room * np.log(ratio)
            assert ratio < 1.5 or all(len(f"{x:g}") <= 6 for x in found)


@pytest.mark.parametrize("ratio", [1.5, 3, 12, 1000])
@pytest.mark.parametrize("low", [8.6e8, 4e12])
def test_a_logarithmic_axis_has_labels_that_never_touch(low, ratio):
    figure, axes = drawing.canvas(drawing.FOR_PHONES)
    axes.plot([low, low * ratio], [0.6, 0.6 / ratio])
    drawing.finish(axes, "cost", "error")
    check_labels(figure, axes)


def check_labels(figure, axes, least=3):
    for axis in (axes.xaxis, axes.yaxis):
        labels = label_boxes(figure, axis)
        assert least <= len(labels) <= drawing.MOST_LABELS
        gaps = [(b.x0 - a.x1, b.y0 - a.y1) for a, b in itertools.pairwise(labels)]
        assert all(gap[axis is axes.yaxis] > 3 for gap in gaps)


def label_boxes(figure, axis):
    """Where the labels of an axis are drawn, in pixels, in ascending order."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    low, high = axis.get_view_interval()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    shown = [t for t in ticks if t.label1.get_text() and low <= t.get_loc() <= high]
    return [t.label1.get_window_extent(renderer) for t in sorted(shown, key=lambda t: t.get_loc())]


@pytest.mark.parametrize("ratio", [1.5, 3, 12, 1000])
def test_every_figure_labels_axes_of_any_range(ratio):
    """Three LM sizes, and errors that follow a law, over `ratio`; two token counts."""
    sizes = {"s": 1e8, "m": 1e8 * ratio**0.5, "l": 1e8 * ratio}
    rows = [
        table.Row(n, v, 0.9 * (1e8 / n) ** 0.9 * v**-0.1, "b", "f", lm)
        for lm, n in sizes.items()
        for v in (4, 6)
    ]
    found = fitting.fit_family(rows, "f", fixed_d=0.0, draws=100)
    plan = planning.choose(found, 1e13, 10)
    drawn_figures = [
        figures.errors_figure(rows, found, 10),
        figures.plan_figure(plan, found),
        figures.extrapolation_figure(rows, found),
    ]
    for figure in drawn_figures:
        check_labels(figure, figure.axes[0])
    for axes in (figure := figures.text_tokens_figure(found, 1e13)).axes:
        assert len(label_boxes(figure, axes.yaxis)) == 2


def test_the_key_of_runs_that_were_not_fitted_stands_where_there_are_some(fits):
    for family, shown in (("ocr", True), ("reasoning", False)):
        (legend,) = figures.errors_figure(tables.rows(), fits[family]).legends
        texts = [text.get_text() for text in legend.get_texts()]
        assert ("not fitted" in texts) == shown and "64" in texts


def test_sizes_that_lie_close_together_share_a_label():
    _, axes = drawing.canvas()
    axes.plot([1.06e8, 7e9], [0.5, 0.4])
    axes.set_xscale("log")
    assert drawing.apart([1.06e8, 1.34e8, 3.6e8, 6.9e9, 7e9], axes.xaxis, 0.1) == [
        1.34e8,
        3.6e8,
        7e9,
    ]
