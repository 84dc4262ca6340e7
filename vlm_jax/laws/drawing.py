"""What all pictures share: axes, colours, marks, legends, and files that are the same bytes each time.

PNG and SVG, colour-blind safe. `figures.py` draws the pictures themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vlm_jax.costs.price import Number
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.presets import size_name

MARKERS = "osD^vP*Xp<>h"  # one per token count, fewest first
FRONTIER = "#d55e00"  # vermilion of Okabe and Ito: apart from every shade of the size scale
MUTED = "#666666"
LANGUAGE_MODEL, VISUAL_TOKENS = "language model", "visual tokens"  # titles of legends
ROOM = 0.1  # of an axis: what a label such as "14.2B" needs
SAMPLES = 200  # points of a drawn curve
Place = Literal["outside right upper", "outside right center"]
Colour = tuple[float, float, float, float] | str


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes PNG (150 dots per inch) or SVG, by suffix; the same figure gives the same bytes."""
    path = check_path(path)
    with matplotlib.rc_context({"svg.hashsalt": "vlm_jax", "svg.fonttype": "none"}):
        date = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        try:
            figure.savefig(path, dpi=150, metadata=date, bbox_inches="tight")
        except OSError as error:
            raise ConfigError(f"plot: {path} cannot be written: {error.strerror}.") from error
    return path


def check_path(path: str | os.PathLike[str]) -> Path:
    """Where a figure can be written. Raises ConfigError for another suffix than .png or .svg, or no such folder."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"plot: {path.name} must end in .png or .svg.")
    if not path.parent.is_dir():
        raise ConfigError(f"plot: the folder {str(path.parent)!r} does not exist; make it first.")
    return path


def save_both(figure: Figure, folder: str | os.PathLike[str], name: str) -> dict[str, Path]:
    """NAME.png and NAME.svg in `folder`."""
    return {kind: save(figure, Path(folder) / f"{name}.{kind}") for kind in ("png", "svg")}


def canvas() -> tuple[Figure, Axes]:
    """A figure with one pair of axes, as wide as a page's text."""
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
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


def finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    low, high = axes.get_ylim()
    if high / low < 30:  # a decade has too few round numbers to label
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_minor_locator(LogLocator(subs=[]))
    _label_costs(axes)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    plain(axes)


def plain(axes: Axes, which: Literal["both", "y"] = "both") -> None:
    """Grey lines at the labelled values, of y alone or of both axes, and no box around."""
    axes.grid(True, axis=which, color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_costs(axes: Axes) -> None:
    """Labels of a logarithmic x axis that never touch: powers of ten, or short round numbers where there are few powers."""
    low, high = axes.get_xlim()
    if high / low >= 100:
        return
    subs = [1, 2, 5] if high / low >= 10 else []
    axes.xaxis.set_major_locator(
        LogLocator(subs=subs) if subs else MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
    )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def apart(values: Sequence[Number], axes: Axes) -> list[Number]:
    """Those of ascending values whose labels have room on a logarithmic x axis; the last always."""
    low, high = np.log(axes.get_xlim())
    kept: list[Number] = []
    for value in reversed(values):
        if not kept or np.log(kept[-1] / value) >= ROOM * (high - low):
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
            keys.append(Line2D([], [], linestyle="", label=" "))
        if title:
            keys.append(Line2D([], [], linestyle="", label=title))
        keys += group
    legend = figure.legend(
        handles=keys, loc=at, frameon=False, fontsize=9, labelspacing=0.35, handlelength=1.6
    )  # fmt: skip
    for text in legend.get_texts():
        if text.get_text() in groups:
            text.set_fontweight("bold")
