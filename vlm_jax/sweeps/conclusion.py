"""What follows the cells of a sweep: the laws, pictures of where compressors look, and the report."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import benchmarks, files
from vlm_jax.files import Path, to_path
from vlm_jax.laws import fitting, law, report, table
from vlm_jax.laws.questions import Without
from vlm_jax.laws.report import Picture
from vlm_jax.laws.table import Row, spell_pair
from vlm_jax.settings.checks import ConfigError
from vlm_jax.show import show
from vlm_jax.sweeps import answers, appendix, plan
from vlm_jax.sweeps.parts import Clock
from vlm_jax.sweeps.plan import Training

Kind = tuple[str, bool]  # a compressor, and whether its trainings are elastic


def conclude(cfg: ConfigDict, root: Path, made_by: str, notes: Sequence[str], clock: Clock) -> Path:
    """Fits one law per family and writes law.json, reruns.json, the figures and the report. notes: of the reruns.

    The law is that of the first compressor whose cells determine one, trained per cell if there is one; beside it stand those
    of the other compressors and of elastic trainings. Where no cells determine one, the report holds the benchmarks alone.
    """
    rows = table.read(root / "errors.csv")
    without = answers.gather(cfg, root)
    held_out = {plan.label(lm) for lm in cfg.sweep.held_out}
    options = {"fixed_d": cfg.sweep.fixed_d}
    fitted = [row for row in rows if row.lm not in held_out]
    laws, why = _laws(cfg, fitted, without, options)
    files.write_whole(root / "reruns.json", json.dumps(notes, indent=1))
    ordered = sorted(laws, key=lambda kind: kind[1])  # stable: trained per cell first
    for kind, file in zip(ordered, _files(ordered), strict=True):
        law.save(root / file, laws[kind], law.provenance("errors.csv", made_by, options))
    fits = laws[ordered[0]] if ordered else {}
    of_all = _with_held_out(rows, fits, held_out, options)
    more = appendix.blocks(cfg, root, rows, fits, of_all, why)
    caveats = [*appendix.missing(cfg, rows), *cfg.sweep.caveats]
    if not fits:
        made = [report.heading(2, "How it was made"), report.command(made_by)]
        own = [report.heading(1, cfg.sweep.title), *more]
        own += (
            [report.heading(2, "What this does not show"), report.items(caveats)] if caveats else []
        )
        return report.write(root, cfg.sweep.title, [*own, *made])
    return report.write_report(
        root, rows, fits, title=cfg.sweep.title, made_by=made_by,
        text_tokens=cfg.sweep.plan_text_tokens, budget_gflops=cfg.sweep.plan_budget_gflops, notes=notes,
        others=[laws[kind] for kind in ordered[1:]], query_aware=plan.query_aware(cfg),
        pictures=looks(cfg, root), caveats=caveats, seconds=clock.seconds, appendix=more,
    )  # fmt: skip


def _files(kinds: Sequence[Kind]) -> list[str]:
    """law.json, law_elastic.json for the first elastic one beside it, then law_<compressor>.json."""
    found: list[str] = []
    for name, elastic in kinds:
        ending = "_elastic" * elastic
        wanted = ("law.json" if not found else f"law{ending}.json", f"law_{name}{ending}.json")
        found.append(next(file for file in wanted if file not in found))
    return found


def _laws(
    cfg: ConfigDict, rows: Sequence[Row], without: Without, options: Mapping[str, Any]
) -> tuple[dict[Kind, dict[str, law.Fit]], list[str]]:
    """Compressor and kind of training -> family -> its law, for those whose cells determine one, and why others have none."""
    beside = {(compressor, plan.label(lm), v) for compressor, lm, v in plan.beside(cfg)}
    kinds = dict.fromkeys((r.compressor, r.elastic) for r in rows)
    found: dict[Kind, dict[str, law.Fit]] = {}
    why = []
    for name, elastic in sorted(
        (kind for kind in kinds if kind[0] in cfg.sweep.compressors),
        key=lambda kind: cfg.sweep.compressors.index(kind[0]),
    ):
        # Cells beside the law are left out; those of other compressors are named by the fit.
        own = [
            r for r in rows if r.compressor != name or (name, r.lm, r.visual_tokens) not in beside
        ]
        fitted = [r for r in own if (r.compressor, r.elastic) == (name, elastic)]
        for family in dict.fromkeys(row.family for row in fitted):
            counted = [r for r in fitted if r.family == family and not r.flag]
            asked = all(_has_groups(without.get(r.key, ())) for r in counted)
            try:
                fit = fitting.fit_family(
                    own, family, compressor=name, elastic=elastic, without=without if asked else None, **options
                )  # fmt: skip
            except ConfigError as error:
                why.append(f"{name} has no law of family {family}: {error}")
                continue
            found.setdefault((name, elastic), {})[family] = fit
    return found, why


def _has_groups(errors: Sequence[float | None]) -> bool:
    """Whether there are groups of pictures to leave out, of which each time one is."""
    return sum(error is not None for error in errors) > 1


def _with_held_out(
    rows: Sequence[Row],
    fits: Mapping[str, law.Fit],
    held_out: Collection[str],
    options: Mapping[str, Any],
) -> Mapping[str, law.Fit]:
    """The laws of all LMs, held-out ones too, for the figure that predicts the largest one; `fits` where none is held out."""
    if not any(row.lm in held_out for row in rows):
        return fits
    return {
        family: fitting.fit_family(
            rows, family, compressor=fit.compressor, elastic=fit.elastic, draws=100, **options
        )
        for family, fit in fits.items()
    }


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
    c.eval.checkpoint = str(where.stage(last, training, where.last_rerun(training)))
    found = []
    for number, question in enumerate(list(answers.values())[:2], 1):
        file = f"looks_{training.compressor}_{number}.png"
        show(c, str(to_path(where.path(one.annotations)) / image), question, str(root / file))
        pair = spell_pair(plan.label(training.lm), training.visual_tokens[0])
        found.append(Picture(file, f"{training.compressor}, {pair}, asked to {question!r}"))
    return found


def _is_looked_at(cfg: ConfigDict, training: Training) -> bool:
    return any(
        (training.compressor, training.lm) == (compressor, lm)
        for compressor, lm, _ in plan.beside(cfg)
    )
