"""report.md and report.html of a sweep: the answer and its two figures first, then what it rests on.

Both are written from one list of blocks, beside their pictures; nothing is fetched from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm_jax.laws import answer, drawing, figures, page, planning, words
from vlm_jax.laws.answer import Change, headline, runs_of, spell, spoken
from vlm_jax.laws.budget import Plan
from vlm_jax.laws.law import Fit
from vlm_jax.laws.page import Block, Picture, Table
from vlm_jax.laws.table import Row
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.presets import size_name

FLAG = "†"
LAW = "The law is error = A / (N^alpha V^beta) + D, with N the LM's parameters in billions and V the number of visual tokens."


def write_report(
    folder: Path,
    rows: Sequence[Row],
    fits: Mapping[str, Fit],
    *,
    title: str,
    made_by: str,
    text_tokens: int,
    budget_gflops: float,
    notes: Sequence[str] = (),
    elastic: Mapping[str, Fit] | None = None,
    pictures: Sequence[Picture] = (),
    caveats: Sequence[str] = (),
    seconds: Mapping[str, float] | None = None,
) -> Path:
    """Draws the figures and writes report.md and report.html into `folder`; returns the path of the latter.

    Args:
      rows: of errors.csv, flagged ones and other compressors' included. fits: by family.
      made_by: the command that made all this. text_tokens: Q of the figures and the plan. budget_gflops: the plan's.
      notes: sentences below the tables of errors, such as which cells were run again and why.
      elastic: laws of another compressor of these rows, which one training per LM taught every number of visual tokens.
        All remaining compressors are taken to look at the question.
      pictures: of where such a compressor looks. seconds: by part of the run.
    """
    elastic = elastic or {}
    plans = _plans(fits, budget_gflops, text_tokens)
    made = {family: plan for family, plan in plans.items() if isinstance(plan, Plan)}
    looking = {
        family: answer.beside(rows, fit, [e.compressor for e in elastic.values()])
        for family, fit in fits.items()
    }
    said = [
        answer.of_exponents(fits),
        answer.of_plans(made, text_tokens),
        answer.of_looking(looking),
    ]
    blocks = [page.heading(1, title), page.answer([line for line in said if line])]
    blocks.append(_law_figures(folder, rows, fits, text_tokens))
    blocks += _tables(rows, fits, notes)
    blocks += _plan_blocks(folder, fits, plans)
    blocks += _looking_blocks(folder, looking, pictures)
    if elastic:
        blocks += _elastic_blocks(rows, fits, elastic)
    if caveats:
        blocks += [page.heading(2, "What this does not show"), page.items(caveats)]
    blocks += [page.heading(2, "How it was made"), page.command(made_by)]
    if seconds:
        parts = [[name, f"{value:.0f}"] for name, value in seconds.items()]
        total = f"Time of the parts, some of which ran side by side: {sum(seconds.values()):.0f} seconds together."
        blocks.append(page.folded(total, page.table(Table(["part", "seconds"], parts))))
    return page.write(folder, title, blocks)


def _law_figures(
    folder: Path, rows: Sequence[Row], fits: Mapping[str, Fit], text_tokens: int
) -> Block:
    shown = []
    for family, fit in fits.items():
        drawing.save_both(figures.errors_figure(rows, fit, text_tokens), folder, f"errors_{family}")
        caption = f"{headline(spoken(family))} error against FLOPs, with the fitted law"
        shown.append(Picture(f"errors_{family}.png", caption))
    return page.pictures(shown)


def _tables(rows: Sequence[Row], fits: Mapping[str, Fit], notes: Sequence[str]) -> list[Block]:
    blocks, remarks = [page.heading(2, "Errors")], []
    for family, fit in fits.items():
        table = error_table(rows, fit)
        blocks += [page.heading(3, headline(spoken(family))), page.table(table)]
        remarks.append(_about_cells(rows, fit))
        if any(FLAG in cell for line in table.rows for cell in line):
            remarks.append(
                f"{FLAG}: a run that stayed at chance or out of line in every rerun is left out."
            )
    blocks.append(page.items([*dict.fromkeys(remarks), *notes]))
    level = next(iter(fits.values())).level
    about = f"{LAW} Brackets after a constant hold its {level:.0%} profile-likelihood interval; law.json has other kinds."
    blocks += [page.heading(2, "Constants of the law"), page.paragraph(about)]
    blocks.append(page.table(constants_table(fits)))
    return [*blocks, page.items([line for fit in fits.values() for line in words.doubts(fit)])]


def _about_cells(rows: Sequence[Row], fit: Fit) -> str:
    """What a table's numbers are, in a sentence."""
    counts = sorted({row.n for row in rows if row.family == fit.family and row.n})
    asked = f", {' or '.join(map(str, counts))} questions per cell and seed" if counts else ""
    if fit.num_seeds > 1:
        return f"Mean of {fit.num_seeds} seeds (lowest to highest){asked}; compressor {fit.compressor}."
    by = f" ({answer.LEVEL:.0%} binomial interval)" if counts else ""
    return f"One seed{by}{asked}; compressor {fit.compressor}."


def error_table(rows: Sequence[Row], fit: Fit) -> Table:
    """Sizes down, token counts across; each cell the mean over seeds with its range, or one seed's binomial interval."""
    own = runs_of(rows, fit)
    counts = sorted({row.visual_tokens for row in own})
    sizes = sorted({(row.lm_params, row.lm) for row in own})
    body = []
    for params, lm in sizes:
        cells = [_cell([row for row in own if row.cell == (lm, count)]) for count in counts]
        body.append([f"{lm} ({size_name(params)})", *cells])
    return Table(["LM", *(f"V = {count}" for count in counts)], body)


def _cell(runs: Sequence[Row]) -> str:
    if not runs:
        return ""
    good = answer.good(runs)
    errors = [float(row.error) for row in good]
    text, n = f"{answer.mean_error(runs):.3f}", good[0].n
    if len(good) > 1:
        text += f" ({min(errors):.3f}–{max(errors):.3f})"
    elif n:
        text += " ({:.3f}–{:.3f})".format(*answer.binomial_interval(errors[0], n))
    return text + (FLAG if any(row.flag for row in runs) else "")


def constants_table(fits: Mapping[str, Fit]) -> Table:
    """The constants of every family with the headline intervals, and R2; what they are at D = 0 where D was fitted."""
    free = not all(fit.d_fixed for fit in fits.values())
    body = []
    for family, fit in fits.items():
        drawn = 2 + list(fit.intervals).index(fit.mode)
        shown = [0, 1, drawn, *([-1] if free else [])]
        for name, texts in words.constant_rows(fit).items():
            if texts[0] != "-" and not (name == "D" and fit.d_fixed):
                body.append([f"{spoken(family)} {name}", *(texts[i] for i in shown)])
        body.append([f"{spoken(family)} R2", f"{fit.r2:.3f}", *[""] * (len(shown) - 1)])
    first = next(iter(fits.values()))
    header = ["constant", "fit", f"{first.level:.0%} profile", f"{first.level:.0%} over {first.mode}"]  # fmt: skip
    return Table([*header, *(["fit at D = 0"] if free else [])], body)


def _plans(
    fits: Mapping[str, Fit], budget_gflops: float, text_tokens: int
) -> dict[str, Plan | ConfigError]:
    """By family; the error where the budget buys nothing."""
    found: dict[str, Plan | ConfigError] = {}
    for family, fit in fits.items():
        try:
            found[family] = planning.choose(fit, budget_gflops * 1e9, text_tokens)
        except ConfigError as error:
            found[family] = error
    return found


def _plan_blocks(
    folder: Path, fits: Mapping[str, Fit], plans: Mapping[str, Plan | ConfigError]
) -> list[Block]:
    lines, shown, body = [], [], []
    for family, plan in plans.items():
        name = headline(spoken(family))
        if isinstance(plan, ConfigError):
            lines.append(f"{name}: {str(plan).removeprefix('plan: ')}")
            continue
        lines += words.around(plan)
        body += [
            [name, f"{c.lm}, V = {c.visual_tokens}", f"{c.cost:.3g}", f"{c.error:.3f}{spell(c.interval, '.3f')}", f"{c.share:.0%}"]
            for c in (plan.best, *plan.runners_up[:2])
        ]  # fmt: skip
        drawing.save_both(figures.plan_figure(plan, fits[family]), folder, f"plan_{family}")
        shown.append(Picture(f"plan_{family}.png", f"{name}: candidates, frontier, budget and choice"))  # fmt: skip
    blocks = [page.heading(2, "The plan")]
    if body:
        header = ["family", "choice and runners-up", "GFLOPs", "predicted error", "best in"]
        blocks.append(page.table(Table(header, body)))
    blocks.append(page.items(lines))
    return [*blocks, page.pictures(shown)] if shown else blocks


def _looking_blocks(
    folder: Path, looking: Mapping[str, Sequence[Change]], pictures: Sequence[Picture]
) -> list[Block]:
    """Cells of compressors that look at the question, beside the same cells of the one the law was fitted on."""
    body = []
    for family, changes in looking.items():
        for change in changes:
            own, other = change.own[0], change.other[0]
            span = spell(change.interval, "+.3f") if change.interval else ""
            body.append([
                headline(spoken(family)), f"{other.lm}, V = {other.visual_tokens}", f"{own.compressor} {_cell(change.own)}",
                f"{other.compressor} {_cell(change.other)}", f"{change.mean:+.3f}{span}",
            ])  # fmt: skip
    if not (body or pictures):
        return []
    blocks = [page.heading(2, "What looking at the question buys")]
    if body:
        header = ["family", "cell", "blind to the question", "sees the question", "change"]
        note = "These cells stand beside the law, not in it; the change has a 95% interval."
        blocks += [page.table(Table(header, body)), page.paragraph(note)]
    for picture in pictures:
        if not (folder / picture.file).is_file():
            raise ConfigError(f"report: the picture {picture.file} is not in {folder}.")
    return [*blocks, page.pictures(pictures)] if pictures else blocks


def _elastic_blocks(
    rows: Sequence[Row], fits: Mapping[str, Fit], elastic: Mapping[str, Fit]
) -> list[Block]:
    """The law of one training per LM beside the law of one training per cell."""
    body, tables = [], []
    for family, other in elastic.items():
        pair, name = (fits[family], other), spoken(family)
        for constant in ("alpha", "beta"):
            values = (answer.value(fit, constant) for fit in pair)
            body.append([f"{name} {constant}", *values])
        body.append([f"{name} R2", *(f"{fit.r2:.3f}" for fit in pair)])
        means = (answer.mean_error(runs_of(rows, fit)) for fit in pair)
        body.append([f"{name} error, mean", *(f"{mean:.3f}" for mean in means)])
        tables += [page.heading(3, headline(name)), page.table(error_table(rows, other))]
    own, one = (next(iter(laws.values())).compressor for laws in (fits, elastic))
    header = ["constant", f"a training per cell ({own})", f"a training per LM ({one})"]
    return [
        page.heading(2, "One training per LM, every number of visual tokens"),
        page.paragraph(answer.of_elastic(rows, fits, elastic)),
        page.table(Table(header, body)),
        page.folded(f"The errors of {one}", *tables),
    ]
