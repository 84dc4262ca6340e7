"""report.md and report.html of a sweep: errors, laws, figures, a plan, what a query-aware compressor changes, caveats.

Both are written from one list of blocks, beside their pictures; nothing is fetched from anywhere.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vlm_jax import files
from vlm_jax.laws import drawing, figures, planning
from vlm_jax.laws.cells import rows_of
from vlm_jax.laws.law import Fit
from vlm_jax.laws.table import Row, family_mean
from vlm_jax.laws.words import constant_rows
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.presets import size_name

FLAG = "†"
NAMES = {"ocr": "OCR", "reasoning": "Reasoning"}  # as headings write families


class Heading(NamedTuple):
    level: int
    text: str


class Paragraph(NamedTuple):
    text: str


class Items(NamedTuple):
    lines: Sequence[str]


class Command(NamedTuple):
    text: str


class Table(NamedTuple):
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    file: str
    caption: str


Block = Heading | Paragraph | Items | Command | Table | Picture


def write_report(
    folder: Path,
    rows: Sequence[Row],
    fits: Mapping[str, Fit],
    *,
    title: str,
    made_by: str,
    text_tokens: int,
    budget_gflops: float,
    caveats: Sequence[str] = (),
    seconds: Mapping[str, float] | None = None,
) -> Path:
    """Draws the figures and writes report.md and report.html into `folder`; returns the path of the latter.

    Args:
      rows: of errors.csv, flagged ones and other compressors' included. fits: by family.
      made_by: the command that made all this. text_tokens: Q of the figures and the plan. budget_gflops: the plan's.
      seconds: wall seconds by part of the run.
    """
    blocks: list[Block] = [Heading(1, title), Command(made_by)]
    for family, fit in fits.items():
        blocks += _family_blocks(folder, rows, family, fit, text_tokens)
    blocks += _plan_blocks(folder, fits, text_tokens, budget_gflops)
    blocks += _other_compressors(rows, fits)
    if caveats:
        blocks += [Heading(2, "What this does not show"), Items(caveats)]
    if seconds:
        parts = [[name, f"{value:.0f}"] for name, value in seconds.items()]
        parts.append(["all", f"{sum(seconds.values()):.0f}"])
        blocks += [Heading(2, "Wall time"), Table(["part", "seconds"], parts)]
    files.write_whole(folder / "report.md", "\n\n".join(map(_markdown, blocks)) + "\n")
    page = PAGE.format(title=html.escape(title), body="\n".join(map(_html, blocks)))
    files.write_whole(folder / "report.html", page)
    return folder / "report.html"


def _family_blocks(
    folder: Path, rows: Sequence[Row], family: str, fit: Fit, text_tokens: int
) -> list[Block]:
    name = f"errors_{family}"
    drawing.save_both(figures.errors_figure(rows, fit, text_tokens), folder, name)
    seeds = (
        "one seed" if fit.num_seeds == 1 else f"mean of {fit.num_seeds} seeds, lowest to highest"
    )
    counts = sorted({row.n for row in rows if row.family == family and row.n})
    asked = f"; {' or '.join(map(str, counts))} questions per cell and seed" if counts else ""
    return [
        Heading(2, f"{NAMES.get(family, family)}: error by LM size and visual tokens"),
        error_table(rows, fit),
        Paragraph(f"Compressor {fit.compressor}; {seeds}{asked}. {FLAG}: a run that stayed at chance in every rerun is left out."),
        Picture(f"{name}.png", f"{family} error against FLOPs, with the fitted law and its Pareto frontier"),
        constants_table(fit),
        Items(fit.statements),
    ]  # fmt: skip


def error_table(rows: Sequence[Row], fit: Fit) -> Table:
    """Sizes down, token counts across; each cell the mean over seeds, and its range when there are several."""
    own = family_mean(rows_of(rows, fit), fit.family)
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
    errors = [row.error for row in runs if not row.flag] or [row.error for row in runs]
    text = f"{sum(errors) / len(errors):.3f}"
    if len(runs) > 1:
        text += f" ({min(errors):.3f}–{max(errors):.3f})"
    return text + (FLAG if any(row.flag for row in runs) else "")


def constants_table(fit: Fit) -> Table:
    """A, alpha, beta, D and alpha/beta, with intervals, and what they are when D = 0."""
    modes = (f"{fit.level:.0%} over {mode}" for mode in fit.intervals)
    header = ["constant", "fit", f"{fit.level:.0%} profile", *modes]
    body = [[name, *cells] for name, cells in constant_rows(fit).items()]
    return Table([*header, "fit at D = 0"], body)


def _plan_blocks(
    folder: Path, fits: Mapping[str, Fit], text_tokens: int, budget_gflops: float
) -> list[Block]:
    blocks: list[Block] = [
        Heading(2, f"A plan: {budget_gflops:g} GFLOPs per question, {text_tokens} text tokens")
    ]
    for family, fit in fits.items():
        try:
            plan = planning.choose(fit, budget_gflops * 1e9, text_tokens)
        except ConfigError as error:
            blocks.append(Paragraph(str(error)))
            continue
        drawing.save_both(figures.plan_figure(plan, fit), folder, f"plan_{family}")
        blocks += [
            Items(plan.statements),
            Picture(f"plan_{family}.png", f"{family}: candidates, frontier, budget and choice"),
        ]
    return blocks


def _other_compressors(rows: Sequence[Row], fits: Mapping[str, Fit]) -> list[Block]:
    """Cells of compressors that the law was not fitted on, beside the same cells of the one it was."""
    body = []
    for family, fit in fits.items():
        own = family_mean(
            [r for r in rows if r.family == family and r.compressor == fit.compressor], family
        )
        others = [r for r in rows if r.family == family and r.compressor != fit.compressor]
        for compressor, lm, count in sorted(
            {(r.compressor, r.lm, r.visual_tokens) for r in others}
        ):
            runs = family_mean([r for r in others if r.compressor == compressor], family)
            body.append([
                family, f"{lm}, V = {count}", f"{fit.compressor} {_cell([r for r in own if r.cell == (lm, count)])}",
                f"{compressor} {_cell([r for r in runs if r.cell == (lm, count)])}",
            ])  # fmt: skip
    if not body:
        return []
    note = "Same LM, same number of visual tokens; these cells are beside the law, not in it."
    return [
        Heading(2, "What looking at the question buys"),
        Table(["family", "cell", "blind to the question", "sees the question"], body),
        Paragraph(note),
    ]


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Items(lines):
            return "\n".join(f"- {line}" for line in lines)
        case Command(text):
            return f"    {text}"
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Picture(file, caption):
            return f"![{caption}]({file})"


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Items(lines):
            return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
        case Command(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
            body = "".join(f"<tr>{line}</tr>" for line in lines)
            return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"
        case Picture(file, caption):
            return f'<img src="{html.escape(file)}" alt="{html.escape(caption)}">'


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
pre {{ background: #f4f4f4; padding: .6rem; white-space: pre-wrap; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: left; white-space: nowrap; }}
img {{ max-width: 100%; margin: 1rem 0; }}
</style></head><body>
{body}
</body></html>
"""
