"""What follows the cells of a sweep: the laws, pictures of where compressors look, and the report."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vlm_jax import benchmarks, files
from vlm_jax.laws import fitting, law, report, table
from vlm_jax.laws.budget import spell_pair
from vlm_jax.laws.page import Picture
from vlm_jax.parts import Clock
from vlm_jax.settings.checks import ConfigError
from vlm_jax.show import show
from vlm_jax.sweeps import plan
from vlm_jax.sweeps.plan import Training


def conclude(cfg: ConfigDict, root: Path, made_by: str, notes: Sequence[str], clock: Clock) -> Path:
    """Fits one law per family and writes law.json, reruns.json, the figures and the report. notes: of the reruns."""
    rows = table.read(root / "errors.csv")
    options = {"fixed_d": cfg.sweep.fixed_d}
    fits = fitting.fit_table(rows, **options)
    law.save(root / "law.json", fits, law.provenance("errors.csv", made_by, options))
    files.write_whole(root / "reruns.json", json.dumps(notes, indent=1))
    return report.write_report(
        root, rows, fits, title=cfg.sweep.title, made_by=made_by,
        text_tokens=cfg.sweep.plan_text_tokens, budget_gflops=cfg.sweep.plan_budget_gflops, notes=notes,
        pictures=looks(cfg, root), caveats=cfg.sweep.caveats, seconds=clock.seconds,
    )  # fmt: skip


def looks(cfg: ConfigDict, root: Path) -> list[Picture]:
    """Where the first query-aware cell beside the law looks in one image, asked two questions; drawn into `root`.

    The image and the questions are those of sweep.looks: of that benchmark the image with the most different answers to
    questions that begin so.
    """
    if not cfg.sweep.looks:
        return []
    name, beginning = cfg.sweep.looks
    training = next((t for t in plan.trainings(cfg) if _is_looked_at(cfg, t)), None)
    if training is None:
        return []
    where = plan.folders(cfg, root, training.seed)
    one = next((a for a in plan.asked(cfg) if a.name == name), None)
    if one is None:
        raise ConfigError(f"sweep: looks names {name!r}, which is none of the benchmarks.")
    images: dict[str, dict[str, str]] = {}
    for row in benchmarks.get(name).rows(where.path(one.annotations)):
        question = row["conversations"][-1]["value"].removeprefix("<image>").strip()
        if question.startswith(beginning):
            images.setdefault(row["image"], {})[row["answer"]] = question
    image, answers = max(images.items(), key=lambda shown: len(shown[1]))
    c = copy.deepcopy(cfg)
    last = plan.cell_stages(cfg, training)[-1]
    c.eval.checkpoint = str(where.stage(last, training))
    found = []
    for number, question in enumerate(list(answers.values())[:2], 1):
        file = f"looks_{training.compressor}_{number}.png"
        show(c, str(Path(where.path(one.annotations)) / image), question, str(root / file))
        pair = spell_pair(plan.label(training.lm), training.visual_tokens[0])
        found.append(Picture(file, f"{training.compressor}, {pair}, asked to {question!r}"))
    return found


def _is_looked_at(cfg: ConfigDict, training: Training) -> bool:
    return any(
        (training.compressor, training.lm) == (compressor, lm)
        for compressor, lm, _ in plan.beside(cfg)
    )
