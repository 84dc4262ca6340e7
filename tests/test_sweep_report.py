"""The end of a sweep: which laws are fitted, what the report adds to them, and a sweep whose cells determine none."""

import json

import numpy as np
import pytest

from configs import paper, table1
from vlm_jax.laws import law, table
from vlm_jax.parts import Clock
from vlm_jax.settings import presets
from vlm_jax.sweeps import conclusion, plan


def rows(cfg, families, error):
    """A row per cell and family, as error(parameters, tokens, compressor) says."""
    drawn = np.random.default_rng(0)
    return [
        table.Row(
            lm_params=presets.lm(cell.lm).nominal_params, visual_tokens=cell.visual_tokens,
            error=float(error(presets.lm(cell.lm).nominal_params, cell.visual_tokens, cell.compressor) + drawn.normal(0, 2e-3)),
            benchmark=family, family=family, lm=cell.lm, compressor=cell.compressor, n=1000, seed=cell.seed,
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
        "One training per LM, every number of visual tokens", "| reasoning alpha / beta |", "a note",
        "One seed: how much trainings differ", "extrapolation_reasoning.png", "| 5.13 |", "| m3 | 576 | 50.0 |",
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
    assert "3 of 28 cells are not measured yet." in text and "1 of 28 cells are flagged" in text
