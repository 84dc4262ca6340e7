"""Figures of what follows from a law: the numbers that are drawn, and the command that draws what a table supports."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlm_jax.laws import drawing, figures, fitting, law, planning, plot, table
from vlm_jax.laws.law import BILLION
from vlm_jax.settings.checks import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "vlm_jax" / "laws" / "data"
LARGEST = "qwen1.5-7b"


@pytest.fixture(scope="module")
def rows():
    return [row for name in ("reasoning", "ocr") for row in table.read(DATA / f"paper_{name}.csv")]


@pytest.fixture(scope="module")
def fits(rows):
    return {name: fitting.fit_family(rows, name, draws=100) for name in ("reasoning", "ocr")}


def texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("family", ["reasoning", "ocr"])
def test_the_largest_size_is_predicted_by_the_law_of_the_others(rows, fits, family):
    """What the picture says equals the fit's own errors on sizes left out."""
    mean, largest = fits[family].alternatives[0].held_out[LARGEST]
    figure = figures.extrapolation_figure(rows, fits[family], 14 * BILLION)
    axes = figure.axes[0]
    assert axes.get_title().endswith(f"predicts 7B within {largest:.1%} (mean {mean:.1%})")
    cells = {row.cell: row.error for row in rows if row.family == family}
    points = [line for line in axes.lines if line.get_marker() not in ("None", "_")]
    hollow = [line for line in points if line.get_markerfacecolor() == "white"]
    drawn = sorted(float(line.get_ydata()[0]) for line in hollow)
    assert drawn == sorted(e for (lm, _), e in cells.items() if lm == LARGEST)
    assert len(points) == len(cells) == 28
    law = fitting.fit_family([r for r in rows if r.lm != LARGEST], family, draws=100).law
    ends = [line.get_xydata()[-1] for line in axes.lines if line.get_linestyle() == "--"]
    for (x, y), v in zip(ends, fits[family].visual_tokens, strict=True):
        assert (x, y) == pytest.approx((14 * BILLION, float(law.error(14 * BILLION, v))), rel=1e-4)
    off = float(law.error(7 * BILLION, 576)) / cells[LARGEST, 576] - 1
    assert f"576: {off:+.1%}" in texts(figure)


def test_the_best_count_at_equal_cost_is_the_least_error_of_all(fits):
    law, counts = fits["reasoning"].law, fits["reasoning"].visual_tokens
    asked = np.array([0, 3, 50, 400, 2000])
    found = planning.best_measured_tokens(law, counts, asked)
    for q, v in zip(asked, found, strict=True):
        for cost in (1e10, 1e13):  # of any size
            errors = [float(law.error(cost / (2 * (q + c)), c)) for c in counts]
            assert counts[int(np.argmin(errors))] == v
    figure = figures.text_tokens_figure(fits["reasoning"])
    step, ideal = figure.axes[0].lines
    assert dict(step.get_xydata())[0] == 1 and dict(step.get_xydata())[50] == 16
    assert ideal.get_ydata()[49] == pytest.approx(50 * law.beta / (law.alpha - law.beta))
    assert len(figure.axes) == 4 and {"500M", "7B"} <= set(texts(figure))


def test_no_thin_line_is_drawn_where_tokens_always_win(fits):
    (step,) = figures.text_tokens_figure(fits["ocr"]).axes[0].lines
    assert set(step.get_ydata()) == {576}


def test_bars_of_equal_cost_are_the_measured_errors_beside_the_laws(rows, fits):
    figure = figures.equal_compute_figure(rows, fits, 0)
    pairs = [("qwen1.5-0.5b", 576), ("qwen1.5-1.8b", 144), ("qwen1.5-4b", 64), (LARGEST, 36)]
    cells = {(row.family, *row.cell): row.error for row in rows}
    wanted = [cells[family, *pair] for family in fits for pair in pairs]
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx(wanted)
    lines = [c.get_segments()[0][0][1] for c in figure.axes[0].collections]
    sizes = fits["ocr"].lms
    predicted = [float(f.law.error(sizes[lm], v)) for f in fits.values() for lm, v in pairs]
    assert lines == pytest.approx(predicted, rel=1e-6)
    assert texts(figure)[1:5] == ["500M, V = 576", "1.8B, V = 144", "4B, V = 64", "7B, V = 36"]


def test_pairs_are_the_nearest_of_each_lm_within_a_fifth(rows, fits):
    pairs = planning.measured_pairs(rows, fits, 50)
    near = planning.equal_pairs(pairs, 7e11)
    assert [(p.lm, p.visual_tokens) for p in near] == [
        ("qwen1.5-0.5b", 576), ("qwen1.5-1.8b", 144), ("qwen1.5-4b", 36), (LARGEST, 1)
    ]  # fmt: skip
    assert all(7e11 / 1.2 <= p.flops <= 7e11 * 1.2 for p in near)
    with pytest.raises(ConfigError, match="fewer than 2 LMs have a cell within 20% of 1 GFLOPs"):
        planning.equal_pairs(pairs, 1e9)


def test_two_sizes_cannot_be_extrapolated(rows):
    two = [row for row in rows if row.lm_params < 2 * BILLION and row.family == "ocr"]
    small = fitting.fit_family(two, "ocr", draws=100)
    with pytest.raises(ConfigError, match="'ocr' has 2 LM sizes; predicting the largest needs 2"):
        figures.extrapolation_figure(two, small)


def test_the_command_writes_what_the_table_supports_and_names_the_rest(rows, tmp_path, capsys):
    """A table of two sizes whose family's name is no file name."""
    two = [dataclasses.replace(r, family="x/y") for r in rows if r.lm_params < 2 * BILLION]
    table.write(tmp_path / "errors.csv", [r for r in two if r.benchmark == "mean of 9"])
    words = [str(tmp_path / "errors.csv"), f"--out={tmp_path / 'out'}", "--text-tokens=7"]
    assert plot.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    written = {Path(line.removeprefix("wrote ")).name for line in said if "wrote" in line}
    names = ("x_y_q7", "x_y_text_tokens", "equal_compute_q7")
    assert written == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in written)
    (left,) = (line for line in said if line.startswith("left out"))
    assert "x_y_extrapolation: plot: family 'x/y' has 2 LM sizes" in left


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--text-tokens=a"], "'a' is not a comma-separated list of whole numbers"),
        (["--budget-gflops=-1"], "'-1' is not a number above 0"),
    ],
)
def test_a_mistake_is_one_line(words, match, tmp_path, capsys):
    given = [str(DATA / "paper_ocr.csv"), f"--out={tmp_path / 'out'}", *words]
    assert plot.main(given) == 2
    said = capsys.readouterr().err
    assert match in said and len(said.strip().splitlines()) == 1


def test_drawing_loads_no_jax():
    code = "import sys; from vlm_jax.laws import plot; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_law_of_another_table_is_refused(rows, fits, tmp_path, capsys):
    law.save(tmp_path / "law.json", {"ocr": fits["ocr"]}, {})
    table.write(tmp_path / "some.csv", [r for r in rows if r.family == "ocr" and r.lm != LARGEST])
    words = [str(tmp_path / "some.csv"), f"--law={tmp_path / 'law.json'}", f"--out={tmp_path}"]
    assert plot.main(words) == 2
    assert "was fitted to 28 cells of family 'ocr' and the table has 21" in capsys.readouterr().err


def test_pictures_are_the_same_bytes_each_time(fits, tmp_path):
    for name in ("a", "b"):
        drawing.save_both(figures.text_tokens_figure(fits["ocr"]), tmp_path, name)
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
