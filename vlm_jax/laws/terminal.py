"""A fit as text: the constants with their intervals, the laws beside it, and what the numbers say."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vlm_jax.laws.law import CONSTANTS, Fit, Law


def show(fit: Fit, console: Console) -> None:
    """Prints one family's constants, the headline intervals (law.json has all), other laws and the statements."""
    compressor = f", {fit.compressor}" if fit.compressor else ""
    console.print(
        f"{fit.family} ({fit.benchmark}{compressor}): {fit.num_cells} cells, {fit.num_seeds} seed(s), "
        f"R2 {fit.r2:.3f}, largest relative error {fit.max_relative_error:.1%}",
        style="bold", highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(_constants(fit))
    console.print(_alternatives(fit))
    for line in fit.statements:
        console.print("- " + line, highlight=False, markup=False, soft_wrap=True)


def _constants(fit: Fit) -> Table:
    modes = list(fit.intervals)
    header = ["value", f"{fit.level:.0%} profile", *(f"over {mode}" for mode in modes), "at D = 0"]
    shown = [0, 1, 2 + modes.index(fit.mode), len(header) - 1]
    grid = Table(box=SIMPLE, pad_edge=False)
    grid.add_column("constant")
    for i in shown:
        grid.add_column(header[i], justify="right")
    for name, texts in constant_rows(fit).items():
        grid.add_row(name, *(texts[i] for i in shown))
    return grid


def constant_rows(fit: Fit) -> dict[str, list[str]]:
    """Per constant, as text: value, profile interval, interval per resampling mode, value at D = 0.

    An unidentified D has no interval from resamples: they all sit at 0 where the table does.
    """
    rows = {}
    for name in CONSTANTS:
        first, last = (_number(_constant(law, name)) for law in (fit.law, fit.law_d_zero))
        spans = [group[name] for group in fit.intervals.values()]
        if name == "D" and not fit.d_identified:
            spans = [None] * len(spans)
        rows[name] = [first, *(_span(s) for s in (fit.profile[name], *spans)), last]
    return rows


def _alternatives(fit: Fit) -> Table:
    grid = Table(box=SIMPLE, pad_edge=False)
    grid.add_column("law")
    for name in ("k", "RMSE", "+AICc", "+BIC", "one size out", "largest out"):
        grid.add_column(name, justify="right", no_wrap=True)
    least_aicc = min((a.aicc for a in fit.alternatives if a.aicc is not None), default=0.0)
    least_bic = min(a.bic for a in fit.alternatives)
    largest = max(fit.lms, key=lambda lm: fit.lms[lm])
    for law in fit.alternatives:
        out = list(law.held_out.values())
        each = (sum(m for m, _ in out) / len(out), max(w for _, w in out)) if out else None
        grid.add_row(
            law.formula,
            str(law.num_constants),
            f"{law.rmse:.3g}",
            "-" if law.aicc is None else f"{law.aicc - least_aicc:.1f}",
            f"{law.bic - least_bic:.1f}",
            _mean_and_most(each),
            _mean_and_most(law.held_out.get(largest)),
        )
    grid.caption = "+: above the lowest; out: mean / largest relative error of an LM size by the law of the others"
    grid.caption_justify = "left"
    return grid


def _constant(law: Law, name: str) -> float | None:
    return law.ratio if name == "alpha/beta" else getattr(law, name)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _span(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.3g}..{pair[1]:.3g}"


def _mean_and_most(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else " / ".join(f"{100 * share:.3g}%" for share in pair)
