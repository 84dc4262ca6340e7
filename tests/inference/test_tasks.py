"""Which answers of a workdir still count: those of the same weights, prompts and questions, by content. No model is loaded."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest
import tiny
from PIL import Image

from configs import eval as eval_config
from vlm_jax.benchmarks import predictions
from vlm_jax.inference import content, tasks
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.settings.checks import ConfigError, build
from vlm_jax.storage import checkpoint
from vlm_jax.storage import run as experiment


@pytest.fixture
def world(tmp_path):
    """Data, and a run whose checkpoint is three files of bytes."""
    data = tiny.write(tmp_path / "data")
    run = tmp_path / "run"
    save_weights(run, b"first")
    experiment.write(experiment.resolve(tiny.config(data)), run)
    return tmp_path


def save_weights(run, content):
    state = run / "checkpoints" / "6" / "state"
    (state / "d").mkdir(parents=True, exist_ok=True)
    for name, data in (("manifest.ocdbt", b"m"), ("d/0a", content), ("d/0b", b"same")):
        (state / name).write_bytes(data)


def settings(world, **fields):
    cfg = eval_config.get_config()
    given = {
        "checkpoint": str(world / "run"), "benchmarks": ("llava",), "annotations": (str(world / "data" / "data.json"),),
    }  # fmt: skip
    cfg.eval.update(given | fields)
    return build(EvalConfig, cfg.eval.to_dict())


def opened(world, **fields):
    (world / "out").mkdir(exist_ok=True)
    (task,) = tasks.open_tasks(settings(world, **fields), world / "out")
    return task


def answered(world, **fields):
    """A task all of whose questions are answered."""
    task = opened(world, **fields)
    task.keep([(row["id"], "red") for row in task.unanswered])
    return task


def records(task):
    return [line for _, line in predictions.read_lines(task.predictions)]


def edit(world, change):
    """Rewrites the annotations: `change` gets the list of records."""
    path = world / "data" / "data.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def refusal(world, **fields):
    before = (world / "out" / "llava" / "predictions.jsonl").read_bytes()
    with pytest.raises(ConfigError) as caught:
        opened(world, **fields)
    text = str(caught.value)
    assert "\n" not in text and text.endswith("; give another workdir, or delete it.")
    assert (world / "out" / "llava" / "predictions.jsonl").read_bytes() == before
    folder = f"--workdir: '{world / 'out' / 'llava'}' "
    assert text.startswith(folder)
    return text.removeprefix(folder).removesuffix("; give another workdir, or delete it.")


def test_answers_count_while_nothing_changes_also_for_a_moved_run_and_a_moved_file(world):
    assert len(answered(world).unanswered) == 14
    assert opened(world).unanswered == []
    shutil.move(world / "run", world / "elsewhere")
    shutil.copytree(world / "data", world / "copy")
    moved = {"checkpoint": str(world / "elsewhere"), "image_roots": (str(world / "copy"),)}
    assert opened(world, annotations=(str(world / "copy" / "data.json"),), **moved).unanswered == []


def test_answers_of_weights_trained_anew_at_the_same_path_are_refused(world):
    answered(world)
    shutil.rmtree(world / "run" / "checkpoints")
    save_weights(world / "run", b"other")  # as many bytes, the same step
    assert refusal(world) == (
        f"holds answers of other weights: '{world / 'run'}' was trained since, or is another run"
    )


@pytest.mark.parametrize("part", ["system", "tokenizer", "model"])
def test_answers_to_prompts_that_are_worded_or_read_otherwise_now_are_refused(world, part):
    answered(world)
    if part == "tokenizer":
        path = world / "data" / "tokenizer" / "tokenizer.json"
        path.write_text(path.read_text().replace('"colour"', '"Colour"'))
    else:
        path = world / "run" / "config.json"
        saved = json.loads(path.read_text())
        if part == "system":
            saved["data"]["system"] = "Answer in one word."
        else:
            saved["model"]["lm"]["norm_eps"] = 1e-5
        path.write_text(json.dumps(saved))
    assert refusal(world) == (
        f"holds answers made with another model or prompt: config.json or the tokenizer of '{world / 'run'}' changed since"
    )


def test_a_changed_word_or_picture_and_a_question_that_is_gone_are_refused_by_the_first_name(world):
    answered(world)

    def two(records):
        records[0]["conversations"][0]["value"] = "<image>\nWhat is this ?"
        del records[8]  # hello

    edit(world, two)
    assert refusal(world) == (
        "answers 14 questions, of which 2 have other words or pictures now, or are gone (first 'red/0')"
    )


def test_another_picture_under_the_same_name_is_another_question(world):
    answered(world)
    Image.new("RGB", (24, 16), (1, 2, 3)).save(world / "data" / "images" / "blue.png")
    assert "of which 1 have other words or pictures now" in refusal(world)
    (world / "data" / "images" / "blue.png").unlink()
    assert "(first 'blue/0')" in refusal(world)


def test_only_new_questions_are_asked_and_a_changed_gold_answer_asks_nothing(world):
    answered(world)

    def more(records):
        records[0]["conversations"][1]["value"] = "crimson"
        records.append(tiny.record("new", ["Say one", "one"]))

    edit(world, more)
    task = opened(world)
    assert [row["id"] for row in task.unanswered] == ["new/0"]
    assert next(row["answer"] for row in task.rows if row["id"] == "red/0") == "crimson"


def test_fields_that_the_run_ignores_are_no_part_of_a_question(world):
    def more(note):
        def change(records):
            for record in records:
                record["weight"] = note

        edit(world, change)

    cfg = tiny.config(world / "data")
    cfg.data.ignored_fields = ("weight",)
    experiment.write(experiment.resolve(cfg), world / "run")
    more(0.5)
    assert len(answered(world).unanswered) == 14
    more(0.25)
    assert opened(world).unanswered == []


def test_replies_to_choose_from_are_part_of_a_question(world):
    row = {**opened(world).rows[0], "replies": ("A", "B")}
    given = (row, str(world / "data"), None)
    marks = [content.of_question(*given, replies) for replies in (None, ("A", "B"), ("B", "A"))]
    assert len(set(marks)) == 3
    assert content.of_question({**row, "answer": "x"}, *given[1:], ("A", "B")) == marks[1]


def test_settings_of_a_failed_evaluation_do_not_bind_the_next_one(world):
    opened(world, max_new_tokens=5)  # and nothing was answered
    answered(world, max_new_tokens=7)
    assert refusal(world, max_new_tokens=5) == ("holds answers made with max_new_tokens = 7, now 5")


@pytest.mark.parametrize("kind", ["none", "of version 0.1"])
def test_answers_without_a_fingerprint_are_refused(world, kind):
    task = answered(world)
    path = task.folder / "run.json"
    if kind == "none":
        path.unlink()
    else:
        old = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in old.items() if k not in content.PARTS}))
    assert refusal(world) == (
        "holds answers of which no run.json says by which weights they were made (an older version wrote none that does)"
    )


@pytest.mark.parametrize("content", [b"[1]", b'{"weights": ', b"\xff\xfe{", b"[" * 100_000])
def test_a_damaged_run_json_is_one_line(world, content):
    path = answered(world).folder / "run.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        opened(world)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_predictions_hold_question_and_gold_on_request_and_are_read_as_before(world):
    task = answered(world, with_questions=True)
    record = records(task)[0]
    assert record == {
        "id": "red/0", "text": "red", "asked": task.mark(task.rows[0]), "question": "<image>\nWhat colour is this ?",
        "gold": "red",
    }  # fmt: skip
    assert predictions.read(task.predictions)[0] == ("red/0", "red")
    assert opened(world).unanswered == []


def test_a_lone_surrogate_beside_an_answer_is_kept(tmp_path):
    path = tmp_path / "predictions.jsonl"
    predictions.append(path, [("a", "x")], {"a": {"question": "Say \ud800"}})
    ((_, line),) = predictions.read_lines(path)
    assert line == {"id": "a", "text": "x", "question": "Say \ud800"}


def test_pictures_are_looked_for_where_image_roots_says_else_beside_the_annotations(world):
    two = {"benchmarks": ("llava", "mini_ocr"), "annotations": (str(world / "data"),) * 2}
    given = settings(world, **two, image_roots=("", str(world)))
    assert [given.image_root(i) for i in (0, 1)] == [str(world / "data"), str(world)]
    assert settings(world).image_root(0) == str(world / "data")
    with pytest.raises(ConfigError, match="2 benchmarks but 1 image_roots; give one folder per"):
        settings(world, **two, image_roots=("",))
    with pytest.raises(ConfigError, match="eval: image_roots '/nowhere' does not exist; give the"):
        opened(world, image_roots=("/nowhere",))


def test_a_large_file_is_told_by_its_size_and_by_blocks_all_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "WHOLE", 1000)
    monkeypatch.setattr(content, "BLOCK", 50)
    data = bytearray(2000)
    path, marks = tmp_path / "file", []
    for position in (None, 0, 1999, 1050):
        changed = bytearray(data)
        if position is not None:
            changed[position] = 1
        path.write_bytes(changed)
        marks.append(content._file(path))
    path.write_bytes(data + b"\0")
    assert len({*marks, content._file(path)}) == 5


def test_the_same_weights_saved_twice_are_two_trainings(tmp_path):
    """Orbax names its files by random numbers: what `content.run` relies on where blocks are sampled."""
    data, marks = tiny.write(tmp_path / "data"), []
    for name in ("a", "b"):
        checkpoint.save_params(tmp_path / name, {"kernel": jnp.arange(12.0)})
        experiment.write(experiment.resolve(tiny.config(data)), tmp_path / name)
        marks.append(content.of_run(str(tmp_path / name)))
    names = [{p.name for p in (tmp_path / name).rglob("d/*")} for name in ("a", "b")]
    assert names[0] and not names[0] & names[1]
    assert marks[0]["weights"] != marks[1]["weights"] and marks[0]["prompts"] == marks[1]["prompts"]


def test_every_setting_of_an_answer_is_compared(world):
    """A field that is added to the settings is thought about: it is compared, or named here."""
    free = {"checkpoint", "benchmarks", "annotations", "image_roots", "batch_size", "limit", "features_dir", "with_questions"}  # fmt: skip
    compared = json.loads((opened(world).folder / "run.json").read_text()).keys()
    assert {f.name for f in dataclasses.fields(EvalConfig)} - free <= compared
