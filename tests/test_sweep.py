"""The sweep: what it plans and what it refuses. test_colab.py runs a whole one, killed and resumed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import mini, mini_smoke
from vlm_jax import sweep
from vlm_jax.settings.checks import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def test_the_plan_holds_every_cell_once_and_the_query_aware_ones_beside():
    cells = sweep.cells(mini.get_config())
    assert len(cells) == len(set(cells)) == 3 * 4 + 1
    assert [c.compressor for c in cells] == ["tokenpacker"] * 12 + ["quecc"]
    assert {c.visual_tokens for c in cells} == {1, 4, 16, 64}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("lms", ("mini-82k", "mini-9k"), "unknown language model preset 'mini-9k'"),
        ("visual_tokens", (1, 5), "visual_tokens 5 cannot be cut from a 8x8 grid; use one of [1, 4, 16, 64]"),
        ("visual_tokens", (4, 4), "each value once"),
        ("seeds", (), "each value once"),
        ("benchmarks", ("mini_ocr", "mini_maths"), "mini_maths"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_run_is_refused_before_it_starts(tmp_path, field, value, words):
    cfg = mini_smoke.get_config()
    cfg.sweep[field] = value
    with pytest.raises(ConfigError) as error:
        sweep.sweep(cfg, str(tmp_path / "run"), "test")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "seed0").exists()


def test_mistakes_on_the_command_line_cost_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    for wrong, words in (
        (["--config.sweep.stepz=1"], "stepz"),
        (["--config.model.vit.preset=siglip9"], "siglip9"),
        ([f"--workdir={tmp_path / 'file' / 'below'}"], "cannot write"),
    ):
        command = [
            sys.executable,
            "-m",
            "vlm_jax.sweep",
            "--config=configs/mini_smoke.py",
            f"--workdir={tmp_path}",
        ]
        start = time.monotonic()
        run = subprocess.run([*command, *wrong], capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 2 and words in run.stderr, run.stderr
        assert len(run.stderr.strip().splitlines()) == 1
        assert "jax" not in run.stderr and time.monotonic() - start < 60  # hung, not slow


def test_a_cell_at_chance_is_rerun_with_other_seeds_and_then_flagged(tmp_path, monkeypatch):
    cfg, shared, cell = (
        mini.get_config(),
        sweep.Shared(tmp_path),
        sweep.Cell(7, "tokenpacker", "mini-82k", 4),
    )
    errors, seeds = iter([0.95, 0.94, 0.96]), []
    monkeypatch.setattr(sweep, "train", lambda c, folder: seeds.append((c.train.seed, c.data.seed)))
    row = sweep.table.Row(
        lm_params=82240, visual_tokens=4, error=0.5, benchmark="mini_ocr", family="ocr", seed=7
    )
    monkeypatch.setattr(
        sweep, "evaluate_cell", lambda *_: [sweep.dataclasses.replace(row, error=next(errors))]
    )
    rows = sweep.run_cell(cfg, cell, shared)
    assert seeds == [(7, 7), (1007, 1007), (2007, 2007)]
    assert [(r.error, r.flag, r.seed) for r in rows] == [(0.96, "chance level", 7)]


def test_the_parts_of_a_sweep_are_all_cells_once_each():
    cells = sweep.cells(mini.get_config())
    parts = [sweep.share_of(cells, f"{i}/4") for i in range(4)]
    assert sorted(map(len, parts)) == [3, 3, 3, 4]
    assert sorted(c.name for part in parts for c in part) == sorted(c.name for c in cells)
    assert sweep.share_of(cells, "shared") == []
    for wrong in ("4/4", "1", "-1/2", "a/2", "1/0"):
        with pytest.raises(ConfigError, match="neither 'shared' nor I/N"):
            sweep.share_of(cells, wrong)


def test_machines_train_their_cells_and_the_last_command_finds_them_finished(tmp_path, monkeypatch):
    cfg, trained = mini_smoke.get_config(), []

    def train(c, folder):
        if sweep.experiment.finished(Path(folder)) is None:
            trained.append(str(Path(folder).relative_to(tmp_path)))
            (Path(folder) / "checkpoints" / "1").mkdir(parents=True)
            sweep.experiment.finish(Path(folder), {"step": 1, "loss": 0.0})

    row = sweep.table.Row(
        lm_params=82240, visual_tokens=4, error=0.5, benchmark="mini_ocr", family="ocr", seed=0
    )
    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "write_data", lambda *_: None)
    monkeypatch.setattr(
        sweep, "cache_features", lambda _, shared: shared.features.mkdir(exist_ok=True)
    )
    monkeypatch.setattr(sweep, "evaluate_cell", lambda *_: [row])
    monkeypatch.setattr(sweep.table, "append", lambda path, rows: path.write_text("rows"))
    clocks = []
    monkeypatch.setattr(sweep, "conclude", lambda *given: clocks.append(given[-1]) or tmp_path)
    with pytest.raises(ConfigError, match="encoder is not finished; run --part=shared to its end"):
        sweep.sweep_part(cfg, str(tmp_path), "0/2")
    sweep.sweep_part(cfg, str(tmp_path), "shared")
    assert trained == ["seed0/encoder", "seed0/text/mini-38k", "seed0/text/mini-82k"]
    for part in ("1/2", "0/2"):
        sweep.sweep_part(cfg, str(tmp_path), part)
    names = [f"seed0/cells/{cell.name}" for cell in sweep.cells(cfg)]
    assert trained[3:] == names[1::2] + names[::2]
    assert not (tmp_path / "errors.csv").exists()  # one process writes it, the last one
    parts = sorted(tmp_path.glob("timing.*.json"))
    assert [p.name for p in parts] == [f"timing.{n}.json" for n in ("0_of_2", "1_of_2", "shared")]
    for number, path in enumerate(parts):
        path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), 7.0 + number)))
    sweep.sweep(cfg, str(tmp_path), "test")
    seconds = clocks[0].seconds
    assert len(trained) == 3 + len(names) and (tmp_path / "errors.csv").exists()
    assert len(seconds) == 5 + len(names)
    assert sorted(seconds.values()) == [7.0] * 3 + [8.0] * 2 + [9.0] * 5  # of who did the work
