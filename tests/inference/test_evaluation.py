"""What an evaluation says before it asks and when it is done, and whose record it cannot ask."""

import dataclasses

import pytest
import tiny
from askable import write_run

from vlm_jax.inference import evaluation, tasks
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment


def task(tmp_path, name, total, missing):
    rows = [{"id": str(i)} for i in range(total)]
    return tasks.Task(
        name, "generation", "", "", tmp_path, rows, frozenset(), rows[:missing], None, (), False
    )


def test_an_evaluation_says_what_it_asks_and_where_it_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exp = experiment.resolve(tiny.config(tiny.write(tmp_path / "data"), random_frozen=False))
    asked = [task(tmp_path, "pope", 9000, 9000), task(tmp_path, "mme", 2374, 74)]
    lines = evaluation._asking(exp, str(tmp_path / "run"), 6, tmp_path / "eval", asked)
    assert lines == [
        "  model    run, step 6: images of 16 px -> tokenpacker -> decoder of 2 layers, width 16",
        "  asked    pope (9,000 questions), mme (2,374 questions, 2,300 answered already)",
        "  written  eval/<benchmark>/predictions.jsonl, then scores.json and errors.csv; loading jax ...",
    ]
    assert evaluation._written(tmp_path / "eval", 2)[0] == (
        "  wrote    eval/scores.json and errors.csv (2 rows of this run)"
    )


def test_a_directory_of_a_preset_s_shape_counts_as_the_preset_does(tmp_path):
    exp = experiment.resolve(tiny.config(tiny.write(tmp_path / "data"), random_frozen=False))
    score = {"error": 0.5, "benchmark": "pope", "n": 10}
    for nominal in (0.5e9, 0.0):  # the preset, and what a directory's config.json describes
        lm = presets.lm("qwen2.5-0.5b", nominal_params=nominal)
        run = dataclasses.replace(exp, model=dataclasses.replace(exp.model, lm=lm))
        row = evaluation._row(task(tmp_path, "pope", 10, 0), score, run, 4, 1.0, None)
        assert (row.lm, row.lm_params) == ("qwen2.5-0.5b", 0.5e9)


def test_a_run_that_still_trains_is_told(tmp_path, caplog):
    run = tmp_path / "run"
    write_run(run, tiny.write(tmp_path / "data"))
    (run / "checkpoints" / "0").rename(run / "checkpoints" / "6")
    settings = EvalConfig(str(run), 1, 1, benchmarks=("llava",), annotations=("a.json",))
    assert evaluation._check(settings)[1] == 6
    assert f"{run} is not finished; this is its step 6" in caplog.text
    caplog.clear()
    experiment.finish(run, {"step": 6, "loss": 1.0})
    evaluation._check(settings)
    assert not caplog.records


def test_without_a_benchmark_nothing_is_made(tmp_path):
    with pytest.raises(ConfigError, match="eval: benchmarks is empty; name one or more of "):
        evaluation.evaluate(EvalConfig("run", 1, 1), MeshConfig(), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
