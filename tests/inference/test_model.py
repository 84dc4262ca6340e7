"""A model from Python: one text whatever the method and whatever shares the batch; every source; mistakes in one line."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from askable import QUESTION, asked, evaluated, picture, write_run
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import vlm_jax
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.inference.batching import Words
from vlm_jax.settings.checks import ConfigError

BYTES = Backend(
    models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
)
BYTES.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES.decoder = decoders.ByteLevel()
ROOT = Path(__file__).resolve().parents[2]


def test_every_way_to_ask_gives_the_text_of_the_evaluation(model, run, world):
    expected = evaluated(run, world)
    assert len(set(expected)) >= 5 and all(expected), expected
    options = {"max_new_tokens": 12}
    assert [model.ask(*pair, **options) for pair in asked(world)] == expected
    assert model.ask_many(asked(world), rows=3, **options) == expected
    assert ["".join(model.stream(*pair, **options)) for pair in asked(world)] == expected
    assert [model.chat(image, **options).ask(question) for image, question in asked(world)] == expected  # fmt: skip


def test_a_run_of_packed_rows_with_few_pictures_is_asked_as_any_other(model, run, world, tmp_path):
    packed = shutil.copytree(run, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["data"] |= {"packing": True, "packed_images": 2}
    (packed / "config.json").write_text(json.dumps(config))
    asked_of = vlm_jax.load(packed)
    assert asked_of.ask_many(asked(world)) == model.ask_many(asked(world))
    image, question = asked(world)[0]
    assert asked_of.loss(image, question, "red") == pytest.approx(
        model.loss(image, question, "red")
    )


def test_a_drawn_answer_depends_on_its_seed_and_not_on_its_neighbours(model, world):
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    alone = [model.ask(*pair, seed=5, **options) for pair in asked(world)]
    assert model.ask_many(asked(world), seed=5, rows=3, **options) == alone
    assert alone != [model.ask(*pair, seed=6, **options) for pair in asked(world)]
    assert alone != [model.ask(*pair, max_new_tokens=12) for pair in asked(world)]


def test_another_question_compiles_nothing(model, world):
    image = picture(world, "red")
    model.ask(image, QUESTION, max_new_tokens=5)
    made = model.slots(1, 256)
    before = made.compilations
    assert before > 0
    for question in ("Is it bright ?", "Say one . " * 9, QUESTION):
        model.ask(image, question, max_new_tokens=9, temperature=0.5, seed=3)
    assert made.compilations == before


def test_a_picture_may_be_a_path_bytes_an_image_or_an_array(model, world):
    path = picture(world, "orange")
    image = Image.open(path)
    data = io.BytesIO()
    image.save(data, "PNG")
    given = [path, str(path), data.getvalue(), image, np.asarray(image)]
    assert len({model.ask(x, QUESTION, max_new_tokens=12) for x in given}) == 1


@pytest.mark.slow
def test_a_conversation_reads_only_what_is_new_and_answers_as_if_it_had_read_all(world, tmp_path):
    """The twin reads the whole conversation at every turn."""
    model = vlm_jax.load(write_run(tmp_path / "roomy", world, max_tokens=320))
    turns = [QUESTION, "Is it bright ?", "Say hello", "What is this ?"]
    chat = model.chat(picture(world, "blue"), max_new_tokens=6)
    widths, said = [], []
    for number, question in enumerate(turns):
        if number == 3:
            chat.show(picture(world, "red"))
        said.append(chat.ask(question))
        widths.append((chat.ticket.prompt.length, chat.ticket.prompt.images))
    assert [images for _, images in widths] == [1, 0, 0, 1]
    assert all(length < 20 for length, _ in widths[1:]), widths
    shown = [1, 1, 1, 2]
    for number, question in enumerate(turns):
        history = [*zip(turns[:number], said, strict=False), (question, None)]
        images = [str(picture(world, "blue")), str(picture(world, "red"))][: shown[number]]
        record = model.prompter.record(images, history, None, shown[: number + 1])
        ticket = model.ticket(None, "Say one", chat.sampling, 6)
        ticket.prompt = model.prompter.prompt(record, model.visual_tokens)
        batcher = model.batcher(1, 512)
        batcher.submit(ticket)
        batcher.run()
        assert model.text(ticket) == said[number], number


@pytest.mark.slow
def test_a_full_cache_is_read_anew_from_the_shortest_prompt(model, world):
    chat = model.chat(picture(world, "blue"), max_new_tokens=12)
    read = []
    with pytest.raises(ConfigError, match=r"the prompt has \d+ tokens, more than max_tokens 120"):
        for number in range(60):
            chat.ask(f"Is it bright ? {'Say one . ' * 3}")
            read.append(chat.ticket.prompt.images)
            assert len(chat.turns) == number + 1, "an empty answer"
    assert 1 in read[1:], "the conversation never outgrew the cache"
    assert number > 1


def test_a_reply_that_is_stopped_is_kept_as_far_as_it_came(model, world):
    chat = model.chat(picture(world, "blue"), max_new_tokens=12)
    whole = model.ask(picture(world, "blue"), QUESTION, max_new_tokens=12)
    pieces = chat.stream(QUESTION)
    first = next(pieces)
    pieces.close()
    assert whole.startswith(first) and chat.turns == [(QUESTION, first)]
    assert chat.ask("Say hello")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields"), [("m3", {}), ("mqt", {"num_heads": 2, "query_grid": 2})]
)
def test_an_elastic_model_shows_as_many_visual_tokens_as_asked_for(world, tmp_path, name, fields):
    run = write_run(tmp_path / name, world, name, **fields)
    model = vlm_jax.load(run)
    few = {"m3": 1, "mqt": 2}[name]
    assert model.visual_tokens == 4 and few in model.visual_token_choices
    options = {"max_new_tokens": 12}
    assert model.ask_many(asked(world), visual_tokens=few, **options) == evaluated(run, world, visual_tokens=few)  # fmt: skip
    assert [model.ask(*pair, visual_tokens=few, **options) for pair in asked(world)] == evaluated(run, world, visual_tokens=few)  # fmt: skip
    chat = model.chat(picture(world, "red"), visual_tokens=few, **options)
    assert chat.ask(QUESTION) == model.ask(picture(world, "red"), QUESTION, visual_tokens=few, **options)  # fmt: skip


def test_the_loss_is_that_of_training(model, world):
    """Against the logits of a whole training row."""
    from vlm_jax.data.records import parse
    from vlm_jax.data.rows import make_encoder
    from vlm_jax.models.vlm import VLM, Inputs

    raw = tiny.record("a", [f"<image>\n{QUESTION}", "red bright"], "images/red.png")
    record = parse(raw, "f", str(world), "0")
    row = make_encoder(model.opened.data, model.visual_tokens, model.config.vit, None)(record)
    batch = {name: jnp.asarray(x)[None] for name, x in row.items() if name != "ids"}
    logits = VLM(model.config).apply({"params": model.params}, Inputs.from_batch(batch))
    logp = np.asarray(jax.nn.log_softmax(logits)[0])
    taught = np.flatnonzero(row["loss_mask"])
    expected = -np.mean([logp[t - 1, row["tokens"][t]] for t in taught])
    assert len(taught) == 3
    assert model.loss(picture(world, "red"), QUESTION, "red bright") == pytest.approx(expected, rel=1e-4)  # fmt: skip


def test_a_token_map_is_drawn(model, world, tmp_path):
    figure = model.token_map(picture(world, "red"), QUESTION)
    figure.savefig(tmp_path / "map.png")
    assert QUESTION in figure.get_suptitle() and "1 visual token" in figure.get_suptitle()
    with Image.open(tmp_path / "map.png") as image:
        assert min(image.size) > 300


@pytest.mark.slow
def test_a_llava_directory_and_its_parts_are_loaded_as_the_run_they_were_made_of(world, tmp_path):
    run = write_run(tmp_path / "run", world, "identity", norm="none")
    for what in ("llava", "lm", "vit"):
        command = [sys.executable, "scripts/convert_hf.py", str(run), str(tmp_path / what), f"--what={what}"]  # fmt: skip
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    pair, options = (picture(world, "red"), QUESTION), {"max_new_tokens": 12, "system": ""}
    expected = vlm_jax.load(run).ask(*pair, **options)
    assert vlm_jax.load(tmp_path / "llava").ask(*pair, **options) == expected
    parts = {name: tmp_path / name for name in ("lm", "vit")}
    whole = vlm_jax.load(compressor=run, **parts)
    assert whole.ask(*pair, **options) == expected
    with pytest.raises(ConfigError, match="holds no projector"):
        vlm_jax.load(tmp_path / "lm")


def test_parts_of_runs_make_a_model(model, run, world):
    assembled = vlm_jax.load(compressor=run, lm=run, vit=run)
    pair = (picture(world, "red"), QUESTION)
    assert assembled.ask(*pair, max_new_tokens=8) == model.ask(*pair, max_new_tokens=8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, i: m.ask("/nowhere/a.jpg", "Why ?"), "question: image '/nowhere/a.jpg': the image file does not exist"),
        (lambda m, i: m.ask(b"no picture", "Why ?"), "question: not an image in a format Pillow knows."),
        (lambda m, i: m.ask(np.zeros((4, 4, 3)), "Why ?"), "an array must be uint8 [H W 3] or [H W], got float64 [4, 4, 3]"),
        (lambda m, i: m.ask("https://a.b/c.jpg", "Why ?"), "is a URL; download the picture and give its path"),
        (lambda m, i: m.ask(None, ""), "question 0 is empty and has no image"),
        (lambda m, i: m.ask(i, "Say " * 400), "the prompt has"),
        (lambda m, i: m.ask(i, "</s>"), "contains the control token '</s>'"),
        (lambda m, i: m.ask(i, "Why ?", temperature=-1), "temperature must be 0 (greedy) or more, got -1."),
        (lambda m, i: m.ask(i, "Why ?", top_p=2), "top_p must lie in (0, 1], got 2."),
        (lambda m, i: m.ask(i, "Why ?", max_new_tokens=0), "max_new_tokens must be 1 or more, got 0."),
        (lambda m, i: m.ask(i, "Why ?", visual_tokens=4), "tokenpacker gives the 1 it was trained for"),
        (lambda m, i: vlm_jax.load("/nowhere"), "load: '/nowhere' is no directory."),
        (lambda m, i: vlm_jax.load("org/name"), "hf download org/name"),
        (lambda m, i: vlm_jax.load(), "give a run or a model directory, load(DIR), or the parts"),
        (lambda m, i: vlm_jax.load("hdfs://a/b"), "cannot be used; paths are those of this machine"),
        (lambda m, i: vlm_jax.load(i.parent), "config.json' does not exist; give the workdir of a training run."),
        (lambda m, i: vlm_jax.load(i.parent, dtype="int8"), "dtype must be float32 or bfloat16, got 'int8'."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_is_right(model, world, call, message):
    with pytest.raises(ConfigError) as error:
        call(model, picture(world, "red"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_pieces_of_text_never_hold_half_a_character_nor_outer_white_space():
    text = Words(Tokenizer(BYTES, (), None, 0, ()))
    given = [text.add([BYTES.token_to_id(char)]) for char in BYTES.encode(" é  b ").tokens]
    assert given == ["", "", "é", "", "", "  b", ""]
    assert text.end() == ""


def test_the_package_is_imported_quickly_and_its_names_are_there():
    code = (
        "import sys, vlm_jax; assert not {'jax', 'numpy', 'flax'} & set(sys.modules);"
        "import vlm_jax.train; assert vlm_jax.train.train and vlm_jax.load and vlm_jax.fit and vlm_jax.start"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lod'; it has ConfigError"):
        vlm_jax.lod  # noqa: B018


@pytest.mark.slow
def test_a_training_a_law_and_a_plan_are_calls(world, tmp_path):
    trained = vlm_jax.start(tiny.config(world), tmp_path / "run", train__num_steps=2)
    assert trained.metrics["step"] == 2 and np.isfinite(trained.metrics["loss"])
    assert isinstance(trained.model().ask(picture(world, "red"), QUESTION, max_new_tokens=2), str)
    law = vlm_jax.fit("vlm_jax/laws/data/paper_reasoning.csv", draws=100)["reasoning"]
    assert 0.05 < law.alpha < 0.1 and law.beta < law.alpha
    plan = law.plan(gflops=1000, text_tokens=50)
    assert (plan.best.lm, plan.best.visual_tokens) == ("qwen1.5-7b", 16)
    with pytest.raises(ConfigError, match="give one of gflops, ms, dollars, gib"):
        law.plan(text_tokens=50)
    with pytest.raises(ConfigError, match="has no field 'steps'"):
        vlm_jax.start("stage1", tmp_path / "x", train__steps=2)
