"""What the report of a sweep adds to its law: every benchmark in the layout of the paper's Table 1, figures, published constants."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from vlm_jax.benchmarks import tables
from vlm_jax.files import Path
from vlm_jax.laws import drawing, figures, report, words
from vlm_jax.laws.law import Fit
from vlm_jax.laws.report import Block, Picture
from vlm_jax.laws.table import Row
from vlm_jax.laws.words import Table
from vlm_jax.settings.checks import ConfigError
from vlm_jax.sweeps import plan


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
    notes = [*missing(cfg, rows), *why]
    if notes:
        found.append(report.items(notes))
    pictures, left_out = _figures(root, rows, of_all)
    if pictures:
        found += [report.heading(2, "Beyond the cells"), report.side_by_side(pictures)]
    if left_out:
        found.append(report.items(left_out))
    if published := _published_law(cfg, fits):
        found += [report.heading(2, "Beside the published law"), report.scrolling(published)]
    return found


def benchmark_table(cfg: ConfigDict, root: Path) -> Table:
    """A line per cell in Table 1's columns and units, under it the published one where there is one. Seeds one after the other."""
    published = {(compressor, v): numbers for compressor, v, numbers in cfg.sweep.published}
    runs, told = [], []
    for training in plan.trainings(cfg):
        where = plan.folders(cfg, root, training.seed)
        for v in training.visual_tokens:
            folder = where.newest_answers(training, v)
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
    cells = [(c.seed, c.compressor, plan.label(c.lm), c.visual_tokens) for c in plan.cells(cfg)]
    gaps = [cell for cell in cells if cell not in measured]
    flagged = {(r.seed, r.compressor, r.lm, r.visual_tokens) for r in rows if r.flag}
    found = []
    if len(cfg.sweep.seeds) == 1:
        found.append("One seed: how much trainings differ by luck is not known.")
    if gaps:
        found.append(f"{len(gaps)} of {len(cells)} cells are not measured yet.")
    if flagged:
        found.append(f"{len(flagged)} of {len(cells)} cells are flagged and not fitted.")
    return found


def _figures(
    root: Path, rows: Sequence[Row], fits: Mapping[str, Fit]
) -> tuple[list[Picture], list[str]]:
    """The paper's Figures 2, 3a and 4 of these cells, and a line for each that they do not support."""
    wanted: list[tuple[str, str, Callable[[], Figure]]] = []
    for family, fit in fits.items():
        name = re.sub(r"[^\w.-]+", "_", family)
        own = [row for row in rows if row.lm in fit.lms]
        wanted += [
            (f"extrapolation_{name}", f"{family}: the largest LM, predicted by the law of the others",
             lambda own=own, fit=fit: figures.extrapolation_figure(own, fit)),
            (f"text_tokens_{name}", f"{family}: the best number of visual tokens as the prompt grows",
             lambda fit=fit: figures.text_tokens_figure(fit)),
        ]  # fmt: skip
    if fits:
        wanted.append(("equal_compute", "Every benchmark at about equal compute", lambda: figures.equal_compute_figure(rows, fits)))  # fmt: skip
    found, left_out = [], []
    for name, caption, draw in wanted:
        try:
            drawing.save_both(draw(), root, name)
        except ConfigError as error:
            left_out.append(f"No figure {name}: {error}")
            continue
        found.append(Picture(f"{name}.png", caption))
    return found, left_out


def _published_law(cfg: ConfigDict, fits: Mapping[str, Fit]) -> Table | None:
    known = cfg.sweep.published_law
    body = []
    for family, fit in fits.items():
        if family not in known:
            continue
        alpha, beta = known[family]
        ratio = "-" if fit.law.ratio is None else f"{fit.law.ratio:.3g}"
        body += [
            [f"{family} alpha", words.value(fit, "alpha"), f"{alpha:.3g}"],
            [f"{family} beta", words.value(fit, "beta"), f"{beta:.3g}"],
            [f"{family} alpha / beta", ratio, f"{alpha / beta:.3g}"],
        ]
    return Table(["constant", "these cells", "published"], body) if body else None
