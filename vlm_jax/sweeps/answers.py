"""What the evaluations of a sweep gave: the rows of its table, and how they move with the questions that were asked."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from vlm_jax.files import Path
from vlm_jax.laws import questions, table
from vlm_jax.storage import run as experiment
from vlm_jax.sweeps import plan
from vlm_jax.sweeps.plan import Training

QUESTIONS = "questions.jsonl"  # of an evaluation, and of the whole sweep beside errors.csv


def rows(cfg: ConfigDict, training: Training, run: Path, out: Path) -> list[table.Row]:
    """The rows of a cell. run: the workdir of the training's last stage; out: of the cell's evaluation."""
    return [row for _, row in _named(cfg, training, run, out)]


def _named(
    cfg: ConfigDict, training: Training, run: Path, out: Path
) -> list[tuple[table.Row, table.Row]]:
    """Each row as its evaluation wrote it, and as the sweep names it."""
    if training.compressor == plan.TEXT_ONLY:
        return []  # a table's rows have visual tokens; the report has its scores
    families = {one.name: one.family for one in plan.asked(cfg)}
    several = len(training.visual_tokens) > 1
    final = experiment.finished(run) or {}
    samples = _train_samples(cfg, training, run)
    return [
        (row, dataclasses.replace(
            row, seed=training.seed, lm=plan.label(training.lm), compressor=training.compressor,
            family=families.get(row.benchmark, row.family), elastic=several, train_samples=samples,
            # Of an elastic training it is a mean over its numbers of visual tokens.
            validation_loss=None if several else final.get("validation_loss"),
        ))
        for row in table.read(out / "errors.csv")
    ]  # fmt: skip


def _train_samples(cfg: ConfigDict, training: Training, run: Path) -> int | None:
    """Of the stages that the training has to itself. None where a row of a batch holds several, or a stage is not finished."""
    found = 0
    for stage in plan.cell_stages(cfg, training):
        folder = run if stage.is_last else run / stage.name
        final = experiment.finished(folder)
        data = experiment.read(folder).data if final else None
        if final is None or data is None or data.packing:
            return None
        found += int(final["step"]) * data.batch_size
    return found


def gather(cfg: ConfigDict, root: Path) -> questions.Without:
    """Puts the questions of all evaluations into one file beside errors.csv, under the names of its rows; returns its content."""
    found = {}
    for training in plan.trainings(cfg):
        where = plan.folders(cfg, root, training.seed)
        rerun = where.last_rerun(training)
        for v in training.visual_tokens:
            out = where.answers(training, v, rerun)
            if (out / QUESTIONS).is_file():
                without = questions.read([out / QUESTIONS])
                pairs = _named(cfg, training, where.cell(training, rerun), out)
                found |= {row.key: without[own.key] for own, row in pairs if own.key in without}
    if found:
        questions.append(root / QUESTIONS, found)
    return questions.read([root / QUESTIONS]) if (root / QUESTIONS).is_file() else {}
