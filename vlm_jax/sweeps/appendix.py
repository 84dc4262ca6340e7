"""What the report of a sweep adds to its law: every benchmark in the layout of the paper's Table 1, figures, published constants."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from vlm_jax.benchmarks import tables
from vlm_jax.files import Path
from vlm_jax.laws import comparison, drawing, figures, fitting, report, table, words
from vlm_jax.laws.law import Fit
from vlm_jax.laws.report import Block, Picture
from vlm_jax.laws.table import Row, spell_pair
from vlm_jax.laws.words import Table
from vlm_jax.settings.checks import ConfigError
from vlm_jax.sweeps import plan

MOST = 5  # cells that a caveat names
PLAIN = r"[^\w.-]+"  # what a file's name does not have


def blocks(
    cfg: ConfigDict,
    root: Path,
    rows: Sequence[Row],
    fits: Mapping[str, Fit],
    of_all: Mapping[str, Fit],
    why: Sequence[str],
) -> list[Block]:
    """Draws into `root`. fits: by family; of_all: those of the held-out LMs' cells as well. why: families that have no law."""
    found: list[Block] = []
    several = len(cfg.sweep.benchmarks) > len({row.family for row in rows})
    if several or cfg.sweep.published:  # else the errors say it already
        found += [
            report.heading(2, "Every benchmark"),
            report.scrolling(benchmark_table(cfg, root)),
        ]
    if why:
        found.append(report.items(why))
    pictures, left_out = _figures(cfg, root, rows, fits, of_all)
    if pictures:
        found += [report.heading(2, "Beyond the cells"), report.side_by_side(pictures)]
    if left_out:
        found.append(report.items(left_out))
    return [*found, *_loss_blocks(rows, fits), *_published_blocks(cfg, root, rows, fits)]


def benchmark_table(cfg: ConfigDict, root: Path) -> Table:
    """A line per cell in Table 1's columns and units, under it the published one where there is one. Seeds one after the other."""
    published = {(compressor, v): numbers for compressor, v, numbers in cfg.sweep.published}
    runs, told = [], []
    for training in plan.trainings(cfg):
        where = plan.folders(cfg, root, training.seed)
        for v in training.visual_tokens:
            folder = where.answers(training, v, where.last_rerun(training))
            if not (folder / "scores.json").is_file():
                continue
            several = f", seed {training.seed}" if len(cfg.sweep.seeds) > 1 else ""
            name = f"{plan.label(training.lm)}{several}"
            read = tables.read(str(folder))
            runs.append(tables.Run(name, read.scores, training.compressor, str(v)))
            told.append(published.get((training.compressor, v), {}))
    if not runs:
        return Table(["Method"], [])
    heads, lines = tables.table(runs)
    keys = {text: name for name, text in {**tables.TABLE_1, **tables.OTHERS}.items()}
    body = []
    for line, numbers in zip(lines, told, strict=True):
        body.append(line)
        if numbers:
            cells = [str(numbers.get(keys.get(head, head), "")) for head in heads[3:]]
            body.append(["  published", *line[1:3], *cells])
    return Table(heads, body)


def missing(cfg: ConfigDict, rows: Sequence[Row]) -> list[str]:
    """Caveats that follow from the run: seeds, cells that were not measured, cells that are flagged."""
    measured = {(r.seed, r.compressor, r.lm, r.visual_tokens) for r in rows}
    flagged = {(r.seed, r.compressor, r.lm, r.visual_tokens) for r in rows if r.flag}
    cells = [
        (c.seed, c.compressor, plan.label(c.lm), c.visual_tokens)
        for c in plan.cells(cfg)
        if c.compressor != plan.TEXT_ONLY
    ]
    found = []
    if len(cfg.sweep.seeds) == 1:
        found.append("One seed: how much trainings differ by luck is not known.")
    if gaps := [cell for cell in cells if cell not in measured]:
        found.append(f"Not measured yet: {len(gaps)} of {len(cells)} cells: {_named(gaps)}.")
    if odd := [cell for cell in cells if cell in flagged]:
        found.append(f"Flagged and not fitted: {len(odd)} of {len(cells)} cells: {_named(odd)}.")
    return found


def _named(cells: Sequence[tuple[int, str, str, int]]) -> str:
    """The first few of the cells."""
    names = [f"{compressor}, {spell_pair(lm, v)}, seed {seed}" for seed, compressor, lm, v in cells]
    more = f"; and {len(names) - MOST} more" if len(names) > MOST else ""
    return "; ".join(names[:MOST]) + more


def _figures(
    cfg: ConfigDict,
    root: Path,
    rows: Sequence[Row],
    fits: Mapping[str, Fit],
    of_all: Mapping[str, Fit],
) -> tuple[list[Picture], list[str]]:
    """The paper's Figures 1a, 2, 3a, 3b and 4 of these cells, and a line for each that they do not support.

    Its Figure 1b, with the text tokens of the plan, opens the report.
    """
    wanted: list[tuple[str, str, Callable[[], Figure]]] = []
    for family, fit in fits.items():
        name = re.sub(PLAIN, "_", family)
        fitted, every = (
            [row for row in rows if row.lm in law.lms] for law in (fit, of_all[family])
        )
        if cfg.sweep.plan_text_tokens:
            wanted.append((
                f"errors_{name}_no_text", f"{family}: error against FLOPs without any text, Q = 0",
                lambda own=fitted, fit=fit: figures.errors_figure(own, fit, 0),
            ))  # fmt: skip
        wanted += [
            (f"extrapolation_{name}", f"{family}: the largest LM, predicted by the law of the others",
             lambda own=every, fit=of_all[family]: figures.extrapolation_figure(own, fit)),
            (f"text_tokens_{name}", f"{family}: the best number of visual tokens as the prompt grows",
             lambda fit=fit: figures.text_tokens_figure(fit)),
        ]  # fmt: skip
    if fits:
        fitted = [row for row in rows if all(row.lm in fit.lms for fit in fits.values())]
        caption = "Every benchmark at about equal compute"
        wanted.append(
            ("equal_compute", caption, lambda: figures.equal_compute_figure(fitted, fits))
        )
    found, left_out = [], []
    for name, caption, draw in wanted:
        try:
            drawing.save_both(draw(), root, name)
        except ConfigError as error:
            left_out.append(f"No figure {name}: {error}")
            continue
        found.append(Picture(f"{name}.png", caption))
    return found, left_out


def _loss_blocks(rows: Sequence[Row], fits: Mapping[str, Fit]) -> list[Block]:
    """The law of the held-out loss, where trainings measured one."""
    fit = next(iter(fits.values()), None)
    if fit is None or all(row.validation_loss is None for row in words.runs_of(rows, fit)):
        return []
    losses = table.held_out([row for row in rows if row.lm in fit.lms])
    found: list[Block] = [report.heading(2, "Held-out loss")]
    try:
        own = fitting.fit_family(
            losses, table.VALIDATION_LOSS, compressor=fit.compressor, elastic=fit.elastic
        )
    except ConfigError as error:
        return [*found, report.items([f"It has no law: {error}"])]
    about = "Nats per token of the records of train.validation, in place of the error, with a law of the same form."
    constants = report.constants_table({"loss": own})
    return [*found, report.paragraph(about), report.scrolling(report.error_table(losses, own)), report.scrolling(constants)]  # fmt: skip


def _published_blocks(
    cfg: ConfigDict, root: Path, rows: Sequence[Row], fits: Mapping[str, Fit]
) -> list[Block]:
    """These cells beside those of sweep.published_cells: what differs, a figure per family, constants side by side."""
    s, found, said = cfg.sweep, [], []
    for family, fit in fits.items():
        if family not in s.published_cells:
            continue
        theirs = comparison.published(s.published_cells[family])
        printed = tuple(s.published_law[family]) if family in s.published_law else None
        try:
            found.append(comparison.compare(rows, fit, theirs, printed))
        except ConfigError as error:
            said.append(str(error))
            continue
        said.append(comparison.sentence(found[-1]))
    pictures = []
    for one in found:
        name = f"published_{re.sub(PLAIN, '_', one.family)}"
        drawing.save_both(comparison.figure(one), root, name)
        pictures.append(Picture(f"{name}.png", f"{one.family}: these cells and the published ones"))
    if not said:
        return []
    blocks = [report.heading(2, "Beside the published experiment"), report.items(said)]
    if found:
        blocks += [report.side_by_side(pictures), report.scrolling(comparison.constants(found))]
    return blocks
