"""What an evaluation says before it asks and when it is done, and whose record it cannot ask."""

import pytest
import tiny

from vlm_jax.inference import evaluation, tasks
from vlm_jax.inference.settings import EvalConfig
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


def test_without_a_benchmark_nothing_is_made(tmp_path):
    with pytest.raises(ConfigError, match="eval: benchmarks is empty; name one or more of "):
        evaluation.evaluate(EvalConfig("run", 1, 1), MeshConfig(), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
