"""The harness: answers on disk, restarts, batch sizes, scores, the command line. One tiny model, trained once."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from configs import eval as eval_config
from vlm_jax import benchmarks, compressors, evaluate, train
from vlm_jax.benchmarks import vqa
from vlm_jax.inference import answer, evaluation, features
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.laws import questions, table
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import InitConfig, MeshConfig
from vlm_jax.storage import run as experiment

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of data and, in `run`, a model that has seen it for a while: its answers differ, and not all are right."""
    directory = tiny.write(tmp_path_factory.mktemp("world") / "data")
    cfg = tiny.config(directory, num_steps=80, save_every=80)
    cfg.optim.trainable = "."
    for part in (cfg.model.vit, cfg.model.lm):
        part.num_heads = 4  # so that four devices can share them
    cfg.model.lm.num_kv_heads = 4
    train.train(cfg, str(directory.parent / "run"))
    return directory


def config(world, **fields):
    cfg = eval_config.get_config()
    settings = {
        "checkpoint": str(world.parent / "run"), "benchmarks": ("llava",), "annotations": (str(world),),
        "batch_size": 4, "max_new_tokens": 3,
    }  # fmt: skip
    cfg.eval.update(settings | fields)
    return cfg


def answers(workdir, name="llava"):
    lines = (workdir / name / "predictions.jsonl").read_text().splitlines()
    return {line["id"]: line["text"] for line in map(json.loads, lines)}


def rows(world):
    return benchmarks.get("llava").rows(world)


@pytest.fixture(scope="module")
def first(world):
    """The workdir of one evaluation, and what it returned."""
    workdir = world.parent / "first"
    return workdir, evaluate.evaluate(config(world), str(workdir))


def test_every_question_is_answered_once_and_scored_from_the_file(world, first):
    workdir, scores = first
    texts = answers(workdir)
    gold = {row["id"]: row["answer"] for row in rows(world)}
    assert set(texts) == set(gold) and len(gold) == 14
    assert len(set(texts.values())) > 2, "the answers must differ for these tests to mean anything"
    right = sum(texts[i].lower() == gold[i].lower() for i in gold)
    assert scores == [
        {"benchmark": "llava", "score": right / 14, "error": 1 - right / 14, "n": 14, "details": {}}
    ]
    assert json.loads((workdir / "scores.json").read_text()) == scores


def test_the_errors_row_says_what_was_measured(world, first):
    workdir, scores = first
    (row,) = table.read(workdir / "errors.csv")
    lm = experiment.read(world.parent / "run").model.lm
    assert (row.benchmark, row.family, row.compressor, row.n) == (
        "llava",
        "other",
        "tokenpacker",
        14,
    )
    assert (row.lm_params, row.visual_tokens, row.seed) == (lm.non_embedding_params, 1, 0)
    assert row.error == pytest.approx(scores[0]["error"])
    assert row.lm == presets.size_name(lm.total_params)
    assert 0 < row.seconds < 60
    assert 2 * lm.non_embedding_params * 5 < row.flops < 2 * lm.non_embedding_params * 100


def test_the_errors_without_groups_of_pictures_stand_beside_the_row(world, first):
    workdir, scores = first
    (row,) = table.read(workdir / "errors.csv")
    found = questions.read([workdir / "questions.jsonl"])
    texts = list(answers(workdir).items())
    assert found == {row.key: benchmarks.errors_without_groups("llava", rows(world), texts)}
    known = [error for error in found[row.key] if error is not None]
    assert len(set(known)) > 1 and min(known) <= scores[0]["error"] <= max(known)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_do_not_depend_on_the_batch_size(world, first, tmp_path, batch_size):
    scores = evaluate.evaluate(config(world, batch_size=batch_size), str(tmp_path))
    assert answers(tmp_path) == answers(first[0])
    assert scores == first[1]


def test_answers_and_scores_do_not_depend_on_the_order_of_the_questions(world, first, tmp_path):
    records = json.loads((world / "data.json").read_text())
    turned = tmp_path / "turned.json"
    turned.write_text(json.dumps(records[::-1]))
    (tmp_path / "images").symlink_to(world / "images")
    scores = evaluate.evaluate(config(world, annotations=(str(turned),)), str(tmp_path / "run"))
    assert answers(tmp_path / "run") == answers(first[0])
    assert scores == first[1]


def test_a_killed_evaluation_asks_only_what_is_missing(world, first, tmp_path, monkeypatch):
    """Cut after five answers, inside the sixth."""
    whole = (first[0] / "llava" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "llava").mkdir()
    shutil.copy(first[0] / "llava" / "run.json", tmp_path / "llava")
    (tmp_path / "llava" / "predictions.jsonl").write_text("".join(whole[:5]) + whole[5][:9])
    asked = []
    ask = answer.Answerer.ask
    monkeypatch.setattr(
        answer.Answerer,
        "ask",
        lambda self, rows, *rest: asked.extend(rows) or ask(self, rows, *rest),
    )
    scores = evaluate.evaluate(config(world), str(tmp_path))
    assert len(asked) == 9
    assert scores == first[1]
    assert answers(tmp_path) == answers(first[0])
    before = (tmp_path / "errors.csv").read_text()
    assert evaluate.evaluate(config(world), str(tmp_path)) == first[1]
    assert len(asked) == 9
    assert (tmp_path / "errors.csv").read_text() == before


def test_a_limit_scores_the_first_questions_and_can_be_lifted(world, first, tmp_path):
    (limited,) = evaluate.evaluate(config(world, limit=5), str(tmp_path))
    assert limited["n"] == 5 and len(answers(tmp_path)) == 5
    assert evaluate.evaluate(config(world), str(tmp_path)) == first[1]
    assert evaluate.evaluate(config(world, limit=5), str(tmp_path)) == [limited]


def test_sampled_answers_repeat_with_the_seed_whatever_the_batch(world, first, tmp_path):
    def sampled(name, **fields):
        evaluate.evaluate(config(world, temperature=3.0, **fields), str(tmp_path / name))
        return answers(tmp_path / name)

    one = sampled("one", seed=1)
    assert one == sampled("same", seed=1, batch_size=16)
    assert one != sampled("other", seed=2)
    assert one != answers(first[0])


def test_a_second_evaluation_of_the_same_model_compiles_nothing(world, first, tmp_path):
    answerer = answer.Answerer(EvalConfig(str(world.parent / "run"), 4, 3), MeshConfig())
    jax.clear_caches()  # of other tests with this model in this process
    start = answerer.compilations
    evaluate.evaluate(config(world), str(tmp_path / "one"))
    first_time = answerer.compilations - start
    assert 1 <= first_time <= 12  # at most four widths per batch size
    evaluate.evaluate(config(world), str(tmp_path / "two"))
    assert answerer.compilations == start + first_time


def test_the_likeliest_of_the_replies_is_what_the_model_says_by_itself(world, first):
    """Eight colours to choose from, for the questions whose generated answer is one of them."""
    answerer = answer.Answerer(EvalConfig(str(world.parent / "run"), 4, 3), MeshConfig())
    said = {i: text for i, text in answers(first[0]).items() if text in tiny.COLOURS}
    closed = [{**row, "replies": tuple(tiny.COLOURS)} for row in rows(world) if row["id"] in said]
    assert len(said) >= 4 and len(set(said.values())) > 1
    assert dict(itertools.chain(*answerer.choose(closed, str(world), 4))) == said
    for _, likelihoods in itertools.chain(*answerer.likelihoods(closed, str(world), 4)):
        assert likelihoods.shape == (8,) and 0 < np.exp(likelihoods).sum() <= 1 + 1e-5


def test_cached_features_give_the_answers_of_the_images(world, first, tmp_path):
    run = experiment.read(world.parent / "run")
    run = dataclasses.replace(run, init=InitConfig(str(world.parent / "run"), "", "", ""))
    features.cache(run, tmp_path / "features")
    cfg = config(world, features_dir=str(tmp_path / "features"))
    assert evaluate.evaluate(cfg, str(tmp_path / "out")) == first[1]
    assert answers(tmp_path / "out") == answers(first[0])


@pytest.mark.slow
def test_an_elastic_model_is_measured_at_any_number_of_tokens_it_can_show(world, tmp_path):
    c = tiny.config(world, num_steps=2)
    compressors.choose(c.model.compressor, "mqt", query_grid=2, train_tokens=(2, 4))
    train.train(c, str(tmp_path / "run"))
    measured = []
    for count in (0, 1):
        cfg = config(world, checkpoint=str(tmp_path / "run"), visual_tokens=count)
        evaluate.evaluate(cfg, str(tmp_path / f"eval{count}"))
        measured += table.read(tmp_path / f"eval{count}" / "errors.csv")
    assert [row.visual_tokens for row in measured] == [4, 1]
    assert measured[0].flops > measured[1].flops
    cfg = config(world, checkpoint=str(tmp_path / "run"), visual_tokens=5)
    with pytest.raises(ConfigError, match="2 x 2 queries give 1 to 4 visual tokens, not 5"):
        evaluate.evaluate(cfg, str(tmp_path / "other"))
    cfg = config(world, checkpoint=str(tmp_path / "run"), visual_tokens=2)
    with pytest.raises(ConfigError, match="answers made with visual_tokens = 1, now 2"):
        evaluate.evaluate(cfg, str(tmp_path / "eval1"))


def test_the_question_that_is_looked_at_may_be_another_than_in_training(world):
    run, chosen = str(world.parent / "run"), []
    for query in ("", "last_turn", "none"):
        made = answer.Answerer(EvalConfig(run, 4, 3, query=query), MeshConfig())
        chosen.append(made.data.query)
    assert chosen == ["first_turn", "last_turn", "none"]
    with pytest.raises(ConfigError, match="eval: query 'second_turn' is not one of"):
        evaluate.evaluate(config(world, query="second_turn"), str(world / "nowhere"))


def test_hidden_gold_is_answered_and_uploaded_and_the_rest_is_scored(
    world, tmp_path, capsys, caplog
):
    """VQAv2's test split beside GQA, both in their native files: one row in errors.csv, two files to upload."""
    data, pictures = tmp_path / "data", sorted((world / "images").iterdir())
    for i, picture in enumerate(pictures[:3]):
        for path in (f"test2015/COCO_test2015_{i:012d}.jpg", f"images/n{i}.jpg"):
            (data / path).parent.mkdir(parents=True, exist_ok=True)
            (data / path).symlink_to(picture)
    question = "What colour is this ?"
    asked = [{"question_id": 10 + i, "image_id": i, "question": question} for i in range(3)]
    (data / "v2_OpenEnded_mscoco_test2015_questions.json").write_text(
        json.dumps({"questions": asked})
    )
    gqa = {str(i): {"imageId": f"n{i}", "question": question, "answer": "red"} for i in range(2)}
    (data / "testdev_balanced_questions.json").write_text(json.dumps(gqa))
    cfg = config(world, benchmarks=("vqav2", "gqa"), annotations=(str(data), str(data)))
    workdir = tmp_path / "run"
    caplog.set_level("INFO")
    (scored,) = evaluate.evaluate(cfg, str(workdir))
    texts = answers(workdir, "gqa")
    right = sum(text.lower().rstrip(".") == "red" for text in texts.values())
    assert (scored["benchmark"], scored["score"], scored["n"]) == ("gqa", right / 2, 2)
    assert [row.benchmark for row in table.read(workdir / "errors.csv")] == ["gqa"]
    assert (workdir / "gqa" / "testdev_balanced_predictions.json").is_file()
    upload = workdir / "vqav2" / "v2_OpenEnded_mscoco_test2015_vlmjax_results.json"
    uploaded = {str(one["question_id"]): one["answer"] for one in json.loads(upload.read_text())}
    assert uploaded == {i: vqa.normalise(text) for i, text in answers(workdir, "vqav2").items()}
    assert set(uploaded) == {"10", "11", "12"}
    caplog.clear()
    alone = config(world, benchmarks=("vqav2",), annotations=(str(data),))
    said: list[str] = []
    assert evaluate.evaluate(alone, str(tmp_path / "alone"), said.append) == []
    assert (tmp_path / "alone" / "vqav2" / upload.name).read_bytes() == upload.read_bytes()
    assert not (tmp_path / "alone" / "errors.csv").exists()
    no_row = "no row for errors.csv: all gold answers are hidden; send in the uploads"
    assert said[-1] == no_row and said[-2].endswith("loading jax ...")
    assert not any("no row" in message for message in caplog.messages)  # it is told once
    words = ["--score", "--benchmark=vqav2", f"--annotations={data}"]
    words += [f"--predictions={workdir / 'vqav2' / 'predictions.jsonl'}"]
    assert evaluate.main(words) == 2
    assert "upload v2_OpenEnded_mscoco_test2015_vlmjax_results.json" in capsys.readouterr().err


def run_evaluate(*words, devices="1"):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
    command = [sys.executable, "-m", "vlm_jax.evaluate", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_scoring_saved_predictions_needs_no_jax_and_prints_one_object(world, first, tmp_path):
    code = """
import sys
from vlm_jax import evaluate
sys.exit(evaluate.main() or 10 * ("jax" in sys.modules))
"""
    words = [
        "--score",
        "--benchmark=llava",
        f"--annotations={world}",
        f"--out={tmp_path / 'score.json'}",
    ]
    words += [f"--predictions={first[0] / 'llava' / 'predictions.jsonl'}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == first[1][0]
    assert json.loads((tmp_path / "score.json").read_text()) == first[1][0]


def test_scoring_an_incomplete_file_is_refused_unless_it_is_allowed(world, first, tmp_path, capsys):
    lines = (first[0] / "llava" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[:6]))
    words = ["--score", "--benchmark=llava", f"--annotations={world}"]
    words += [f"--predictions={tmp_path / 'some.jsonl'}"]
    assert evaluate.main(words) == 2
    assert "8 missing" in capsys.readouterr().err
    assert evaluate.main([*words, "--allow-missing"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 6


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"checkpoint": ""}, "checkpoint is empty; give the workdir"),
        ({"checkpoint": "/nowhere"}, "config.json' does not exist"),
        ({"benchmarks": ()}, "benchmarks is empty; name one or more of llava"),
        ({"benchmarks": ("llva",)}, "unknown benchmark 'llva'; use one of llava"),
        ({"benchmarks": ("llava", "mini_ocr")}, "2 benchmarks but 1 annotations"),
        ({"benchmarks": ("mini_ocr",)}, "ocr_test.json does not exist"),
        ({"benchmarks": ("llava",) * 2, "annotations": ("x",) * 2}, "names one twice"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive"),
        ({"limit": -1}, "limit must be 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"features_dir": "/nowhere"}, "features_dir"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_the_fix(world, tmp_path, fields, match):
    with pytest.raises(ConfigError, match=match) as caught:
        evaluate.evaluate(config(world, **fields), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_a_question_that_cannot_be_asked_is_named_with_its_file(world, tmp_path):
    path = tmp_path / "asked.json"
    path.write_text(json.dumps([tiny.record("odd", ["Say </s>", "one"])]))
    with pytest.raises(ConfigError) as caught:
        evaluate.evaluate(config(world, annotations=(str(path),)), str(tmp_path / "out"))
    told = f"data: {path}: record odd/0: its text contains the control token '</s>'"
    assert str(caught.value) == told


def test_answers_of_another_run_are_not_continued(world, first):
    with pytest.raises(ConfigError, match="max_new_tokens = 3, now 4; give another workdir"):
        evaluate.evaluate(config(world, max_new_tokens=4), str(first[0]))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--config=configs/eval.py", "--workdir=x", "--config.eval.batchsize=3"], "batchsize"),
        (["--config=configs/eval.py"], "--workdir is missing"),
        (["--config=configs/eval.py", "--workdir=x"], "checkpoint is empty"),
        (["--score", "--benchmark=llava", "--annotations=x"], "--predictions is missing"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2_before_jax_wakes_up(words, match):
    start = time.perf_counter()
    done = run_evaluate(*words)
    assert done.returncode == 2 and match in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", presets.LM)
def test_a_model_is_named_after_its_preset_whatever_its_vocabulary(name):
    assert evaluation.lm_name(presets.lm(name, vocab_size=77, dtype="bfloat16")) == name


def test_a_model_without_preset_is_named_after_its_size():
    """As the hub counts it, with embeddings: SmolLM2-135M has 134,515,008 parameters, 106 million without its table."""
    smollm = presets.lm(
        "llama3.2-1b", vocab_size=49152, width=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
        mlp_width=1536, nominal_params=0.0,
    )  # fmt: skip
    assert (smollm.total_params, smollm.non_embedding_params) == (134515008, 106203456)
    assert evaluation.lm_name(smollm) == "135M"
