"""Figures of a law, drawn from the table and the fit: nothing is typed in. PNG and SVG, colour-blind safe.

    python -m vlm_jax.laws.plot errors.csv --out figures

Here: error against cost, a plan, and what all pictures share. `figures.py` has the others, `plot.py` is the command.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vlm_jax.costs.price import Number, paper_flops
from vlm_jax.laws.law import Fit
from vlm_jax.laws.plan_words import pair
from vlm_jax.laws.table import Row, family_mean, size_name
from vlm_jax.settings.checks import ConfigError

if TYPE_CHECKING:
    from vlm_jax.laws.planning import Plan

MARKERS = "osD^vP*Xp<>h"  # one per token count, fewest first
FRONTIER = "#d55e00"  # vermilion of Okabe and Ito: apart from every shade of the size scale
MUTED = "#666666"
LANGUAGE_MODEL, VISUAL_TOKENS = "language model", "visual tokens"  # titles of legends
ROOM = 0.1  # of an axis: what a label such as "14.2B" needs
SAMPLES = 200  # points of a drawn curve
Place = Literal["outside right upper", "outside right center"]
Colour = tuple[float, float, float, float] | str


def errors_figure(rows: Sequence[Row], fit: Fit, text_tokens: int = 0) -> Figure:
    """Error against the paper's inference FLOPs 2 N (Q + V), as its Figure 1.

    Points are measured cells (mean over seeds, bars from the lowest to the highest seed), thin lines the fitted law for
    each LM, the band its Pareto frontier. Flagged cells are hollow and were not fitted. text_tokens: Q.
    """
    rows = [row for row in family_mean(rows_of(rows, fit), fit.family)]
    figure, axes = canvas()
    lms = sorted(fit.lms.items(), key=lambda item: item[1])
    colours, names = lm_colours(fit.lms), lm_names(fit.lms)
    _draw_law(axes, fit, lms, colours, text_tokens)
    for lm, params in lms:
        for i, tokens in enumerate(fit.visual_tokens):
            x = float(paper_flops(params, text_tokens, tokens))
            runs = [row for row in rows if row.cell == (lm, tokens)]
            _draw_cell(axes, x, runs, colours[lm], MARKERS[i % len(MARKERS)])
    finish(
        axes,
        f"FLOPs of one answer, 2 N (Q + V), Q = {text_tokens}",
        f"{fit.family} error (1 - score)",
    )
    law = fit.law
    floor = f" + {law.D:.3g}" if law.D > 0 else ""
    axes.set_title(
        f"{fit.family}: error = {law.A:.3g} N$^{{{-law.alpha:.3f}}}$ V$^{{{-law.beta:.3f}}}${floor}"
        "   (N in billions)",
        fontsize=11,
    )
    legends(
        figure,
        {
            LANGUAGE_MODEL: colour_keys({names[lm]: colours[lm] for lm, _ in lms}),
            VISUAL_TOKENS: shape_keys([str(v) for v in fit.visual_tokens]),
            "": [_frontier_key()],
        },
    )
    return figure


def plan_figure(plan: Plan, fit: Fit) -> Figure:
    """The candidates' predicted error against their cost, the Pareto frontier, the budget and the choice."""
    figure, axes = canvas()
    tokens = sorted({c.visual_tokens for c in plan.candidates})
    colours = lm_colours({c.lm: c.lm_params for c in plan.candidates})
    low, high = min(c.cost for c in plan.candidates), max(c.cost for c in plan.candidates)
    right = max(high, plan.budget.limit) * 1.3
    axes.axvspan(plan.budget.limit, right, color="#eeeeee", zorder=0, linewidth=0)
    axes.axvline(plan.budget.limit, color=MUTED, linewidth=1.2, linestyle="--", zorder=1)
    steps = [*plan.frontier]
    axes.plot([c.cost for c in steps], [c.error for c in steps], color=FRONTIER, linewidth=5, alpha=0.35, zorder=1, solid_joinstyle="round")  # fmt: skip
    for c in plan.candidates:
        marker = MARKERS[tokens.index(c.visual_tokens) % len(MARKERS)]
        axes.plot(c.cost, c.error, marker, color=colours[c.lm], markersize=7, markeredgecolor="white", markeredgewidth=0.6, zorder=3)  # fmt: skip
    best = plan.best
    below, above = best.error - best.interval[0], best.interval[1] - best.error
    axes.errorbar(best.cost, best.error, yerr=[[max(below, 0)], [max(above, 0)]], fmt="none", ecolor="black", elinewidth=1.2, capsize=3, zorder=4)  # fmt: skip
    axes.plot(best.cost, best.error, "o", markersize=16, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.6, zorder=5)  # fmt: skip
    axes.set_xlim(low / 1.3, right)
    finish(
        axes,
        f"{plan.budget.unit} ({plan.method}, Q = {plan.workload.text_tokens})",
        f"predicted {plan.family} error",
    )
    axes.set_title(
        f"{plan.family}: {plan.budget.text} buy {pair(best.lm, best.visual_tokens)}",
        fontsize=11,
    )
    budget = Line2D([], [], color=MUTED, linestyle="--", linewidth=1.2, label="budget")
    choice = Line2D([], [], color="black", marker="o", markersize=11, markerfacecolor="none", linestyle="", label="choice")  # fmt: skip
    legends(
        figure,
        {
            LANGUAGE_MODEL: colour_keys(colours),
            VISUAL_TOKENS: shape_keys([str(v) for v in tokens]),
            "": [_frontier_key(), budget, choice],
        },
    )
    return figure


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


def rows_of(rows: Sequence[Row], fit: Fit) -> list[Row]:
    """The measurements behind a fit, flagged ones included."""
    own = [row for row in rows if row.family == fit.family and row.compressor == fit.compressor]
    single = [row for row in own if row.benchmark == fit.benchmark]
    return single or own


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


def _draw_law(axes: Axes, fit: Fit, lms, colours, text_tokens: int) -> None:
    tokens = np.geomspace(fit.visual_tokens[0], fit.visual_tokens[-1], SAMPLES)
    curves = []
    for lm, params in lms:
        cost = np.asarray(paper_flops(params, text_tokens, tokens))
        error = fit.law.error(params, tokens)
        curves.append((cost, error))
        axes.plot(cost, error, color=colours[lm], linewidth=1.6, zorder=2)
    cost, error = _envelope(curves)
    axes.plot(
        cost, error, color=FRONTIER, linewidth=7, alpha=0.35, zorder=1, solid_joinstyle="round"
    )


def _envelope(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The least error any of the curves reaches at or below each cost."""
    cost = np.unique(np.concatenate([c for c, _ in curves]))
    reached = []
    for own_cost, own_error in curves:
        error = np.interp(np.log(cost), np.log(own_cost), own_error, left=np.inf)
        reached.append(np.minimum.accumulate(error))
    return cost, np.minimum.reduce(reached)


def _draw_cell(axes: Axes, x: Number, runs: Sequence[Row], colour, marker: str) -> None:
    good = [row.error for row in runs if not row.flag]
    if good:
        mean = float(np.mean(good))
        if len(good) > 1:
            axes.vlines(x, min(good), max(good), color=colour, linewidth=1.4, zorder=3)
        axes.plot(x, mean, marker, color=colour, markersize=8, markeredgecolor="white", markeredgewidth=0.7, zorder=4)  # fmt: skip
    for row in runs:
        if row.flag:
            axes.plot(
                x,
                row.error,
                marker,
                markersize=8,
                markerfacecolor="none",
                markeredgecolor=colour,
                zorder=4,
            )


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
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6, zorder=0)
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


def _frontier_key() -> Line2D:
    return Line2D([], [], color=FRONTIER, linewidth=7, alpha=0.35, label="Pareto frontier")


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
