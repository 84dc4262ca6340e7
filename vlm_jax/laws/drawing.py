"""What all pictures share: axes, colours, marks, legends, and files that are the same bytes each time.

PNG and SVG, colour-blind safe. `figures.py` draws the pictures themselves.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Container, Mapping, Sequence
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    Formatter,
    FuncFormatter,
    MaxNLocator,
    NullFormatter,
)

from vlm_jax.costs.price import Number
from vlm_jax.files import Path, can_hold, to_path
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.presets import size_name

MARKERS = "osD^vP*Xp<>h"  # one per token count, fewest first
FRONTIER = "#d55e00"  # vermilion of Okabe and Ito: apart from every shade of the size scale
MUTED = "#666666"
LANGUAGE_MODEL, VISUAL_TOKENS = "language model", "visual tokens"  # titles of legends
X_ROOM, Y_ROOM = 0.12, 0.06  # of an axis: what a label such as "14.2B" needs
ROUND = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))  # numbers of a decade that are labelled
MOST_LABELS = 8  # of an axis
PREFIXED = EngFormatter(sep="")  # 10M
PLAIN = FuncFormatter(lambda x, _: f"{x:g}")
FOR_PHONES = (5.2, 4.7)  # inches: its text can be read where it is 340 pixels wide
PER_ROW = 5  # keys of a group that stand beside each other below such a figure
SAMPLES = 200  # points of a drawn curve
Place = Literal["outside right upper", "outside right center", "outside lower center"]
Colour = tuple[float, float, float, float] | str


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes PNG (150 dots per inch) or SVG, by suffix; the same figure gives the same bytes."""
    path = check_path(path)
    with matplotlib.rc_context({"svg.hashsalt": "vlm_jax", "svg.fonttype": "none"}):
        date = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        try:
            data = io.BytesIO()
            form = path.suffix.removeprefix(".")
            figure.savefig(data, format=form, dpi=150, metadata=date, bbox_inches="tight")
            path.write_bytes(data.getvalue())
        except OSError as error:
            raise ConfigError(f"plot: {path} cannot be written: {error.strerror}.") from error
    return path


def check_path(path: str | os.PathLike[str]) -> Path:
    """Where a figure can be written. Raises ConfigError for another suffix than .png or .svg, or no such folder."""
    path = to_path(path)
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"plot: {path.name} must end in .png or .svg.")
    if not can_hold(path.parent):
        raise ConfigError(f"plot: the folder {str(path.parent)!r} does not exist; make it first.")
    return path


def save_both(figure: Figure, folder: str | os.PathLike[str], name: str) -> dict[str, Path]:
    """NAME.png and NAME.svg in `folder`."""
    return {kind: save(figure, to_path(folder) / f"{name}.{kind}") for kind in ("png", "svg")}


def canvas(size: tuple[float, float] = (7.6, 4.6)) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, as wide as a page's text. size: in inches."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def shades(count: int) -> list[Colour]:
    """Ordered from light to dark; viridis stays ordered for every kind of colour vision and in grey."""
    return [matplotlib.colormaps["viridis_r"](x) for x in np.linspace(0.18, 1.0, count)]


def lm_colours(lms: Mapping[str, Number]) -> dict[str, Colour]:
    """Each LM's colour, smallest and lightest first."""
    return dict(zip(sorted(lms, key=lambda lm: lms[lm]), shades(len(lms)), strict=True))


def lm_names(lms: Mapping[str, Number]) -> dict[str, str]:
    """How pictures call each LM: by its size, or by its name where two would read the same."""
    sizes = [size_name(params) for params in lms.values()]
    return {lm: s if sizes.count(s) == 1 else lm for lm, s in zip(lms, sizes, strict=True)}


def finish(axes: Axes, x_label: str, y_label: str, x_format: Formatter = PREFIXED) -> None:
    """Both axes logarithmic, with their names, round numbers and grey lines. x_format: of the numbers of x."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    label_logarithm(axes.xaxis, X_ROOM, x_format)
    label_logarithm(axes.yaxis, Y_ROOM, PLAIN)
    plain(axes)


def plain(axes: Axes, which: Literal["both", "y"] = "both") -> None:
    """Grey lines at the labelled values, of y alone or of both axes, and no box around."""
    axes.grid(True, axis=which, color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_logarithm(axis: Axis, room: float, written: Formatter) -> None:
    """Round numbers on a logarithmic axis whose range is final, `room` of its length or more apart."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(FixedLocator(round_numbers(low, high, room)))
    axis.set_major_formatter(written)
    axis.set_minor_formatter(NullFormatter())


def round_numbers(low: float, high: float, room: float) -> list[float]:
    """Three to MOST_LABELS between 0 < low < high, ascending and `room` or more of log(high / low) apart.

    Of every decade the same ones if three lie within, else powers of ten, or equal steps where the range is short.
    The two ends where `room` is too large for three.
    """
    span = math.log(high / low)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [[step * 10.0**k for k in decades for step in steps] for steps in ROUND]
    choices += [[10.0**k for k in decades if k % every == 0] for every in range(2, len(decades))]
    choices += [list(MaxNLocator(n, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)) for n in range(6, 0, -1)]  # fmt: skip
    for choice in choices:
        found = [x for x in choice if low <= x <= high]
        gaps = [math.log(b / a) for a, b in itertools.pairwise(found)]
        if 3 <= len(found) <= MOST_LABELS and min(gaps) >= room * span:
            return found
    return [low, high]


def apart(values: Sequence[Number], axis: Axis, room: float) -> list[Number]:
    """Those of ascending values whose labels have room on a logarithmic axis; the last always."""
    low, high = np.log(axis.get_view_interval())
    kept: list[Number] = []
    for value in reversed(values):
        if not kept or np.log(kept[-1] / value) >= room * (high - low):
            kept.append(value)
    return kept[::-1]


def colour_keys(colours: Mapping[str, Colour]) -> list[Line2D]:
    return [Line2D([], [], color=c, linewidth=4, label=name) for name, c in colours.items()]


def shape_keys(labels: Sequence[str], colours: Sequence[Colour] = ()) -> list[Line2D]:
    """The shapes of token counts, fewest first; grey without `colours`."""
    return [
        Line2D([], [], color=colours[i] if colours else MUTED, marker=MARKERS[i % len(MARKERS)], linestyle="", markersize=7, label=label)
        for i, label in enumerate(labels)
    ]  # fmt: skip


def legends(
    figure: Figure, groups: Mapping[str, Sequence[Line2D]], at: Place = "outside right upper"
) -> None:
    """Title -> keys, one group below the other, right of the axes; a group titled "" has no title."""
    keys: list[Line2D] = []
    for title, group in groups.items():
        if keys:
            keys.append(_blank())
        if title:
            keys.append(_blank(title))
        keys += group
    _legend(figure, keys, groups, at)


def legends_below(figure: Figure, groups: Mapping[str, Sequence[Line2D]]) -> None:
    """Title -> keys, below the axes, each group in rows of its own; the keys of a group titled "" begin at its left end."""
    rows: list[list[Line2D]] = []
    for title, group in groups.items():
        for i in range(0, len(group), PER_ROW):
            head = [_blank(title if i == 0 else " ")] if title else []
            rows.append([*head, *group[i : i + PER_ROW]])
    width = max(map(len, rows))
    padded = [[*row, *(_blank() for _ in range(width - len(row)))] for row in rows]
    by_columns = [key for column in zip(*padded, strict=True) for key in column]
    _legend(figure, by_columns, groups, "outside lower center", width)


def _blank(label: str = " ") -> Line2D:
    return Line2D([], [], linestyle="", label=label)


def _legend(
    figure: Figure, keys: Sequence[Line2D], titles: Container[str], at: Place, columns: int = 1
) -> None:
    legend = figure.legend(handles=keys, loc=at, ncols=columns, frameon=False, fontsize=9, labelspacing=0.35, handlelength=1.6, columnspacing=0.9)  # fmt: skip
    for text in legend.get_texts():
        if text.get_text() in titles:
            text.set_fontweight("bold")
