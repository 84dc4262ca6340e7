"""Pictures of a law, drawn from the table and the fit: nothing is typed in. `plot.py` is the command.

Error against cost, a plan, an unseen LM size, the best number of visual tokens, pairs of equal cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

from vlm_jax.costs.price import Budget, Number, Workload, paper_flops
from vlm_jax.laws import drawing
from vlm_jax.laws.choice import Plan, Span
from vlm_jax.laws.fitting import select, weighed
from vlm_jax.laws.law import Fit, benchmarks_of, rows_of
from vlm_jax.laws.least_squares import Law
from vlm_jax.laws.planning import (
    best_measured_tokens,
    choose,
    equal_pairs,
    measured_pairs,
    optimal_visual_tokens,
)
from vlm_jax.laws.table import Row, family_mean
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.presets import size_name

BUDGETS = (0.25, 1.0, 4.0)  # of the base budget, where choices are followed along Q
LONGEST_TEXT = 2048  # Q up to which they are drawn
FLOPS = EngFormatter(unit="FLOPs", places=0)
FRONTIER_LINE: dict[str, Any] = {"color": drawing.FRONTIER, "alpha": 0.35, "zorder": 1, "solid_joinstyle": "round"}  # fmt: skip
LABELLED_BARS = 12  # up to which each bar has room for its number


def errors_figure(rows: Sequence[Row], fit: Fit, text_tokens: int = 0) -> Figure:
    """Error against the paper's inference FLOPs 2 N (Q + V), as its Figure 1.

    Points are measured cells (mean over seeds, bars from the lowest to the highest seed), thin lines the fitted law for
    each LM, the band its Pareto frontier. Flagged cells are hollow and were not fitted. text_tokens: Q.
    """
    rows = family_mean(rows_of(rows, fit), fit.family)
    figure, axes = drawing.canvas(drawing.FOR_PHONES)
    lms = sorted(fit.lms.items(), key=lambda item: item[1])
    colours, names = drawing.lm_colours(fit.lms), drawing.lm_names(fit.lms)
    _draw_law(axes, fit, lms, colours, text_tokens)
    for lm, params in lms:
        for i, tokens in enumerate(fit.visual_tokens):
            x = float(paper_flops(params, text_tokens, tokens))
            runs = [row for row in rows if row.cell == (lm, tokens)]
            _draw_cell(axes, x, runs, colours[lm], drawing.MARKERS[i % len(drawing.MARKERS)])
    cost = f"FLOPs of one answer, 2 N (Q + V), Q = {text_tokens}"
    drawing.finish(axes, cost, f"{fit.family} error (1 - score)")
    law = fit.law
    floor = f" + {law.D:.3g}" if law.D > 0 else ""
    axes.set_title(
        f"{fit.family}: error = {law.A:.3g} N$^{{{-law.alpha:.3f}}}$ V$^{{{-law.beta:.3f}}}${floor}"
        " (N in billions)",
        fontsize=10,
    )
    hollow = Line2D([], [], color=drawing.MUTED, marker="o", markersize=7, markerfacecolor="none", linestyle="", label="not fitted")  # fmt: skip
    flagged = [hollow] if any(row.flag for row in rows) else []
    drawing.legends_below(
        figure,
        {
            drawing.LANGUAGE_MODEL: drawing.colour_keys({names[lm]: colours[lm] for lm, _ in lms}),
            drawing.VISUAL_TOKENS: drawing.shape_keys([str(v) for v in fit.visual_tokens]),
            "": [_frontier_key(), *flagged],
        },
    )
    return figure


def plan_figure(plan: Plan, fit: Fit) -> Figure:
    """The candidates' predicted error against their cost, the Pareto frontier, the budget and the choice."""
    figure, axes = drawing.canvas(drawing.FOR_PHONES)
    tokens = sorted({c.visual_tokens for c in plan.candidates})
    colours = drawing.lm_colours({c.lm: c.lm_params for c in plan.candidates})
    low, high = min(c.cost for c in plan.candidates), max(c.cost for c in plan.candidates)
    right = max(high, plan.budget.limit) * 1.3
    axes.axvspan(plan.budget.limit, right, color="#eeeeee", zorder=0, linewidth=0)
    axes.axvline(plan.budget.limit, color=drawing.MUTED, linewidth=1.2, linestyle="--", zorder=1)
    axes.plot(
        [c.cost for c in plan.frontier],
        [c.error for c in plan.frontier],
        linewidth=5,
        **FRONTIER_LINE,
    )
    for c in plan.candidates:
        marker = drawing.MARKERS[tokens.index(c.visual_tokens) % len(drawing.MARKERS)]
        axes.plot(c.cost, c.error, marker, color=colours[c.lm], markersize=7, markeredgecolor="white", markeredgewidth=0.6, zorder=3)  # fmt: skip
    best = plan.best
    below, above = best.error - best.interval[0], best.interval[1] - best.error
    axes.errorbar(best.cost, best.error, yerr=[[max(below, 0)], [max(above, 0)]], fmt="none", ecolor="black", elinewidth=1.2, capsize=3, zorder=4)  # fmt: skip
    axes.plot(best.cost, best.error, "o", markersize=16, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.6, zorder=5)  # fmt: skip
    axes.set_xlim(low / 1.3, right)
    cost = f"{plan.budget.unit} ({plan.method}, Q = {plan.workload.text_tokens})"
    drawing.finish(axes, cost, f"predicted {plan.family} error", drawing.PLAIN)
    axes.set_title(
        f"{plan.family}: {plan.budget.text} buy {best.named}",
        fontsize=10,
    )
    budget = Line2D([], [], color=drawing.MUTED, linestyle="--", linewidth=1.2, label="budget")
    choice = Line2D([], [], color="black", marker="o", markersize=11, markerfacecolor="none", linestyle="", label="choice")  # fmt: skip
    drawing.legends_below(
        figure,
        {
            drawing.LANGUAGE_MODEL: drawing.colour_keys(colours),
            drawing.VISUAL_TOKENS: drawing.shape_keys([str(v) for v in tokens]),
            "": [_frontier_key(), budget, choice],
        },
    )
    return figure


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
    figure, axes = drawing.canvas()
    labels, misses = [], []
    colours = drawing.shades(len(fit.visual_tokens))
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
    drawing.finish(axes, "parameters of the language model, N", f"{fit.family} error (1 - score)")
    ticks = sizes if to is None else [*sizes, to]
    axes.xaxis.set_major_locator(FixedLocator(drawing.apart(ticks, axes.xaxis, drawing.X_ROOM)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: size_name(n)))
    axes.xaxis.set_minor_locator(NullLocator())
    largest = size_name(sizes[-1])
    off_by = np.abs(misses)
    axes.set_title(
        f"{fit.family}: the law of {size_name(sizes[0])} to {size_name(sizes[-2])}\npredicts {largest} "
        f"within {off_by.max():.1%} (mean {off_by.mean():.1%})",
        fontsize=11,
    )
    kinds = [
        Line2D([], [], color=drawing.MUTED, marker="o", linestyle="-", label="fitted"),
        Line2D([], [], color=drawing.MUTED, marker="o", linestyle="--", markerfacecolor="white", label="held out"),
    ]  # fmt: skip
    title = f"visual tokens: law's\nerror at {largest}"
    drawing.legends(figure, {title: drawing.shape_keys(labels, colours), "": kinds})
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
    figure, _ = drawing.canvas()
    figure.clear()
    grid = figure.add_gridspec(len(BUDGETS), 2, width_ratios=(1.15, 1))
    free = figure.add_subplot(grid[:, 0])
    _draw_free_sizes(free, fit)
    colours, names = drawing.lm_colours(fit.lms), drawing.lm_names(fit.lms)
    for i, share in enumerate(BUDGETS):
        axes = figure.add_subplot(grid[i, 1])
        _token_axes(axes, fit.visual_tokens, len(BUDGETS) * drawing.Y_ROOM)
        plan = choose(fit, Budget("gflops", share * base_flops / 1e9), Workload(0))
        _draw_spans(axes, plan.by_text_tokens, colours)
        axes.set_title(f"measured LMs, {FLOPS(share * base_flops)}", fontsize=9, pad=3)
        axes.tick_params(labelsize=8, labelbottom=i == len(BUDGETS) - 1)
    keys = {names[lm]: colour for lm, colour in colours.items()}
    drawing.legends(
        figure, {drawing.LANGUAGE_MODEL: drawing.colour_keys(keys)}, at="outside right center"
    )
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
    groups = [(fit, name) for fit in fits.values() for name in benchmarks_of(rows, fit)]
    pairs = equal_pairs(measured_pairs(rows, fits, text_tokens), flops)
    figure, axes = drawing.canvas()
    lms = {pair.lm: pair.lm_params for pair in pairs}
    colours, names = drawing.lm_colours(lms), drawing.lm_names(lms)
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
                axes.vlines(
                    x, min(errors), max(errors), color=drawing.MUTED, linewidth=1.4, zorder=3
                )
            axes.hlines(predicted, x - width * 0.46, x + width * 0.46, color="black", linewidth=2, zorder=4)  # fmt: skip
            if len(groups) * len(pairs) <= LABELLED_BARS:
                axes.annotate(f"{np.mean(errors):.3f}", (x, max(predicted, *errors)), (0, 3), textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    crowded = len(groups) > 3
    labels = [name if crowded else _group_name(fit, name) for fit, name in groups]
    if crowded:
        _name_families(axes, [fit.family for fit, _ in groups])
    axes.set_xticks(range(len(labels)), labels, fontsize=9, rotation=30 if crowded else 0, ha="right" if crowded else "center")  # fmt: skip
    axes.set_ylabel("error (1 - score)")
    drawing.plain(axes, "y")
    low, high = (FLOPS(limit(pair.flops for pair in pairs)) for limit in (min, max))
    axes.set_title(f"About equal compute: 2 N (Q + V) from {low} to {high}, Q = {text_tokens}", fontsize=10)  # fmt: skip
    bars = {f"{names[p.lm]}, V = {p.visual_tokens}": colours[p.lm] for p in pairs}
    predicted_key = Line2D([], [], color="black", linewidth=2, label="predicted by the law")
    drawing.legends(figure, {"measured": drawing.colour_keys(bars), "": [predicted_key]})
    return figure


def _law(rows: Sequence[Row], fit: Fit) -> Law:
    """The law of these rows, fitted as `fit` was."""
    fixed = fit.law.D if fit.d_fixed else None
    own = select(rows, fit.family, None, fit.compressor, 4 if fixed is None else 3, fit.elastic)
    return weighed(own, fit.weights, fit.loss, fixed).points.law(fixed)


def _cell_means(rows: Sequence[Row], fit: Fit) -> dict[tuple[str, int], float]:
    errors: dict[tuple[str, int], list[Number]] = {}
    for row in family_mean(rows, fit.family):
        if not row.flag:
            errors.setdefault(row.cell, []).append(row.error)
    return {cell: float(np.mean(group)) for cell, group in errors.items()}


def _markers(fit: Fit) -> list[str]:
    return [drawing.MARKERS[i % len(drawing.MARKERS)] for i in range(len(fit.visual_tokens))]


def _group_name(fit: Fit, benchmark: str) -> str:
    return fit.family if benchmark == fit.family else f"{fit.family}\n{benchmark}"


def _name_families(axes: Axes, families: Sequence[str]) -> None:
    """Above the groups of each family its name, and a line between families. families: of each group."""
    axes.margins(y=0.12)
    first = 0
    for family, own in itertools.groupby(families):
        count = len(list(own))
        where = axes.get_xaxis_transform()
        axes.text(first + (count - 1) / 2, 0.98, family, transform=where, ha="center", va="top", fontsize=9, color=drawing.MUTED)  # fmt: skip
        if first:
            axes.axvline(first - 0.5, color="#bbbbbb", linewidth=0.8, zorder=1)
        first += count


def _draw_tokens(
    axes: Axes, law: Law, sizes: Sequence[Number], tokens: int, colour, to: Number | None
) -> None:
    """One token count's curve: solid over the fitted sizes, dashed beyond, and marked at `to`."""
    fitted = np.geomspace(sizes[0], sizes[-2], drawing.SAMPLES)
    beyond = np.geomspace(sizes[-2], to or sizes[-1], drawing.SAMPLES)
    axes.plot(fitted, law.error(fitted, tokens), color=colour, linewidth=1.6, zorder=2)
    axes.plot(beyond, law.error(beyond, tokens), color=colour, linewidth=1.6, linestyle="--", zorder=2)  # fmt: skip
    if to is not None:
        error = float(law.error(to, tokens))
        axes.plot(to, error, "_", color=colour, markersize=9, markeredgewidth=2, zorder=4)


def _draw_free_sizes(axes: Axes, fit: Fit) -> None:
    law, counts = fit.law, fit.visual_tokens
    q = np.arange(LONGEST_TEXT + 1)
    best = best_measured_tokens(law, counts, q)
    axes.step(q, best, where="post", color=drawing.FRONTIER, linewidth=2.2, label="best measured count", zorder=3)  # fmt: skip
    ideal = np.array([optimal_visual_tokens(law.alpha, law.beta, float(x)) for x in q[1:]])
    if 0 < ideal[0] < math.inf:
        axes.plot(q[1:], ideal, color="black", linewidth=0.9, label="V* = Q β / (α - β)", zorder=2)
    axes.set_title("LMs of every size", fontsize=9, pad=3)
    axes.legend(loc="best", frameon=False, fontsize=9)
    _token_axes(axes, counts, drawing.Y_ROOM)


def _token_axes(axes: Axes, counts: Sequence[int], room: float) -> None:
    """Q from 0 on a logarithm, V at the measured counts. room: of the axis of V that a label needs."""
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, LONGEST_TEXT)
    axes.set_yscale("log")
    axes.set_ylim(counts[0] / 1.5, counts[-1] * 1.5)
    axes.xaxis.set_major_locator(FixedLocator([0, 1, 10, 100, 1000]))
    axes.xaxis.set_major_formatter(drawing.PLAIN)
    axes.yaxis.set_major_locator(FixedLocator(drawing.apart(counts, axes.yaxis, room)))
    axes.yaxis.set_major_formatter(drawing.PLAIN)
    axes.yaxis.set_minor_locator(NullLocator())
    drawing.plain(axes)


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


def _draw_law(axes: Axes, fit: Fit, lms, colours, text_tokens: int) -> None:
    tokens = np.geomspace(fit.visual_tokens[0], fit.visual_tokens[-1], drawing.SAMPLES)
    curves = []
    for lm, params in lms:
        cost = np.asarray(paper_flops(params, text_tokens, tokens))
        curves.append((cost, fit.law.error(params, tokens)))
        axes.plot(*curves[-1], color=colours[lm], linewidth=1.6, zorder=2)
    axes.plot(*_envelope(curves), linewidth=7, **FRONTIER_LINE)


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
    if len(good) > 1:
        axes.vlines(x, min(good), max(good), color=colour, linewidth=1.4, zorder=3)
    if good:
        axes.plot(x, np.mean(good), marker, color=colour, markersize=8, markeredgecolor="white", markeredgewidth=0.7, zorder=4)  # fmt: skip
    for row in runs:
        if row.flag:
            axes.plot(x, row.error, marker, markersize=8, markerfacecolor="none", markeredgecolor=colour, zorder=4)  # fmt: skip


def _frontier_key() -> Line2D:
    return Line2D([], [], color=drawing.FRONTIER, linewidth=7, alpha=0.35, label="Pareto frontier")
