"""Every benchmark through a model: native files -> answers -> scores -> errors.csv, however it is asked. One tiny model."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny
from flax import linen as nn
from native_files import FIXTURES

from configs import eval as eval_config
from vlm_jax import benchmarks, evaluate
from vlm_jax.benchmarks import predictions
from vlm_jax.data import eval_batches as prompts
from vlm_jax.laws import table
from vlm_jax.models.vlm import init_params
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage.checkpoint import save_params
from vlm_jax.storage.run import resolve, write

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "A",
    "B",
    "C",
    "D",
    "E",
    "yes",
    "no",
    "2",
    "3",
    "10",
    "Answer",
    "word",
    "phrase",
    "option",
    "letter",
)
SYSTEM = "Say hello . What colour is this image ? Say one ."  # long enough to be shared


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """name -> annotations of each benchmark's tiny native files."""
    return {name: str(build(tmp_path_factory.mktemp(name))) for name, build in FIXTURES.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model that nobody trained, whose weights are so large that its answers differ from prompt to prompt."""
    root = tmp_path_factory.mktemp("harness")
    cfg = tiny.config(tiny.write(root / "data", WORDS))
    cfg.data.update({"max_tokens": 256, "max_images": 3, "system": SYSTEM})
    for part in (cfg.model.vit, cfg.model.lm):
        part.num_heads = 4  # so that four devices can share them
    cfg.model.lm.num_kv_heads = 4
    experiment, folder = resolve(cfg), root / "run"
    folder.mkdir()
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(experiment.model, jax.random.key(0)))
    save_params(folder, jax.tree.map(lambda x: 12.0 * x if x.ndim > 1 else x, params))
    write(experiment, folder)
    return folder


def config(run, files, names, **fields):
    cfg = eval_config.get_config()
    settings = {
        "checkpoint": str(run), "benchmarks": tuple(names), "annotations": tuple(files[name] for name in names),
        "batch_size": 4, "max_new_tokens": 3,
    }  # fmt: skip
    cfg.eval.update(settings | fields)
    return cfg


def texts(workdir, label):
    return dict(predictions.read(workdir / label / "predictions.jsonl"))


@pytest.fixture(scope="module")
def generated(run, files, tmp_path_factory):
    """The workdir of every benchmark asked once, and what that returned."""
    workdir = tmp_path_factory.mktemp("generated") / "run"
    return workdir, evaluate.evaluate(config(run, files, FIXTURES), str(workdir))


@pytest.fixture(scope="module")
def chosen(run, files, closed, tmp_path_factory):
    """The same for the likelihood of replies, where a benchmark has some."""
    workdir = tmp_path_factory.mktemp("chosen") / "run"
    return workdir, evaluate.evaluate(config(run, files, closed, mode="likelihood"), str(workdir))


@pytest.fixture(scope="module")
def closed(files):
    return [n for n in FIXTURES if any("replies" in r for r in benchmarks.get(n).rows(files[n]))]


@pytest.mark.slow
def test_every_benchmark_goes_from_native_files_to_an_error(files, generated):
    workdir, scores = generated
    rows = {row.benchmark: row for row in table.read(workdir / "errors.csv")}
    scored, said = [], set()
    for name, annotations in files.items():
        questions = benchmarks.get(name).rows(annotations)
        answers = texts(workdir, name)
        assert set(answers) == {row["id"] for row in questions}
        said |= set(answers.values())
        uploads = benchmarks.submission(name, questions, list(answers.items()))
        assert all((workdir / name / file).is_file() for file in uploads)
        if not benchmarks.has_gold(questions):
            assert name not in rows and uploads
            continue
        score = benchmarks.score_answers(name, questions, list(answers.items()))
        scored.append(score)
        assert 0 <= score["error"] <= 1
        assert rows[name].error == pytest.approx(score["error"]) and rows[name].n == score["n"]
        assert rows[name].family == benchmarks.get(name).family
    assert scores == scored == json.loads((workdir / "scores.json").read_text())
    assert len(scored) == len(rows) >= 20
    assert len(said) > 5, "the answers must differ for these tests to mean anything"


@pytest.mark.slow
def test_at_most_eight_programs_are_compiled_for_a_benchmark_and_its_speed_is_kept(
    files, generated, chosen
):
    for workdir, names in ((generated[0], files), (chosen[0], [s["benchmark"] for s in chosen[1]])):
        for name in names:
            (line,) = map(json.loads, (workdir / name / "speed.jsonl").read_text().splitlines())
            assert line["questions"] == len(texts(workdir, name)) and line["seconds"] > 0
            assert 0 <= line["compilations"] <= 8
            assert line["prompt_tokens"] >= line["questions"]


@pytest.mark.slow
def test_the_likeliest_reply_is_named_apart_from_the_official_answer(files, closed, chosen):
    workdir, scores = chosen
    assert [score["benchmark"] for score in scores] == [f"{name}_likelihood" for name in closed]
    families = {row.benchmark: row.family for row in table.read(workdir / "errors.csv")}
    for name, score in zip(closed, scores, strict=True):
        questions = benchmarks.get(name).rows(files[name])
        answers = texts(workdir, f"{name}_likelihood")
        assert all(answers[r["id"]] in r["replies"] for r in questions if "replies" in r)
        again = benchmarks.score_answers(name, questions, list(answers.items()))
        assert score == {**again, "benchmark": f"{name}_likelihood"}
        assert families[score["benchmark"]] == benchmarks.get(name).family + "_likelihood"


@pytest.mark.slow
def test_a_benchmark_of_open_questions_has_no_likelihoods(run, files, tmp_path):
    with pytest.raises(ConfigError, match="eval: gqa has open questions only; use mode = 'generat"):
        evaluate.evaluate(config(run, files, ["gqa"], mode="likelihood"), str(tmp_path))


@pytest.mark.slow
def test_no_score_depends_on_the_batch_size(run, files, generated, chosen, tmp_path):
    """Batches of 7 instead of 4: other neighbours, other widths, several rows of padding."""
    names = ["pope", "mme", "mmbench", "mmmu"]
    for mode, (_, scores), suffix in (
        ("generation", generated, ""),
        ("likelihood", chosen, "_likelihood"),
    ):
        cfg = config(run, files, names, mode=mode, batch_size=7)
        wanted = {score["benchmark"]: score for score in scores}
        found = evaluate.evaluate(cfg, str(tmp_path / mode))
        assert found == [wanted[name + suffix] for name in names]


@pytest.mark.slow
def test_no_answer_depends_on_sharing_what_prompts_begin_with(
    run, files, generated, chosen, tmp_path, monkeypatch
):
    """MME and ScienceQA share the system prompt; here every prompt is read whole."""
    lengths = []
    found = prompts.common_prefix
    names = ["scienceqa", "mme"]

    def none(asked):
        lengths.append(len(found(asked)))
        return found(asked)[:0]

    monkeypatch.setattr(prompts, "common_prefix", none)
    for mode, (workdir, _), suffix in (
        ("generation", generated, ""),
        ("likelihood", chosen, "_likelihood"),
    ):
        evaluate.evaluate(config(run, files, names, mode=mode), str(tmp_path / mode))
        for name in names:
            label = name + suffix
            assert texts(tmp_path / mode, label) == texts(workdir, label)
    assert min(lengths) >= 15  # <s>, the system prompt's twelve tokens, USER :


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 3])
def test_a_killed_evaluation_goes_on_in_either_mode(run, files, generated, chosen, tmp_path, kept):
    for mode, (workdir, scores), suffix in (
        ("generation", generated, ""),
        ("likelihood", chosen, "_likelihood"),
    ):
        label = "pope" + suffix
        lines = (workdir / label / "predictions.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / label).mkdir()
        torn = "".join(lines[:kept]) + lines[kept][:7]
        (tmp_path / label / "predictions.jsonl").write_text(torn)
        shutil.copy(workdir / label / "run.json", tmp_path / label)
        result = evaluate.evaluate(config(run, files, ["pope"], mode=mode), str(tmp_path))
        assert result == [score for score in scores if score["benchmark"] == label]
        assert texts(tmp_path, label) == texts(workdir, label)


ASKED = ("pope", "mme")


def command(run, files, workdir, mode, mesh):
    settings = {f"mesh.{axis}": size for axis, size in mesh.items()} | {
        "eval.mode": mode, "eval.checkpoint": run, "eval.benchmarks": ASKED,
        "eval.annotations": tuple(files[name] for name in ASKED), "eval.batch_size": 8, "eval.max_new_tokens": 3,
    }  # fmt: skip
    words = ["--config=configs/eval.py", f"--workdir={workdir}"]
    words += [f"--config.{field}={value}" for field, value in settings.items()]
    return [sys.executable, "-m", "vlm_jax.evaluate", *words]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "mesh"),
    [
        ("generation", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("likelihood", {"data": 1, "fsdp": 2, "tensor": 4}),
    ],
)
def test_eight_devices_give_the_answers_of_one(run, files, generated, chosen, tmp_path, mode, mesh):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        command(run, files, tmp_path, mode, mesh), cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(tmp_path, generated if mode == "generation" else chosen, json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 1, "tensor": 2}], ids=str)
def test_two_processes_give_the_answers_of_one(run, files, generated, chosen, tmp_path, mesh):
    """Along data each process decodes its own half of every batch; along tensor both decode all of it."""
    for mode, whole in (("generation", generated), ("likelihood", chosen)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        peers = [
            subprocess.Popen(
                command(run, files, tmp_path / mode, mode, mesh), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, env=os.environ | {
                    "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i),
                },
            )
            for i in range(2)
        ]  # fmt: skip
        for peer in peers:
            out, err = peer.communicate(timeout=300)
            assert peer.returncode == 0, err
            check(tmp_path / mode, whole, json.loads(out.splitlines()[-1]))  # gloo talks before


def check(workdir, whole, scores):
    wanted = {score["benchmark"]: score for score in whole[1]}
    assert scores == [wanted[score["benchmark"]] for score in scores] and len(scores) == len(ASKED)
    for score in scores:
        label = score["benchmark"]
        assert texts(workdir, label) == texts(whole[0], label)
