"""report.md and report.html of a sweep: the answer and its two figures first, then what it rests on.

Both are written from one list of blocks, beside their pictures; nothing is fetched from anywhere. The page is one file. It
fits a phone (a wide table scrolls inside its own box) and follows the dark mode.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from vlm_jax import files
from vlm_jax.files import Path
from vlm_jax.laws import choice, drawing, figures, planning, words
from vlm_jax.laws.choice import Plan
from vlm_jax.laws.law import CONSTANTS, QUESTIONS, Fit
from vlm_jax.laws.table import Row
from vlm_jax.laws.words import Change, Table, estimate, headline, runs_of, spoken
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.presets import size_name

# A range or an interval, which a table prints small.
SMALL = re.compile(r"[(\[][^)\]]*[)\]]|\S+\.\.\S+")
PARENTHESES = re.compile(r"\([^)]*\)")
FLAG = "†"
LAW = "The law is error = A / (N^alpha V^beta) + D, with N the LM's parameters in billions and V the number of visual tokens."


class Block(NamedTuple):
    markdown: str
    html: str


class Picture(NamedTuple):
    file: str  # in the report's folder
    caption: str


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
    others: Sequence[Mapping[str, Fit]] = (),
    query_aware: Collection[str] = (),
    pictures: Sequence[Picture] = (),
    caveats: Sequence[str] = (),
    seconds: Mapping[str, float] | None = None,
    appendix: Sequence[Block] = (),
) -> Path:
    """Draws the figures and writes report.md and report.html into `folder`; returns the path of the latter.

    Args:
      rows: of errors.csv, flagged ones and other compressors' included. fits: by family.
      made_by: the command that made all this. text_tokens: Q of the figures and the plan. budget_gflops: the plan's.
      notes: sentences below the tables of errors, such as which cells were run again and why.
      others: laws of other compressors, or of other trainings, of these rows. query_aware: compressors that look at the question.
      pictures: of where such a compressor looks. seconds: by part of the run. appendix: blocks before the caveats.
    """
    plans = _plans(fits, budget_gflops, text_tokens)
    made = {family: plan for family, plan in plans.items() if isinstance(plan, Plan)}
    looking = {family: words.beside(rows, fit, query_aware) for family, fit in fits.items()}
    said = [words.of_exponents(fits), choice.of_plans(made, text_tokens), words.of_looking(looking)]
    blocks = [heading(1, title), box([line for line in said if line])]
    blocks.append(_law_figures(folder, rows, fits, text_tokens))
    blocks += _tables(rows, fits, notes)
    blocks += _plan_blocks(folder, fits, plans)
    blocks += _looking_blocks(folder, looking, pictures)
    if others:
        blocks += _other_laws(rows, fits, others)
    blocks += appendix
    if caveats:
        blocks += [heading(2, "What this does not show"), items(caveats)]
    blocks += [heading(2, "How it was made"), command(made_by)]
    if seconds:
        parts = [[name, f"{value:.0f}"] for name, value in seconds.items()]
        total = f"Time of the parts, some of which ran side by side: {sum(seconds.values()):.0f} seconds together."
        blocks.append(folded(total, scrolling(Table(["part", "seconds"], parts))))
    return write(folder, title, blocks)


def _law_figures(
    folder: Path, rows: Sequence[Row], fits: Mapping[str, Fit], text_tokens: int
) -> Block:
    shown = []
    for family, fit in fits.items():
        drawing.save_both(figures.errors_figure(rows, fit, text_tokens), folder, f"errors_{family}")
        caption = f"{headline(spoken(family))} error against FLOPs, with the fitted law"
        shown.append(Picture(f"errors_{family}.png", caption))
    return side_by_side(shown)


def _tables(rows: Sequence[Row], fits: Mapping[str, Fit], notes: Sequence[str]) -> list[Block]:
    blocks, remarks = [heading(2, "Errors")], []
    for family, fit in fits.items():
        table = error_table(rows, fit)
        blocks += [heading(3, headline(spoken(family))), scrolling(table)]
        remarks.append(_about_cells(rows, fit))
        if any(FLAG in cell for line in table.rows for cell in line):
            remarks.append(
                f"{FLAG}: a run that stayed at chance or out of line in every rerun is left out."
            )
    blocks.append(items([*dict.fromkeys(remarks), *notes]))
    level = next(iter(fits.values())).level
    about = f"{LAW} Brackets after a constant hold its {level:.0%} profile-likelihood interval; law.json has other kinds."
    blocks += [heading(2, "Constants of the law"), paragraph(about)]
    blocks.append(scrolling(constants_table(fits)))
    return [*blocks, items([line for fit in fits.values() for line in words.doubts(fit)])]


def _about_cells(rows: Sequence[Row], fit: Fit) -> str:
    """What a table's numbers are, in a sentence."""
    counts = sorted({row.n for row in rows if row.family == fit.family and row.n})
    asked = f", {' or '.join(map(str, counts))} questions per cell and seed" if counts else ""
    if fit.num_seeds > 1:
        return f"Mean of {fit.num_seeds} seeds (lowest to highest){asked}; compressor {fit.compressor}."
    by = f" ({words.LEVEL:.0%} binomial interval)" if counts else ""
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
    good = words.good(runs)
    errors = [float(row.error) for row in good]
    text, n = f"{words.mean_error(runs):.3f}", good[0].n
    if len(good) > 1:
        text += f" ({min(errors):.3f}–{max(errors):.3f})"
    elif n:
        text += " ({:.3f}–{:.3f})".format(*words.binomial_interval(errors[0], n))
    return text + (FLAG if any(row.flag for row in runs) else "")


def constants_table(fits: Mapping[str, Fit]) -> Table:
    """The constants of every family with the headline intervals, R2; what they are at D = 0 where D was fitted, and over questions."""
    first = next(iter(fits.values()))
    header = ["constant", "fit", f"{first.level:.0%} profile", f"{first.level:.0%} over {first.mode}", "fit at D = 0", f"{first.level:.0%} over questions"]  # fmt: skip
    shown = [True] * 4 + [
        not all(fit.d_fixed for fit in fits.values()),
        any(QUESTIONS in fit.intervals for fit in fits.values()),
    ]
    body = []
    for family, fit in fits.items():
        for name, *texts in words.constants_table(fit).rows:
            if texts[0] != "-" and not (name == "D" and fit.d_fixed):
                line = [f"{spoken(family)} {name}", *texts, *[""] * (5 - len(texts))]
                body.append(list(itertools.compress(line, shown)))
        line = [f"{spoken(family)} R2", f"{fit.r2:.3f}", "", "", "", ""]
        body.append(list(itertools.compress(line, shown)))
    return Table(list(itertools.compress(header, shown)), body)


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
        lines += choice.around(plan)
        body += [
            [name, f"{c.lm}, V = {c.visual_tokens}", f"{c.cost:.3g}", estimate(c.error, c.interval, ".3f"), f"{c.share:.0%}"]
            for c in (plan.best, *plan.runners_up[:2])
        ]  # fmt: skip
        drawing.save_both(figures.plan_figure(plan, fits[family]), folder, f"plan_{family}")
        shown.append(Picture(f"plan_{family}.png", f"{name}: candidates, frontier, budget and choice"))  # fmt: skip
    blocks = [heading(2, "The plan")]
    if body:
        header = ["family", "choice and runners-up", "GFLOPs", "predicted error", "best in"]
        blocks.append(scrolling(Table(header, body)))
    blocks.append(items(lines))
    return [*blocks, side_by_side(shown)] if shown else blocks


def _looking_blocks(
    folder: Path, looking: Mapping[str, Sequence[Change]], pictures: Sequence[Picture]
) -> list[Block]:
    """Cells of compressors that look at the question, beside the same cells of the one the law was fitted on."""
    body = []
    for family, changes in looking.items():
        for change in changes:
            own, other = change.own[0], change.other[0]
            body.append([
                headline(spoken(family)), f"{other.lm}, V = {other.visual_tokens}", f"{own.compressor} {_cell(change.own)}",
                f"{other.compressor} {_cell(change.other)}", estimate(change.mean, change.interval, "+.3f"),
            ])  # fmt: skip
    if not (body or pictures):
        return []
    blocks = [heading(2, "What looking at the question buys")]
    if body:
        header = ["family", "cell", "blind to the question", "sees the question", "change"]
        note = "These cells stand beside the law, not in it; the change has a 95% interval."
        blocks += [scrolling(Table(header, body)), paragraph(note)]
    for picture in pictures:
        if not (folder / picture.file).is_file():
            raise ConfigError(f"report: the picture {picture.file} is not in {folder}.")
    return [*blocks, side_by_side(pictures)] if pictures else blocks


def _other_laws(
    rows: Sequence[Row], fits: Mapping[str, Fit], others: Sequence[Mapping[str, Fit]]
) -> list[Block]:
    """The laws of several compressors or kinds of training, a column each, and the errors of the others."""
    laws = [fits, *others]
    names = [next(iter(each.values())).trained for each in laws]
    body = []
    for family, fit in fits.items():
        own, name = [each.get(family) for each in laws], spoken(family)
        for constant in CONSTANTS:
            if not (constant == "D" and fit.d_fixed):
                body.append([f"{name} {constant}", *(words.value(f, constant) if f else "-" for f in own)])  # fmt: skip
        body.append([f"{name} R2", *(f"{f.r2:.3f}" if f else "-" for f in own)])
        runs = [[row for row in runs_of(rows, f) if not row.flag] if f else [] for f in own]
        shared = set.intersection(*({row.cell for row in each} for each in runs if each))
        means = [words.mean_error([row for row in each if row.cell in shared]) if each and shared else None for each in runs]  # fmt: skip
        texts = ("-" if mean is None else f"{mean:.3f}" for mean in means)
        body.append([f"{name} error, mean of shared cells", *texts])
    said = [words.of_elastic(rows, fits, each) for each in others if next(iter(each.values())).elastic]  # fmt: skip
    blocks = [heading(2, "Laws side by side"), scrolling(Table(["constant", *names], body))]
    if said and not next(iter(fits.values())).elastic:
        blocks.append(items(said))
    for name, each in zip(names[1:], others, strict=True):
        shown = [(heading(3, headline(spoken(f.family))), scrolling(error_table(rows, f))) for f in each.values()]  # fmt: skip
        blocks.append(folded(f"The errors of {name}", *itertools.chain(*shown)))
    return blocks


def heading(level: int, text: str) -> Block:
    return Block(f"{'#' * level} {text}", f"<h{level}>{html.escape(text)}</h{level}>")


def paragraph(text: str) -> Block:
    return Block(text, f"<p>{html.escape(text)}</p>")


def box(lines: Sequence[str]) -> Block:
    """The sentences in a box, what stands in parentheses muted."""
    texts = (PARENTHESES.sub(r"<span>\g<0></span>", html.escape(line)) for line in lines)
    shown = "".join(f"<p>{text}</p>" for text in texts)
    return Block(items(lines).markdown, f"<section>{shown}</section>")


def items(lines: Sequence[str]) -> Block:
    shown = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return Block("\n".join(f"- {line}" for line in lines), f"<ul>{shown}</ul>")


def command(text: str) -> Block:
    return Block(f"    {text}", f"<pre>{html.escape(text)}</pre>")


def scrolling(table: Table) -> Block:
    """It scrolls inside its own box where the page is narrow."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    shown = _line("th", table.header) + "".join(_line("td", row) for row in table.rows)
    return Block(markdown, f"<div class=wide><table>{shown}</table></div>")


def _line(tag: str, cells: Sequence[str]) -> str:
    texts = [SMALL.sub(r"<small>\g<0></small>", html.escape(cell)) for cell in cells]
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"


def side_by_side(shown: Sequence[Picture]) -> Block:
    """Where the page is wide enough."""
    figures = (
        f'<figure><img src="{html.escape(file)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for file, caption in shown
    )
    markdown = "\n".join(f"![{caption}]({file})" for file, caption in shown)
    return Block(markdown, f"<div class=pictures>{''.join(figures)}</div>")


def folded(summary: str, *blocks: Block) -> Block:
    """Blocks that the page opens on a click."""
    inner = "".join(block.html for block in blocks)
    shown = f"<details><summary>{html.escape(summary)}</summary>{inner}</details>"
    return Block("\n\n".join([summary, *(block.markdown for block in blocks)]), shown)


def write(folder: Path, title: str, blocks: Sequence[Block]) -> Path:
    """report.md and report.html; returns the path of the latter."""
    markdown = "\n\n".join(block.markdown for block in blocks) + "\n"
    files.write_whole(folder / "report.md", markdown)
    body = "\n".join(block.html for block in blocks)
    files.write_whole(folder / "report.html", PAGE.format(title=html.escape(title), body=body))
    return folder / "report.html"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #222; --paper: #fff; --box: #f3f5f7; --line: #d8dce0; --muted: #5b636b; --mark: #d55e00; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e6e8; --paper: #16181a; --box: #22262a; --line: #3a4046; --muted: #a3abb3; --mark: #f08a3c; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem; color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }} h3 {{ font-size: 1rem; margin-bottom: 0; }}
section {{ margin: 1rem 0; padding: .2rem 1rem; background: var(--box); border-left: 4px solid var(--mark); }}
section p {{ margin: .7rem 0; font-weight: 600; }} section span {{ font-weight: 400; color: var(--muted); }}
ul {{ padding-left: 1.2rem; font-size: .9rem; color: var(--muted); }}
pre {{ background: var(--box); padding: .6rem; white-space: pre-wrap; font-size: .85rem; }}
.wide {{ width: fit-content; max-width: 100%; overflow-x: auto; margin: .6rem 0; background: linear-gradient(to left, var(--paper) 1.2rem, transparent 2.5rem) local, linear-gradient(to left, var(--line), transparent 1.2rem); }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }}
th {{ min-width: 3.2rem; }} td:first-child, td:not(:has(small)), small {{ white-space: nowrap; }} small {{ color: var(--muted); }}
@media (max-width: 40rem) {{ td:first-child small {{ display: block; }} }}
.pictures {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }}
figure {{ margin: 0; }} figcaption {{ font-size: .85rem; color: var(--muted); }}
img {{ width: 100%; height: auto; background: #fff; border-radius: 4px; }}
summary {{ cursor: pointer; margin: .6rem 0; }}
</style></head><body>
{body}
</body></html>
"""
