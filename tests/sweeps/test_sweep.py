"""The sweep: what it plans and what it refuses. test_colab.py runs a whole one, killed and resumed."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import mini, mini_smoke
from vlm_jax import files
from vlm_jax.laws import outliers, table
from vlm_jax.settings.checks import ConfigError, RunEnded
from vlm_jax.storage import run as experiment
from vlm_jax.sweeps import plan, running
from vlm_jax.sweeps.plan import Training

ROOT = Path(__file__).resolve().parents[2]


def test_the_plan_holds_every_cell_once_and_the_query_aware_ones_beside():
    cfg = mini.get_config()
    cells, grid = plan.cells(cfg), 4 * len(cfg.sweep.lms)
    assert len(cells) == len(set(cells)) == grid + 1
    assert [c.compressor for c in cells] == ["tokenpacker"] * grid + ["quecc"]
    assert {c.visual_tokens for c in cells} == {1, 4, 16, 64}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("lms", ("mini-82k", "mini-9k"), "unknown language model preset 'mini-9k'"),
        ("visual_tokens", (1, 5), "visual_tokens 5 cannot be cut from a 8x8 grid; use one of [1, 4, 16, 64]"),
        ("visual_tokens", (4, 4), "each value once"),
        ("seeds", (), "each value once"),
        ("benchmarks", ("mini_ocr", "mini_maths"), "mini_maths"),
        ("processes", -2, "processes must be at least 1, or 0 for one per CPU core; got -2"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_run_is_refused_before_it_starts(tmp_path, field, value, words):
    cfg = mini_smoke.get_config()
    cfg.sweep[field] = value
    with pytest.raises(ConfigError) as error:
        running.sweep(cfg, str(tmp_path / "run"), "test")
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


def row(cell: Training, error: float) -> table.Row:
    params = float(cell.lm.removeprefix("mini-").removesuffix("k")) * 1000
    return table.Row(
        lm_params=params, visual_tokens=cell.visual_tokens[0], error=error, benchmark="mini_ocr", family="ocr", lm=cell.lm,
        compressor=cell.compressor, n=3200, seed=cell.seed,
    )  # fmt: skip


def test_a_cell_at_chance_is_rerun_with_other_seeds_and_then_flagged(tmp_path, monkeypatch):
    cfg, cell = mini.get_config(), Training(7, "tokenpacker", "mini-82k", (4,))
    where = plan.folders(cfg, tmp_path, 7)
    errors, seeds = iter([0.95, 0.94, 0.96]), []
    monkeypatch.setattr(
        running, "train", lambda c, folder: seeds.append((c.train.seed, c.data.seed))
    )
    monkeypatch.setattr(running, "evaluate", lambda *_: [row(cell, next(errors))])
    tries = running.run_training(cfg, cell, where).tries
    assert seeds == [(7, 7), (1007, 1007), (2007, 2007)]
    assert [(r.error, r.flag, r.seed) for r in tries[-1].rows] == [(0.96, "chance level", 7)]
    assert [one.fault for one in tries] == [
        f"mini_ocr stays at chance (error {error})" for error in ("0.950", "0.940", "0.960")
    ]


@pytest.fixture
def told_errors(monkeypatch):
    """A sweep without trainings: (cell, try) -> error, of every cell that is not named 0.1. Returns the folders trained."""
    errors, trained = {}, []

    def evaluate(cfg, training, visual_tokens, folder, out, where):
        name, _, rerun = folder.name.partition("-rerun")
        assert name == training.name and out == folder / "eval"
        return [row(training, errors.get((str(training), int(rerun or 0)), 0.1))]

    monkeypatch.setattr(running, "train", lambda c, folder: trained.append(Path(folder).name))
    monkeypatch.setattr(running, "prepare", lambda *_: None)
    monkeypatch.setattr(running, "cache_features", lambda *_: None)
    monkeypatch.setattr(running, "evaluate", evaluate)
    monkeypatch.setattr(running.conclusion, "looks", lambda *_: [])
    monkeypatch.setattr(running.conclusion, "_laws", lambda *_: ({("tokenpacker", False): {}}, []))
    monkeypatch.setattr(running.conclusion.appendix, "blocks", lambda *_: [])
    monkeypatch.setattr(running.conclusion.report, "write_report", lambda root, *_, **__: root)
    return errors, trained


def test_a_cell_out_of_line_is_rerun_and_the_first_sound_try_counts(tmp_path, told_errors):
    cfg = mini.get_config()
    cfg.sweep.processes = 1
    errors, trained = told_errors
    saved, lost = "seed 0: tokenpacker-mini-82k-v64", "seed 0: tokenpacker-mini-45k-v16"
    errors |= {(saved, 0): 0.5, (saved, 1): 0.05, (lost, 0): 0.3, (lost, 1): 0.95, (lost, 2): 0.4}
    running.sweep(cfg, str(tmp_path), "test")
    assert [name for name in trained if "rerun" in name] == [
        "tokenpacker-mini-45k-v16-rerun1", "tokenpacker-mini-45k-v16-rerun2", "tokenpacker-mini-82k-v64-rerun1",
    ]  # fmt: skip
    rows = {(r.lm, r.visual_tokens): r for r in table.read(tmp_path / "errors.csv")[:-1]}
    assert (rows["mini-82k", 64].error, rows["mini-82k", 64].flag) == (0.05, "")
    assert (rows["mini-45k", 16].error, rows["mini-45k", 16].flag) == (0.4, "out of line")
    assert [cell for cell, r in rows.items() if r.flag] == [("mini-45k", 16)]
    assert json.loads((tmp_path / "reruns.json").read_text()) == [
        f"{lost}, trained with seed 0: mini_ocr error 0.300 is above the 0.100 of mini-45k with 4 visual tokens; "
        "seed 1000: mini_ocr stays at chance (error 0.950); seed 2000: mini_ocr error 0.400 is above the 0.100 of "
        "mini-45k with 4 visual tokens, flagged and not fitted.",
        f"{saved}, trained with seed 0: mini_ocr error 0.500 is above the 0.100 of mini-82k with 16 visual tokens; "
        "seed 1000: mini_ocr 0.050, which counts.",
    ]


def test_a_cell_that_another_machine_holds_is_left_alone(tmp_path, told_errors, monkeypatch):
    cfg = mini_smoke.get_config()
    cfg.sweep.processes = 1
    held = "tokenpacker-mini-82k-v1"

    def train(c, folder):
        if Path(folder).name == held:
            with files.lock(tmp_path):
                pass
        told_errors[1].append(Path(folder).name)

    monkeypatch.setattr(running, "train", train)
    with files.lock(tmp_path), pytest.raises(RunEnded, match=f"{held}: run by another") as end:
        running.sweep(cfg, str(tmp_path), "test")
    assert end.value.exit_code == 0 and held not in told_errors[1]
    assert len(table.read(tmp_path / "errors.csv")) == 4
    assert running.sweep(cfg, str(tmp_path), "test") == tmp_path / "report.html"


def test_a_cell_that_another_machine_evaluates_is_left_alone(tmp_path, monkeypatch):
    cfg = mini.get_config()
    cell = plan.trainings(cfg)[0]
    where, asked = plan.folders(cfg, tmp_path, 0), []
    monkeypatch.setattr(running, "train", lambda *_: None)
    monkeypatch.setattr(running.evaluation, "evaluate", lambda *_: asked.append(1))
    monkeypatch.setattr(running.answers, "rows", lambda *_: [row(cell, 0.5)])
    out = where.answers(cell, cell.visual_tokens[0])
    out.mkdir(parents=True)
    with files.lock(out):
        assert running.run_training(cfg, cell, where).tries == [] and not asked
    assert len(running.run_training(cfg, cell, where).tries) == 1 and asked == [1]


def test_rows_of_an_older_table_are_replaced_when_they_say_how_they_were_trained(tmp_path):
    cell = plan.trainings(mini.get_config())[0]
    path, old = tmp_path / "errors.csv", row(cell, 0.5)
    new = dataclasses.replace(old, train_samples=960, elastic=True)
    apart = dataclasses.replace(old, train_samples=320)
    table.write(path, [old, apart])
    running.write_table(path, [cell], {cell: [outliers.Try(0, [new])]})
    assert table.read(path) == [new, apart]


def test_rows_stand_in_the_order_of_the_plan_whichever_cell_is_finished_first(tmp_path):
    cells = plan.trainings(mini.get_config())[:4]
    path, other = tmp_path / "errors.csv", Training(3, "tokenpacker", "mini-45k", (1,))
    table.write(path, [row(cells[2], 0.9), row(other, 0.3)])
    tries = {}
    for cell in (cells[3], cells[0], cells[2], cells[1]):
        tries[cell] = [outliers.Try(0, [row(cell, 0.5)])]
        running.write_table(path, cells, tries)
    assert table.read(path) == [row(cell, 0.5) for cell in cells] + [row(other, 0.3)]


def test_texts_need_only_the_data_and_cells_the_features_and_their_own_text(tmp_path):
    cfg = mini.get_config()
    where, cells = plan.folders(cfg, tmp_path, 0), plan.trainings(cfg)
    found = running.shared_parts(cfg, cells, where)
    found += [running.training_part(cfg, c, where) for c in cells]
    needs = {part.name: part.needs for part in found}
    assert needs["seed 0: features"] == ("seed 0: data", "seed 0: encoder")
    assert needs["seed 0: text mini-45k"] == needs["seed 0: encoder"] == ("seed 0: data",)
    assert needs["seed 0: quecc-mini-82k-v1"] == ("seed 0: features", "seed 0: text mini-82k")
    assert len({part.log for part in found}) == len(found) == 3 + len(cfg.sweep.lms) + len(cells)
    assert not any(part.log.is_relative_to(where.features) for part in found)
    costs = {part.name: part.cost for part in found}
    assert costs["seed 0: tokenpacker-mini-45k-v64"] > costs["seed 0: tokenpacker-mini-45k-v1"] > 0


def test_the_parts_of_a_sweep_are_all_cells_once_each():
    cells = plan.trainings(mini.get_config())
    parts = [running.share_of(cells, f"{i}/4") for i in range(4)]
    sizes = sorted(map(len, parts))
    assert sizes[-1] - sizes[0] <= 1
    assert sorted(c.name for part in parts for c in part) == sorted(c.name for c in cells)
    assert running.share_of(cells, "shared") == []
    for wrong in ("4/4", "1", "-1/2", "a/2", "1/0"):
        with pytest.raises(ConfigError, match="neither 'shared' nor I/N"):
            running.share_of(cells, wrong)


def test_machines_train_their_cells_and_the_last_command_finds_them_finished(tmp_path, monkeypatch):
    cfg, trained = mini_smoke.get_config(), []
    cfg.sweep.processes = 1

    def train(c, folder):
        if experiment.finished(Path(folder)) is None:
            trained.append(str(Path(folder).relative_to(tmp_path)))
            (Path(folder) / "checkpoints" / "1").mkdir(parents=True)
            experiment.finish(Path(folder), {"step": 1, "loss": 0.0})

    monkeypatch.setattr(running, "train", train)
    monkeypatch.setattr(running, "prepare", lambda *_: None)
    monkeypatch.setattr(
        running, "cache_features", lambda *given: given[-1].features.mkdir(exist_ok=True)
    )
    cell = Training(0, "tokenpacker", "mini-82k", (4,))
    monkeypatch.setattr(running, "evaluate", lambda *_: [row(cell, 0.5)])
    monkeypatch.setattr(running, "write_table", lambda path, *_: path.write_text("rows"))
    clocks = []
    monkeypatch.setattr(
        running.conclusion, "conclude", lambda *given: clocks.append(given[-1]) or tmp_path
    )
    with pytest.raises(ConfigError, match="encoder is not finished; run --part=shared to its end"):
        running.sweep_part(cfg, str(tmp_path), "0/2")
    running.sweep_part(cfg, str(tmp_path), "shared")
    assert trained == ["seed0/encoder", "seed0/text/mini-45k", "seed0/text/mini-82k"]
    for part in ("1/2", "0/2"):
        running.sweep_part(cfg, str(tmp_path), part)
    names = [f"seed0/cells/{training.name}" for training in plan.trainings(cfg)]
    assert trained[3:] == names[1::2] + names[::2]
    assert not (tmp_path / "errors.csv").exists()  # one process writes it, the last one
    parts = sorted(tmp_path.glob("timing.*.json"))
    assert [p.name for p in parts] == [f"timing.{n}.json" for n in ("0_of_2", "1_of_2", "shared")]
    for number, path in enumerate(parts):
        path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), 7.0 + number)))
    running.sweep(cfg, str(tmp_path), "test")
    seconds = clocks[0].seconds
    assert len(trained) == 3 + len(names) and (tmp_path / "errors.csv").exists()
    assert len(seconds) == 5 + len(names)
    assert sorted(seconds.values()) == [7.0] * 3 + [8.0] * 2 + [9.0] * 5  # of who did the work
