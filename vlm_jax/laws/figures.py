"""Pictures of what follows from a law: an unseen LM size, the best number of visual tokens, pairs of equal cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

from vlm_jax.costs.price import Number, Workload, paper_flops
from vlm_jax.laws.budget import Budget
from vlm_jax.laws.cells import select
from vlm_jax.laws.drawing import (
    FRONTIER,
    LANGUAGE_MODEL,
    MARKERS,
    MUTED,
    SAMPLES,
    apart,
    canvas,
    colour_keys,
    finish,
    legends,
    lm_colours,
    lm_names,
    rows_of,
    shades,
    shape_keys,
)
from vlm_jax.laws.law import Fit, Law
from vlm_jax.laws.planning import Span, choose, optimal_visual_tokens
from vlm_jax.laws.table import Row, family_mean, size_name
from vlm_jax.laws.weighting import LOSSES, WEIGHTS
from vlm_jax.settings.checks import ConfigError

ABOUT = 1.2  # costs within this factor of a budget are about equal to it
BUDGETS = (0.25, 1.0, 4.0)  # of the base budget, where choices are followed along Q
LONGEST_TEXT = 2048  # Q up to which they are drawn
FLOPS = EngFormatter(unit="FLOPs", places=0)
LABELLED_BARS = 12  # up to which each bar has room for its number


class Pair(NamedTuple):
    """An (LM, visual tokens) with its cost."""

    lm: str
    lm_params: Number
    visual_tokens: int
    flops: float  # 2 N (Q + V)


def extrapolation_figure(rows: Sequence[Row], fit: Fit, to: Number | None = None) -> Figure:
    """Error against LM size by the law of every size but the largest, as the paper's Figure 2.

    Filled cells were fitted. Those of the largest size were not: they are hollow, and the legend says how far the law is
    off there. to: parameters of a larger LM, at which the law is read off.
    Raises ConfigError when fewer than two sizes are left to fit.
    """
    sizes = sorted(set(fit.lms.values()))
    if len(sizes) < 3:
        raise ConfigError(
            f"plot: family {fit.family!r} has {len(sizes)} LM sizes; predicting the largest needs 2 others."
        )
    if to is not None and to <= sizes[-1]:
        raise ConfigError(
            f"plot: {size_name(to)} is no extrapolation; give more parameters than the largest LM, {size_name(sizes[-1])}."
        )
    own = rows_of(rows, fit)
    law = _law([row for row in own if fit.lms[row.lm] < sizes[-1]], fit)
    means = _cell_means(own, fit)
    figure, axes = canvas()
    labels, misses = [], []
    colours = shades(len(fit.visual_tokens))
    for v, colour, marker in zip(fit.visual_tokens, colours, _markers(fit), strict=True):
        _draw_tokens(axes, law, sizes, v, colour, to)
        off = []
        for lm, params in fit.lms.items():
            if (lm, v) not in means:
                continue
            held = params == sizes[-1]
            measured = means[lm, v]
            axes.plot(params, measured, marker, color=colour, markersize=8, markerfacecolor="white" if held else colour, markeredgecolor=colour if held else "white", markeredgewidth=1.4 if held else 0.7, zorder=4)  # fmt: skip
            if held and measured > 0:
                off.append(float(law.error(params, v)) / measured - 1)
        labels.append(f"{v}: {np.mean(off):+.1%}" if off else f"{v}: not measured")
        misses += off
    finish(axes, "parameters of the language model, N", f"{fit.family} error (1 - score)")
    ticks = sizes if to is None else [*sizes, to]
    axes.xaxis.set_major_locator(FixedLocator(apart(ticks, axes)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: size_name(n)))
    axes.xaxis.set_minor_locator(NullLocator())
    largest = size_name(sizes[-1])
    off_by = np.abs(misses)
    axes.set_title(
        f"{fit.family}: the law of {size_name(sizes[0])} to {size_name(sizes[-2])} predicts {largest} "
        f"within {off_by.max():.1%} (mean {off_by.mean():.1%})",
        fontsize=11,
    )
    kinds = [
        Line2D([], [], color=MUTED, marker="o", linestyle="-", label="fitted"),
        Line2D([], [], color=MUTED, marker="o", linestyle="--", markerfacecolor="white", label="held out"),
    ]  # fmt: skip
    title = f"visual tokens: law's\nerror at {largest}"
    legends(figure, {title: shape_keys(labels, colours), "": kinds})
    return figure


def text_tokens_figure(fit: Fit, base_flops: float | None = None) -> Figure:
    """The best number of visual tokens as the prompt grows, as the paper's Figure 3a.

    Left: LMs of every size, where the budget does not matter: the measured count of least error, and in a thin line
    V* = Q beta / (alpha - beta), where it exists. Right: the measured LMs at BUDGETS times `base_flops`; beyond the end
    of a line the budget buys none of them. None takes the geometric mean of the least and the greatest cost of a measured
    LM and count at Q = 0.
    """
    if base_flops is None:
        costs = [float(paper_flops(n, 0, v)) for n in fit.lms.values() for v in fit.visual_tokens]
        base_flops = math.sqrt(min(costs) * max(costs))
    figure, _ = canvas()
    figure.clear()
    grid = figure.add_gridspec(len(BUDGETS), 2, width_ratios=(1.15, 1))
    free = figure.add_subplot(grid[:, 0])
    _draw_free_sizes(free, fit)
    colours, names = lm_colours(fit.lms), lm_names(fit.lms)
    for i, share in enumerate(BUDGETS):
        axes = figure.add_subplot(grid[i, 1])
        _token_axes(axes, fit.visual_tokens)
        axes.yaxis.set_major_locator(FixedLocator(list(fit.visual_tokens[::2])))  # room for half
        plan = choose(fit, Budget("gflops", share * base_flops / 1e9), Workload(0))
        _draw_spans(axes, plan.by_text_tokens, colours)
        axes.set_title(f"measured LMs, {FLOPS(share * base_flops)}", fontsize=9, pad=3)
        axes.tick_params(labelsize=8, labelbottom=i == len(BUDGETS) - 1)
    keys = {names[lm]: colour for lm, colour in colours.items()}
    legends(figure, {LANGUAGE_MODEL: colour_keys(keys)}, at="outside right center")
    free.set_ylabel("best number of visual tokens, V")
    figure.supxlabel("text tokens, Q", fontsize=10)
    figure.suptitle(f"{fit.family}: {_tendency(fit.law)}", fontsize=11)
    return figure


def equal_compute_figure(
    rows: Sequence[Row], fits: Mapping[str, Fit], text_tokens: int = 0, flops: float | None = None
) -> Figure:
    """Errors of (LM, visual tokens) pairs of about equal cost, a group per benchmark, as the paper's Figure 4.

    Bars are measured (mean over seeds, whiskers from the lowest to the highest), black lines predicted by the
    benchmark's own law. flops: the cost; None takes the one about which most LMs have a cell.
    Raises ConfigError when fewer than two have one.
    """
    groups = [(fit, name) for fit in fits.values() for name in _benchmarks(rows, fit)]
    pairs = equal_pairs(measured_pairs(rows, fits, text_tokens), flops)
    figure, axes = canvas()
    lms = {pair.lm: pair.lm_params for pair in pairs}
    colours, names = lm_colours(lms), lm_names(lms)
    width = 0.8 / len(pairs)
    for g, (fit, benchmark) in enumerate(groups):
        own = [row for row in rows_of(rows, fit) if row.benchmark == benchmark]
        law = _law(own, fit)
        for i, pair in enumerate(pairs):
            x = g + (i - (len(pairs) - 1) / 2) * width
            errors = [row.error for row in own if row.cell == (pair.lm, pair.visual_tokens) and not row.flag]  # fmt: skip
            predicted = float(law.error(pair.lm_params, pair.visual_tokens))
            axes.bar(x, np.mean(errors), width * 0.92, color=colours[pair.lm], zorder=2)
            if len(errors) > 1:
                axes.vlines(x, min(errors), max(errors), color=MUTED, linewidth=1.4, zorder=3)
            axes.hlines(predicted, x - width * 0.46, x + width * 0.46, color="black", linewidth=2, zorder=4)  # fmt: skip
            if len(groups) * len(pairs) <= LABELLED_BARS:
                axes.annotate(f"{np.mean(errors):.3f}", (x, max(predicted, *errors)), (0, 3), textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    labels = [_group_name(fit, name) for fit, name in groups]
    crowded = len(labels) > 3
    axes.set_xticks(range(len(labels)), labels, fontsize=9, rotation=30 if crowded else 0, ha="right" if crowded else "center")  # fmt: skip
    axes.set_ylabel("error (1 - score)")
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = (FLOPS(limit(pair.flops for pair in pairs)) for limit in (min, max))
    axes.set_title(f"About equal compute: 2 N (Q + V) from {low} to {high}, Q = {text_tokens}", fontsize=11)  # fmt: skip
    bars = {f"{names[p.lm]}, V = {p.visual_tokens}": colours[p.lm] for p in pairs}
    predicted_key = Line2D([], [], color="black", linewidth=2, label="predicted by the law")
    legends(figure, {"measured": colour_keys(bars), "": [predicted_key]})
    return figure


def measured_pairs(rows: Sequence[Row], fits: Mapping[str, Fit], text_tokens: int) -> list[Pair]:
    """The (LM, visual tokens) that every benchmark of every law was measured at, smallest LM first."""
    cells = [
        {row.cell for row in rows_of(rows, fit) if row.benchmark == name and not row.flag}
        for fit in fits.values()
        for name in _benchmarks(rows, fit)
    ]
    sizes = {lm: params for fit in fits.values() for lm, params in fit.lms.items()}
    shared = sorted(set.intersection(*cells), key=lambda cell: (sizes[cell[0]], cell))
    return [
        Pair(lm, sizes[lm], v, float(paper_flops(sizes[lm], text_tokens, v))) for lm, v in shared
    ]


def equal_pairs(pairs: Sequence[Pair], flops: float | None = None) -> list[Pair]:
    """Of each LM the pair whose cost is nearest to `flops`, if it is within ABOUT of it; smallest LM first.

    flops: None takes the pair's cost that keeps the most LMs, of these the one whose costs differ the least.
    """
    if flops is not None:
        found = _near(pairs, flops)
    else:
        choices = [_near(pairs, pair.flops) for pair in pairs]
        found = max(choices, key=lambda near: (len(near), -_spread(near)), default=[])
    if len(found) < 2:
        where = "of any one cost" if flops is None else f"of {FLOPS(flops)}"
        raise ConfigError(
            f"plot: fewer than 2 LMs have a cell within {ABOUT - 1:.0%} {where}; "
            "measure more token counts, or give another --budget-gflops."
        )
    return found


def _near(pairs: Sequence[Pair], flops: float) -> list[Pair]:
    def distance(pair: Pair) -> float:
        return abs(math.log(pair.flops / flops))

    lms = dict.fromkeys(pair.lm for pair in pairs)
    nearest = [min((p for p in pairs if p.lm == lm), key=distance) for lm in lms]
    return [pair for pair in nearest if distance(pair) <= math.log(ABOUT)]


def _spread(pairs: Iterable[Pair]) -> float:
    costs = [pair.flops for pair in pairs]
    return max(costs) / min(costs)


def best_measured_tokens(
    law: Law, counts: Sequence[int], text_tokens: Int[np.ndarray, " q"]
) -> Int[np.ndarray, " q"]:
    """For each Q the count of least error at equal cost where LMs of every size exist: N = C / (Q + V), for any C."""
    v = np.array(counts)
    spent = np.asarray(text_tokens)[:, None] + v
    return v[np.argmin(spent**law.alpha * v**-law.beta, axis=1)]


def _law(rows: Sequence[Row], fit: Fit) -> Law:
    """The law of these rows, fitted as `fit` was."""
    fixed = fit.law.D if fit.d_fixed else None
    cells = select(rows, fit.family, None, fit.compressor, 4 if fixed is None else 3)
    return LOSSES[fit.loss](WEIGHTS[fit.weights](cells), fixed).points.law(fixed)


def _cell_means(rows: Sequence[Row], fit: Fit) -> dict[tuple[str, int], float]:
    errors: dict[tuple[str, int], list[Number]] = {}
    for row in family_mean(rows, fit.family):
        if not row.flag:
            errors.setdefault(row.cell, []).append(row.error)
    return {cell: float(np.mean(group)) for cell, group in errors.items()}


def _markers(fit: Fit) -> list[str]:
    return [MARKERS[i % len(MARKERS)] for i in range(len(fit.visual_tokens))]


def _benchmarks(rows: Sequence[Row], fit: Fit) -> list[str]:
    return list(dict.fromkeys(row.benchmark for row in rows_of(rows, fit)))


def _group_name(fit: Fit, benchmark: str) -> str:
    return fit.family if benchmark == fit.family else f"{fit.family}\n{benchmark}"


def _draw_tokens(
    axes: Axes, law: Law, sizes: Sequence[Number], tokens: int, colour, to: Number | None
) -> None:
    """One token count's curve: solid over the fitted sizes, dashed beyond, and marked at `to`."""
    fitted = np.geomspace(sizes[0], sizes[-2], SAMPLES)
    beyond = np.geomspace(sizes[-2], to or sizes[-1], SAMPLES)
    axes.plot(fitted, law.error(fitted, tokens), color=colour, linewidth=1.6, zorder=2)
    axes.plot(beyond, law.error(beyond, tokens), color=colour, linewidth=1.6, linestyle="--", zorder=2)  # fmt: skip
    if to is not None:
        error = float(law.error(to, tokens))
        axes.plot(to, error, "_", color=colour, markersize=9, markeredgewidth=2, zorder=4)


def _draw_free_sizes(axes: Axes, fit: Fit) -> None:
    law, counts = fit.law, fit.visual_tokens
    q = np.arange(LONGEST_TEXT + 1)
    best = best_measured_tokens(law, counts, q)
    axes.step(q, best, where="post", color=FRONTIER, linewidth=2.2, label="best measured count", zorder=3)  # fmt: skip
    ideal = np.array([optimal_visual_tokens(law.alpha, law.beta, float(x)) for x in q[1:]])
    if 0 < ideal[0] < math.inf:
        axes.plot(q[1:], ideal, color="black", linewidth=0.9, label="V* = Q β / (α - β)", zorder=2)
    axes.set_title("LMs of every size", fontsize=9, pad=3)
    axes.legend(loc="best", frameon=False, fontsize=9)
    _token_axes(axes, counts)


def _token_axes(axes: Axes, counts: Sequence[int]) -> None:
    """Q from 0 on a logarithm, V at the measured counts."""
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, LONGEST_TEXT)
    axes.set_yscale("log")
    axes.set_ylim(counts[0] / 1.5, counts[-1] * 1.5)
    axes.xaxis.set_major_locator(FixedLocator([0, 1, 10, 100, 1000]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda q, _: f"{q:g}"))
    axes.yaxis.set_major_locator(FixedLocator(list(counts)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_spans(axes: Axes, spans: Sequence[Span], colours: Mapping[str, object]) -> None:
    """The choice for every Q, coloured by LM; grey lines join what follows on each other."""
    ends = [(span.first, min(span.last + 1, LONGEST_TEXT), span) for span in spans]
    for first, end, span in ends:
        if first < LONGEST_TEXT:
            axes.plot([first, end], [span.visual_tokens] * 2, color=colours[span.lm], linewidth=3.5, solid_capstyle="butt", zorder=3)  # fmt: skip
    for (_, end, span), (_, _, following) in itertools.pairwise(ends):
        axes.plot([end, end], [span.visual_tokens, following.visual_tokens], color="#bbbbbb", linewidth=0.8, zorder=2)  # fmt: skip


def _tendency(law: Law) -> str:
    if law.beta <= 0:
        return "visual tokens do not help (β ≤ 0)"
    if law.alpha <= law.beta:
        return f"tokens before parameters (α = {law.alpha:.3f} ≤ β = {law.beta:.3f})"
    return f"more visual tokens for longer prompts (α = {law.alpha:.3f}, β = {law.beta:.3f})"
