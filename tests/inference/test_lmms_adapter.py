"""The model that lmms-eval sees: same answers as our own evaluation, settings honoured or refused by name.

Without lmms-eval its interface is lmms_stand_in.py's; with it, the real classes, and one run of its command.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys

import lmms_stand_in
import pytest
import tiny
from PIL import Image

from configs import eval as eval_config
from vlm_jax import benchmarks, evaluate, train
from vlm_jax.settings.checks import ConfigError

TASK, SPLIT = "colours", "test"
GREEDY = {"max_new_tokens": 3, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
SAMPLED = {"max_new_tokens": 3, "temperature": 3.0, "do_sample": True, "until": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data and, beside it, `run`: a model whose answers differ."""
    directory = tiny.write(tmp_path_factory.mktemp("world") / "data")
    shutil.copy(directory / "data.json", directory / "reasoning_test.json")
    cfg = tiny.config(directory, num_steps=200, save_every=200)
    cfg.optim.trainable = "."
    train.train(cfg, str(directory.parent / "run"))
    return directory


@pytest.fixture(scope="module")
def lmms():
    """Our adapter's module, over the real lmms-eval or its stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        lmms_stand_in.install(patch)
        patch.delitem(sys.modules, "vlm_jax.inference.lmms_eval", raising=False)
        yield importlib.import_module("vlm_jax.inference.lmms_eval")
        del sys.modules["vlm_jax.inference.lmms_eval"]


@pytest.fixture(scope="module")
def ours(world):
    """The questions, and what our own evaluation answers: {id: text}."""
    cfg = eval_config.get_config()
    cfg.eval.update(
        {
            "checkpoint": str(world.parent / "run"), "benchmarks": ("mini_reasoning",), "annotations": (str(world),),
            "batch_size": 4, "max_new_tokens": 3,
        }
    )  # fmt: skip
    evaluate.evaluate(cfg, str(world.parent / "eval"))
    lines = (world.parent / "eval" / "mini_reasoning" / "predictions.jsonl").read_text()
    texts = {line["id"]: line["text"] for line in map(json.loads, lines.splitlines())}
    return benchmarks.get("mini_reasoning").rows(world), texts


@pytest.fixture
def model(world, ours, lmms):
    """As lmms-eval makes it, with the documents of one task."""
    made = lmms.VLMJax.create_from_arg_string(
        f"checkpoint={world.parent / 'run'}", {"batch_size": "2", "device": None}
    )
    made.task_dict[TASK] = {SPLIT: [document(world, row) for row in ours[0]]}
    return made


def document(world, row):
    images = [Image.open(world / row["image"])] if "image" in row else []
    return {"images": images, "question": row["conversations"][-1]["value"]}


def request(model, doc_id, kwargs=GREEDY, kind="generate_until", context=None, visuals=None):
    """An Instance as ConfigurableTask.construct_requests makes it."""
    instance = importlib.import_module("lmms_eval.api.instance").Instance
    text = model.task_dict[TASK][SPLIT][doc_id]["question"].replace("<image>", "").strip()
    arguments = (
        text if context is None else context,
        dict(kwargs),
        lambda doc: doc["images"] if visuals is None else visuals,
        doc_id,
        TASK,
        SPLIT,
    )
    metadata = {"task": TASK, "doc_id": doc_id, "repeats": 1, "split": SPLIT}
    return instance(kind, arguments, 0, metadata)


@pytest.mark.slow
def test_answers_equal_those_of_our_evaluation_in_the_order_of_the_requests(model, ours):
    rows, texts = ours
    order = [5, *range(1, 5), 0, *range(6, 12), *[12, 13] * 4]  # the shortest come last
    found = model.generate_until([request(model, i) for i in order])
    assert found == [texts[rows[i]["id"]] for i in order]
    assert len(rows) == 14 and len(set(found)) > 3, "else an order would not show"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "P", "L", "CMYK"])
def test_a_picture_arrives_as_its_file_would_whatever_its_mode(model, lmms, tmp_path, mode):
    from vlm_jax.data import images

    picture = Image.effect_noise((9, 7), 90).convert("RGB").rotate(90).convert(mode)
    picture.save(tmp_path / "native.tif")
    name = lmms._write_image(picture, tmp_path, "colours/test/0")
    native, ours = (
        images.load(str(tmp_path / n), 8, "pad", (0.5,) * 3, 999) for n in ("native.tif", name)
    )
    assert (native == ours).all() and native.std() > 20


@pytest.mark.slow
def test_an_image_that_the_task_has_placed_is_not_placed_again(model, ours):
    rows, texts = ours
    assert rows[0]["conversations"][-1]["value"].startswith("<image>")
    placed = request(model, 0, context=rows[0]["conversations"][-1]["value"])
    assert model.generate_until([placed]) == [texts[rows[0]["id"]]]
    with pytest.raises(ConfigError, match=r"colours/test/0/0: 2 <image> placeholders .* 1 images"):
        model.generate_until([request(model, 0, context="<image> <image> Is it bright ?")])


@pytest.mark.slow
def test_requests_with_different_settings_are_answered_each_with_its_own(model, ours):
    rows, texts = ours
    stop = texts[rows[1]["id"]][1:3]
    until = {**GREEDY, "until": ["", "ASSISTANT:", stop]}
    hot = request(model, 2, SAMPLED)
    found = model.generate_until(
        [hot, request(model, 0), hot, request(model, 1, until), hot, request(model, 3), hot, hot]
    )
    assert found[1] == texts[rows[0]["id"]] and found[5] == texts[rows[3]["id"]]
    assert found[3] == texts[rows[1]["id"]][0]
    assert len({found[i] for i in (0, 2, 4, 6, 7)}) > 2


@pytest.mark.slow
def test_a_repeated_request_is_sampled_anew_and_does_not_depend_on_the_others(model):
    repeated = [request(model, 0, SAMPLED)] * 8
    found = model.generate_until(repeated)
    assert len(set(found)) > 3
    others = [request(model, i, SAMPLED) for i in (5, 3)]
    assert model.generate_until([*others, *repeated])[2:] == found


@pytest.mark.parametrize(
    ("kwargs", "sampling", "stops"),
    [
        ({}, (1024, 0.0, 1.0), ()),
        ({"until": "Q:", "temperature": None}, (1024, 0.0, 1.0), ("Q:",)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, (1024, 0.0, 1.0), ()),
        ({"temperature": 0, "top_p": 0}, (1024, 0.0, 1.0), ()),
        ({"temperature": 1, "top_p": 0.9, "max_new_tokens": 16}, (16, 1.0, 0.9), ()),
        ({"do_sample": True, "temperature": 0.2, "until": ["\n"]}, (1024, 0.2, 1.0), ("\n",)),
        ({"image_aspect_ratio": "original", "repetition_penalty": 1.0}, (1024, 0.0, 1.0), ()),
    ],
)
def test_generation_kwargs_choose_the_tokens(lmms, kwargs, sampling, stops):
    assert lmms.parse_kwargs(kwargs, TASK) == (sampling, stops)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "colours: generation_kwargs num_beams=4 is not supported; allowed are max_"),
        ({"top_k": 5}, "top_k=5"),
        ({"do_sample": True}, "do_sample=True needs a temperature above 0"),
        ({"do_sample": True, "temperature": 0}, "do_sample=True needs a temperature above 0"),
    ],
)  # fmt: skip
def test_generation_kwargs_that_would_be_ignored_are_refused(lmms, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        lmms.parse_kwargs(kwargs, TASK)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until_multi_round"])
def test_other_kinds_of_request_are_refused_by_name(model, kind):
    with pytest.raises(ConfigError, match=f"{kind} is not supported, which colours .* generate_u"):
        getattr(model, kind)([request(model, 0, kind=kind)])


@pytest.mark.slow
def test_what_is_no_picture_is_refused_by_name(model):
    with pytest.raises(ConfigError, match="colours/test/3 shows a str; only images"):
        model.generate_until([request(model, 0), request(model, 3, visuals=["film.mp4"])])


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ({"batch_size": "auto"}, {}, "--batch_size must be a number, 1 or more, got 'auto'"),
        ({"batch_size": "0"}, {}, "--batch_size must be a number"),
        ({}, {"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but one process drives all devices"),
        ({"checkpoint": "nowhere"}, {}, "'nowhere/config.json' does not exist"),
        ({"tensor": -2}, {}, "mesh: data, fsdp, tensor must be positive"),
    ],
)
def test_wrong_model_args_are_refused_before_anything_is_read(
    world, lmms, monkeypatch, arguments, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        lmms.VLMJax(**({"checkpoint": str(world.parent / "run")} | arguments))


def test_the_manifest_names_the_class(lmms):
    manifest = lmms.manifest()
    module, name = manifest.simple_class_path.rsplit(".", 1)
    assert manifest.model_id == "vlm_jax" and manifest.chat_class_path is None
    assert getattr(importlib.import_module(module), name) is lmms.VLMJax


TASK_YAML = """
task: tiny_colours
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function tiny_colours_utils.visuals
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
process_results: !function tiny_colours_utils.process_results
generation_kwargs: {{max_new_tokens: 3, temperature: 0, do_sample: false, num_beams: 1}}
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
"""
TASK_PY = """
import io
from PIL import Image

def visuals(doc):
    return [Image.open(io.BytesIO(doc["image"]))] if doc["image"] else []

def process_results(doc, results):
    return {"exact": float(results[0].lower() == doc["answer"].lower())}
"""


@pytest.mark.slow
@pytest.mark.skipif(not lmms_stand_in.INSTALLED, reason="lmms_eval is not installed here")
def test_the_command_of_lmms_eval_measures_what_our_evaluation_measures(world, ours, tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows, texts = ours
    records = [
        {
            "question": row["conversations"][-1]["value"].replace("<image>", "").strip(),
            "answer": row["answer"],
            "image": (world / row["image"]).read_bytes() if "image" in row else None,
        }
        for row in rows
    ]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "test.parquet")
    (tasks / "tiny_colours.yaml").write_text(TASK_YAML.format(data=tmp_path / "test.parquet"))
    (tasks / "tiny_colours_utils.py").write_text(TASK_PY)
    run = subprocess.run(
        [
            sys.executable, "-m", "lmms_eval", "--model", "vlm_jax", "--model_args", f"checkpoint={world.parent / 'run'}",
            "--batch_size", "4", "--tasks", "tiny_colours", "--include_path", str(tasks), "--output_path",
            str(tmp_path / "out"), "--log_samples",
        ],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (results,) = (tmp_path / "out").rglob("*_results.json")
    (samples,) = (tmp_path / "out").rglob("*_samples_tiny_colours.jsonl")
    right = [texts[row["id"]].lower() == row["answer"].lower() for row in rows]
    measured = json.loads(results.read_text())["results"]["tiny_colours"]["exact,none"]
    assert measured == pytest.approx(sum(right) / 14) and measured > 0
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    found = [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    assert found == [texts[row["id"]] for row in rows]
