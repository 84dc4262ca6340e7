"""The paper's experiment on tiny models, end to end: model directories and native files in, law and report out, killed and resumed."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_paper

from vlm_jax.settings.checks import ConfigError
from vlm_jax.sweeps import checks, dry_run

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "tests/helpers/tiny_paper.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny_paper.write(folder)
    return folder


def config(inputs):
    cfg = tiny_paper.get_config()
    cfg.sweep.inputs = str(inputs)
    return cfg


def start(inputs: Path, workdir: Path, *more: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "vlm_jax.sweep", f"--config={CONFIG}", f"--workdir={workdir}",
        f"--config.sweep.inputs={inputs}", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]


def rows(workdir: Path) -> list[dict]:
    """The table without the wall clock."""
    found = list(csv.DictReader((workdir / "errors.csv").open()))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


@pytest.mark.slow
@pytest.mark.parametrize(("compressor", "trainings"), [("tokenpacker", 9), ("m3", 3)])
def test_a_tiny_paper_is_measured_and_a_killed_one_goes_on_to_the_same_errors(
    tmp_path, inputs, compressor, trainings
):
    flags = [f"--config.sweep.compressors=('{compressor}',)"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(inputs, whole, *flags))
    drawn = random.Random(0)
    for most in sorted(drawn.sample(range(1, trainings + 1), 2)):
        process = start(inputs, killed, *flags)
        while (
            process.poll() is None
            and sum("final.json" in names for _, _, names in os.walk(killed)) < most
        ):
            time.sleep(0.05)
        time.sleep(drawn.random() * 3)
        assert process.poll() is None, process.communicate()[1][-3000:]
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(1)  # its workers end with it
    for process in [start(inputs, killed, *flags, f"--part={i}/2") for i in range(2)]:
        finish(process)
    assert len(list(killed.rglob("final.json"))) == 2 * trainings
    finish(start(inputs, killed, *flags))  # the last command concludes
    assert rows(killed) == rows(whole) and len(rows(whole)) == 9 * 3
    assert len(list(whole.rglob("final.json"))) == 2 * trainings
    cells = {(r["lm"], r["visual_tokens"]) for r in rows(whole)}
    assert cells == {(lm, v) for lm in tiny_paper.LMS for v in ("1", "4", "16")}
    assert {r["compressor"] for r in rows(whole)} == {compressor}
    assert {r["elastic"] for r in rows(whole)} == {"yes" if compressor == "m3" else ""}
    assert {r["train_samples"] for r in rows(whole)} == {str(8 * (2 + 3))}
    asked = [json.loads(line) for line in (whole / "questions.jsonl").read_text().splitlines()]
    assert (
        len(asked) == 9 * 3
        and (killed / "questions.jsonl").read_text() == (whole / "questions.jsonl").read_text()
    )
    assert {(r["benchmark"], r["family"]) for r in rows(whole)} == {
        ("gqa", "reasoning"), ("pope", "reasoning"), ("docvqa", "ocr"),
    }  # fmt: skip
    page = (whole / "report.html").read_text()
    assert "A tiny paper" in page and (whole / "law.json").is_file()
    assert (whole / "errors_reasoning.png").stat().st_size > 10_000


def test_all_mistakes_are_named_before_the_first_training(tmp_path, inputs):
    process = start(
        inputs, tmp_path / "w", "--config.sweep.visual_tokens=(1,5)", "--config.sweep.lms=('models/small','models/other')",
        "--config.sweep.annotations=('benchmarks/gqa','benchmarks/nowhere','benchmarks/docvqa')",
        f"--config.data.tokenizer={other_tokenizer(tmp_path)}",
    )  # fmt: skip
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2, said
    (said,) = [line for line in said.splitlines() if line.startswith("error: sweep: 4 mistakes: ")]
    for words in (
        "visual_tokens 5 cannot be cut from a 4x4 grid; use one of [1, 4, 16]",
        "unknown language model preset 'models/other'",
        "nowhere' does not exist; give the folder of the benchmark's native files",
        "(tokenpacker-other-v1, stage align, and 3 more)",
        "a vocabulary of 512, its tokenizer",
    ):
        assert words in said, said
    assert not (tmp_path / "w" / "seed0").exists()


def other_tokenizer(folder: Path) -> Path:
    """A tokenizer with more tokens than the decoders know."""
    import tiny

    tiny.write_tokenizer(folder / "words", [f"word{i}" for i in range(600)])
    return folder / "words"


def test_a_benchmark_that_cannot_be_read_and_a_missing_annotation_file_are_both_named(tmp_path, inputs):  # fmt: skip
    cfg = config(inputs)
    cfg.sweep.annotations = ("benchmarks/gqa", "benchmarks/gqa", "benchmarks/docvqa")
    cfg.sweep.stages.align.annotations = ("captions_of_others.json",)
    with pytest.raises(ConfigError, match=r"2 mistakes: \(1\) .*captions_of_others.*\(2\) pope"):
        checks.check(cfg, tmp_path)


def test_a_dry_run_counts_shared_and_elastic_trainings_once_and_sees_what_is_finished(
    tmp_path, inputs
):
    cfg, on = config(inputs), dry_run.machine("v5e:2x2", "")
    found = dry_run.entries(cfg, tmp_path, on)
    assert len(found) == 18 and not any(e.finished for e in found)
    tune = next(e for e in found if e.stage == "tune")
    assert tune.steps == 3  # 60 records, 0.4 epochs, 8 a step, rounded up
    done = tmp_path / "seed0" / "cells" / "tokenpacker-small-v1" / "align"
    (done / "checkpoints" / "2").mkdir(parents=True)
    (done / "final.json").write_text('{"step": 2, "loss": 1.0}')
    cfg.sweep.compressors = ("tokenpacker", "m3")
    found = dry_run.entries(cfg, tmp_path, on)
    assert len(found) == 18 + 6 and [e.who for e in found if e.finished] == ["tokenpacker-small-v1"]
    said = dry_run.report(cfg, str(tmp_path), on, 2.0)
    assert "left: 23 trainings" in said and "elastic: 24 trainings instead of 36" in said
    assert "every training fits" in said


@pytest.mark.parametrize("stage, slices", [("align", "v5e:2x4"), ("tune", "v5e:4x4")])
def test_a_dry_run_names_the_setting_that_makes_a_training_fit(tmp_path, stage, slices):
    from configs import paper

    cfg = paper.get_config()
    cfg.sweep.lms, cfg.sweep.visual_tokens = ("qwen1.5-7b",), (576,)
    on = dry_run.machine(slices, "0.4")

    def only():
        [entry] = [e for e in dry_run.entries(cfg, tmp_path, on) if e.stage == stage]
        return entry

    entry = only()
    assert entry.peak_bytes > on.chip.hbm_bytes
    settings = {}
    for pair in entry.remedy.removeprefix("fits with ").split(", "):
        field, value = pair.split("=")
        settings[f"{stage}.{field}"] = int(value) if value.lstrip("-").isdigit() else value
    cfg.sweep.lm_settings = (*cfg.sweep.lm_settings, ("qwen1.5-7b", settings))
    entry = only()
    assert not entry.remedy and entry.peak_bytes <= on.chip.hbm_bytes
