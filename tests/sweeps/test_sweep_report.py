"""The end of a sweep: which laws are fitted, what the report adds to them, and a sweep whose cells determine none."""

import json

import numpy as np
import pytest

from configs import mini, paper, table1
from vlm_jax.laws import law, questions, table
from vlm_jax.settings import presets
from vlm_jax.storage import run as experiment
from vlm_jax.sweeps import answers, conclusion, plan, stages
from vlm_jax.sweeps.parts import Clock


def rows(cfg, families, error):
    """A row per cell and family, as error(parameters, tokens, compressor) says."""
    drawn = np.random.default_rng(0)
    return [
        table.Row(
            lm_params=presets.lm(cell.lm).nominal_params, visual_tokens=cell.visual_tokens,
            error=float(error(presets.lm(cell.lm).nominal_params, cell.visual_tokens, cell.compressor) + drawn.normal(0, 2e-3)),
            benchmark=family, family=family, lm=cell.lm, compressor=cell.compressor, n=1000, seed=cell.seed, elastic=plan.is_elastic(cfg, cell.compressor),
        )
        for cell in plan.cells(cfg)
        for family in families
    ]  # fmt: skip


def scores(root, cfg, training, name, score):
    """The scores that an evaluation leaves."""
    where = plan.folders(cfg, root, training.seed)
    for v in training.visual_tokens:
        folder = where.answers(training, v)
        folder.mkdir(parents=True)
        line = {"benchmark": name, "score": score, "error": 1 - score, "n": 10, "details": {}}
        (folder / "scores.json").write_text(json.dumps([line]))


def published(params, tokens, compressor):
    offset = 0.02 if compressor == "m3" else 0.0
    return 0.59 * (params / 1e9) ** -0.077 * tokens**-0.015 + offset


def test_both_laws_stand_beside_each_other_and_the_held_out_lm_is_predicted(tmp_path):
    cfg = paper.get_config()
    cfg.sweep.compressors = ("m3", "tokenpacker")
    cfg.sweep.lms = (*cfg.sweep.lms, "qwen1.5-14b")
    table.write(tmp_path / "errors.csv", rows(cfg, ["reasoning"], published))
    scores(tmp_path, cfg, plan.trainings(cfg)[0], "gqa", 0.5)
    page = conclusion.conclude(cfg, tmp_path, "made", ["a note"], Clock(tmp_path / "timing.json"))
    laws = [law.load(tmp_path / name)["reasoning"] for name in ("law.json", "law_elastic.json")]
    assert [fit.compressor for fit in laws] == ["tokenpacker", "m3"]
    for fit in laws:
        assert set(fit.lms) == {lm for lm in cfg.sweep.lms if lm != "qwen1.5-14b"}
    assert laws[0].law.alpha == pytest.approx(0.077, abs=0.02)
    text = page.with_suffix(".md").read_text()
    for words in (
        "| constant | tokenpacker | m3, one training per LM |", "m3: 5 trainings instead of 35", "a note",
        "One seed: how much trainings differ", "extrapolation_reasoning.png", "errors_reasoning_no_text.png", "| 5.13 |",
        "| m3 | 576 | 50.0 |", "Reasoning: 28 cells are published too", "| reasoning alpha |", "published_reasoning.png",
    ):  # fmt: skip
        assert words in text, words
    assert (tmp_path / "extrapolation_reasoning.png").stat().st_size > 10_000


def test_cells_of_one_lm_have_no_law_but_a_table_beside_the_published_one(tmp_path):
    cfg = table1.get_config()
    table.write(tmp_path / "errors.csv", rows(cfg, ["reasoning"], published))
    quecc = next(t for t in plan.trainings(cfg) if (t.compressor, t.visual_tokens) == ("quecc", (1,)))  # fmt: skip
    scores(tmp_path, cfg, quecc, "gqa", 0.534)
    page = conclusion.conclude(cfg, tmp_path, "made", [], Clock(tmp_path / "timing.json"))
    text = page.with_suffix(".md").read_text()
    assert not (tmp_path / "law.json").exists() and "quecc has no law of family reasoning" in text
    assert (
        "| vicuna-7b | quecc | 1 | 53.4 |" in text and "|   published | quecc | 1 | 53.5 |" in text
    )
    assert "Margins of a tenth" in text and "made" in text


def test_what_is_missing_or_flagged_is_said(tmp_path):
    cfg = paper.get_config()
    found = rows(cfg, ["reasoning"], published)[3:]
    found[0] = table.Row(**{**vars(found[0]), "flag": "chance level"})
    table.write(tmp_path / "errors.csv", found)
    conclusion.conclude(cfg, tmp_path, "made", [], Clock(tmp_path / "timing.json"))
    text = (tmp_path / "report.md").read_text()
    assert (
        "Not measured yet: 3 of 28 cells: tokenpacker, qwen1.5-0.5b with 1 visual token, seed 0; "
        in text
    )
    assert "Flagged and not fitted: 1 of 28 cells: tokenpacker, qwen1.5-0.5b with 36" in text


def finished(root, cfg, training, **metrics):
    """The files of a training whose stages took three steps each."""
    where = plan.folders(cfg, root, training.seed)
    for stage in plan.cell_stages(cfg, training):
        folder = where.stage(stage, training)
        (folder / "checkpoints" / "3").mkdir(parents=True)
        experiment.write(experiment.resolve(stages.config_of(cfg, stage, training, where)), folder)
        experiment.finish(folder, {"step": 3, "loss": 1.0, **metrics})
    return where


def answered(out, training, v, errors, moved):
    """What an evaluation leaves, under names of its own."""
    out.mkdir(parents=True)
    own = table.Row(
        presets.lm(training.lm).nominal_params, v, errors, "gqa", "reasoning", "464M", "m3", 10
    )
    table.write(out / "errors.csv", [own])
    questions.append(out / "questions.jsonl", {own.key: [errors + x for x in moved]})


def test_rows_say_how_they_were_trained_and_the_questions_of_all_cells_come_together(tmp_path):
    cfg = paper.get_config()
    cfg.sweep.compressors, cfg.sweep.lms = ("m3",), cfg.sweep.lms[:2]
    cfg.sweep.visual_tokens = (1, 4, 576)
    for training in plan.trainings(cfg):
        where = finished(tmp_path, cfg, training, validation_loss=1.5)
        for v in training.visual_tokens:
            error = 0.5 * v**-0.05 * (1 + (training.lm == cfg.sweep.lms[0]))
            answered(where.answers(training, v), training, v, error, [0.01, -0.01, 0.0])
    (one, _) = plan.trainings(cfg)
    (row,) = answers.rows(cfg, one, where.cell(one), where.answers(one, 4))
    assert (row.lm, row.elastic, row.train_samples) == ("qwen1.5-0.5b", True, 3 * (256 + 128))
    assert row.validation_loss is None  # of all counts together
    found = answers.gather(cfg, tmp_path)
    assert len(found) == 6 and found[row.key] == pytest.approx([row.error + x for x in (0.01, -0.01, 0.0)])  # fmt: skip
    assert answers.gather(cfg, tmp_path) == questions.read([tmp_path / "questions.jsonl"]) == found
    table.write(tmp_path / "errors.csv", [
        r for t in plan.trainings(cfg) for v in t.visual_tokens
        for r in answers.rows(cfg, t, where.cell(t), where.answers(t, v))
    ])  # fmt: skip
    conclusion.conclude(cfg, tmp_path, "made", [], Clock(tmp_path / "timing.json"))
    fit = law.load(tmp_path / "law.json")["reasoning"]
    assert fit.elastic and fit.intervals["questions"]["alpha"] is not None
    assert "| 95% over questions |" in (tmp_path / "report.md").read_text()


def test_the_held_out_loss_of_trainings_has_a_law_of_its_own(tmp_path):
    cfg = paper.get_config()
    (one,) = [t for t in plan.trainings(cfg) if (t.lm, t.visual_tokens) == ("qwen1.5-4b", (16,))]
    where = finished(tmp_path, cfg, one, validation_loss=1.25)
    answered(where.answers(one, 16), one, 16, 0.5, [0.1])
    (row,) = answers.rows(cfg, one, where.cell(one), where.answers(one, 16))
    assert (row.validation_loss, row.elastic) == (1.25, False)
    found = [
        table.Row(**{**vars(r), "validation_loss": 2.0 * (r.lm_params / 1e9) ** -0.1 * r.visual_tokens**-0.02})
        for r in rows(cfg, ["reasoning", "ocr"], published)
    ]  # fmt: skip
    table.write(tmp_path / "errors.csv", found)
    conclusion.conclude(cfg, tmp_path, "made", [], Clock(tmp_path / "timing.json"))
    text = (tmp_path / "report.md").read_text()
    section = text[text.index("## Held-out loss") : text.index("## Beside the published")]
    assert "| loss alpha | 0.1 |" in section and "| loss beta | 0.02 |" in section
    assert "| qwen1.5-7b (7B) | 1.646 |" in section


def test_a_picture_of_where_a_cell_looks_is_of_the_try_that_counts(tmp_path, monkeypatch):
    cfg = mini.get_config()
    (one,) = [t for t in plan.trainings(cfg) if conclusion._is_looked_at(cfg, t)]
    where = plan.folders(cfg, tmp_path, one.seed)
    for rerun in (0, 1):
        where.cell(one, rerun).mkdir(parents=True)
    question = {
        "image": "a.png",
        "answer": "3",
        "conversations": [{"value": cfg.sweep.looks[1] + " x?"}],
    }
    benchmark = type("Benchmark", (), {"rows": staticmethod(lambda _: [question])})
    monkeypatch.setattr(conclusion.benchmarks, "get", lambda _: benchmark)
    monkeypatch.setattr(plan, "asked", lambda cfg: [plan.Asked(cfg.sweep.looks[0], ".", "", "ocr")])
    shown = []
    monkeypatch.setattr(conclusion, "show", lambda c, *_: shown.append(c.eval.checkpoint))
    conclusion.looks(cfg, tmp_path)
    assert shown == [str(where.cell(one, 1))] and shown[0].endswith("-rerun1")
