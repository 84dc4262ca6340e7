"""Measured cells beside published ones, where both have the same LM size and number of visual tokens: `laws/data`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vlm_jax import files
from vlm_jax.costs.price import Number, paper_flops
from vlm_jax.laws import drawing, fitting, table, words
from vlm_jax.laws.law import Fit
from vlm_jax.laws.least_squares import Law
from vlm_jax.laws.table import Row
from vlm_jax.laws.words import Table
from vlm_jax.settings.checks import ConfigError

DATA = files.to_path(__file__).parent / "data"
Cell = tuple[Number, int]  # parameters of the LM, visual tokens


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One family's shared cells, and the law of each side's. errors: [measured, published] of each shared cell."""

    family: str
    errors: dict[Cell, tuple[float, float]]
    laws: tuple[Fit | None, Fit | None]  # of the shared cells alone; None where they determine none
    printed: tuple[float, float] | None  # alpha and beta as the publication prints them

    @property
    def differences(self) -> np.ndarray:
        """Measured minus published error."""
        return np.array([measured - published for measured, published in self.errors.values()])


def published(name: str) -> list[Row]:
    """The rows of a table that the package holds. Raises ConfigError for another name."""
    known = sorted(path.stem for path in DATA.glob("*.csv"))
    if name not in known:
        raise ConfigError(
            f"sweep: published_cells names {name!r}; the package holds {', '.join(known)}."
        )
    return table.read(DATA / f"{name}.csv")


def compare(
    rows: Sequence[Row],
    fit: Fit,
    theirs: Sequence[Row],
    printed: tuple[float, float] | None,
) -> Comparison:
    """rows: the measured ones; fit: the law of this family's; theirs: the published rows of the family.

    Raises ConfigError when no cell is in both.
    """
    own = [row for row in words.runs_of(rows, fit) if not row.flag]
    shared = {_cell(row) for row in own} & {_cell(row) for row in theirs}
    if not shared:
        raise ConfigError(
            f"{fit.family}: no cell has an LM size and a number of visual tokens of the published table."
        )
    sides = [[row for row in side if _cell(row) in shared] for side in (own, theirs)]
    means = [
        {cell: words.mean_error([r for r in side if _cell(r) == cell]) for cell in sorted(shared)}
        for side in sides
    ]
    errors = {cell: (means[0][cell], means[1][cell]) for cell in sorted(shared)}
    fixed = fit.law.D if fit.d_fixed else None
    laws = [_law(side, fit.family, fixed) for side in sides]
    return Comparison(fit.family, errors, (laws[0], laws[1]), printed)


def _cell(row: Row) -> Cell:
    return row.lm_params, row.visual_tokens


def _law(rows: Sequence[Row], family: str, fixed_d: float | None) -> Fit | None:
    try:
        return fitting.fit_family(rows, family, fixed_d=fixed_d, draws=100)
    except ConfigError:  # too few cells
        return None


def sentence(found: Comparison) -> str:
    off = found.differences
    return (
        f"{words.headline(words.spoken(found.family))}: {len(off)} cells are published too; the errors here are {off.mean():+.3f} "
        f"on average, {off.min():+.3f} to {off.max():+.3f}, against the published ones."
    )


def constants(found: Sequence[Comparison]) -> Table:
    """The law of the shared cells as measured here and as published, beside the constants that are printed."""
    body = []
    for one in found:
        printed = dict(zip(("alpha", "beta"), one.printed or (), strict=False))
        if one.printed:
            printed["alpha/beta"] = one.printed[0] / one.printed[1]
        for name in ("A", "alpha", "beta", "D", "alpha/beta"):
            values = [words.value(fit, name) if fit else "-" for fit in one.laws]
            told = f"{printed[name]:.3g}" if name in printed else "-"
            body.append([f"{words.spoken(one.family)} {name}", *values, told])
    return Table(["constant", "these cells", "the same cells as published", "as printed"], body)


def figure(found: Comparison, text_tokens: int = 0) -> Figure:
    """Error against the paper's inference FLOPs 2 N (Q + V): measured cells and their law, published ones and theirs."""
    figure_, axes = drawing.canvas()
    sizes = sorted({params for params, _ in found.errors})
    lms = {drawing.size_name(params): params for params in sizes}
    colours = drawing.lm_colours(lms)
    for name, params in lms.items():
        counts = [v for n, v in found.errors if n == params]
        for side, (filled, line) in enumerate(((True, "-"), (False, "--"))):
            fit = found.laws[side]
            if fit is not None:
                _draw_law(axes, fit.law, params, counts, text_tokens, colours[name], line)
            for v in counts:
                axes.plot(
                    float(paper_flops(params, text_tokens, v)), found.errors[params, v][side], "o",
                    color=colours[name], markerfacecolor=colours[name] if filled else "white", markersize=7,
                    markeredgecolor="white" if filled else colours[name], markeredgewidth=0.7 if filled else 1.4, zorder=4,
                )  # fmt: skip
    cost = f"FLOPs of one answer, 2 N (Q + V), Q = {text_tokens}"
    drawing.finish(axes, cost, f"{found.family} error (1 - score)")
    kinds = [
        Line2D([], [], color=drawing.MUTED, marker="o", label="measured here"),
        Line2D([], [], color=drawing.MUTED, marker="o", linestyle="--", markerfacecolor="white", label="published"),
    ]  # fmt: skip
    axes.set_title(f"{found.family}: the cells that are published too, and a law of each", fontsize=10)  # fmt: skip
    drawing.legends(figure_, {drawing.LANGUAGE_MODEL: drawing.colour_keys(colours), "": kinds})
    return figure_


def _draw_law(
    axes: Axes, law: Law, params: Number, counts: Sequence[int], text_tokens: int, colour, line: str
) -> None:
    tokens = np.geomspace(min(counts), max(counts), drawing.SAMPLES)
    cost = np.asarray(paper_flops(params, text_tokens, tokens))
    axes.plot(cost, law.error(params, tokens), line, color=colour, linewidth=1.6, zorder=2)
