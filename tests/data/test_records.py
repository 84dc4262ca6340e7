"""What a record may hold: every field is read as it says, or the record is bad and the field named."""

import base64
import io
import json
import logging

import numpy as np
import pytest
import tiny
from PIL import Image

from vlm_jax import benchmarks
from vlm_jax.data import eval_batches as prompts
from vlm_jax.data import pipeline, records, sources
from vlm_jax.data.records import BadRecord, Turn
from vlm_jax.data.rows import make_chat
from vlm_jax.storage import run as experiment


def parse(raw, generate=False, **options):
    return records.parse(raw, "a.json", "/images", "#3", generate=generate, **options)


def talk(*said, keys=("from", "value"), **fields):
    names = {"from": ("human", "gpt"), "role": ("user", "assistant")}[keys[0]]
    messages = [
        text if isinstance(text, dict) else {keys[0]: names[i % 2], keys[1]: text}
        for i, text in enumerate(said)
    ]
    return {"conversations": messages, **fields}


def reason(raw, **options):
    with pytest.raises(BadRecord) as caught:
        parse(raw, **options)
    return caught.value.reason


def test_images_are_named_by_either_field():
    question = "<image> or <image> ?"
    for fields in ({"images": ["a.png", "b.png"]}, {"image": ["a.png", "b.png"], "images": None}):
        assert parse(talk(question, "a", **fields)).images == ("a.png", "b.png")
    both = {"image": "a.png", "images": ["a.png"]}
    assert parse(talk("<image>\nWhat?", "a", **both)).images == ("a.png",)
    assert reason(talk("<image>\nWhat?", "a", image="a.png", images=["b.png"])) == (
        "its pictures are named by 'image' and 'images'; keep one of them"
    )
    assert reason(talk("What?", "a", images=["b.png"])) == (
        "0 <image> placeholders in human turns but 1 images (in 'images'); write <image> where each stands"
    )


def test_the_system_prompt_is_a_field_or_the_first_message():
    first = {"from": "system", "value": "Be brief."}
    assert parse(talk("Why?", "So.", system="Be brief.")).system == "Be brief."
    assert parse(talk("Why?", "So.", system="")).system == ""  # none, whatever the template says
    assert parse(talk("Why?", "So.", system=None)).system is None
    both = {"conversations": [first, *talk("Why?", "So.")["conversations"]]}
    assert parse({**both, "system": "Be brief."}).system == "Be brief."
    assert "two system prompts" in reason({**both, "system": "Be long."})
    assert reason(talk("Why?", "So.", system=["x"])) == "'system' must be a string, got ['x']"


@pytest.mark.parametrize("name", ["loss", "weight", "train"])
def test_an_answer_of_weight_0_is_not_learnt(name):
    for off, on in ((False, True), (0, 1), (0.0, 1.0)):
        said = [
            {"from": "gpt", "value": "hello", name: off}, {"from": "gpt", "value": "one", name: on},
        ]  # fmt: skip
        raw = talk("Say hello", said[0], "Say one", said[1])
        assert [turn.learnt for turn in parse(raw).turns] == [False, True]
        raw["conversations"][1][name] = None
        assert [turn.learnt for turn in parse(raw).turns] == [True, True]


def test_weights_that_cannot_be_followed_are_named():
    def answer(**fields):
        return talk("Why?", {"from": "gpt", "value": "So.", **fields})

    assert (
        reason(answer(weight=0.5)) == "message 1: 'weight' must be 0 or 1 (false or true), got 0.5"
    )
    assert "'loss' must be 0 or 1" in reason(answer(loss="no"))
    assert "'loss' and 'weight' contradict" in reason(answer(loss=True, weight=0))
    assert reason(answer(loss=False)).startswith("none of its answers is learnt")
    asked = {"from": "human", "value": "Why?", "train": True}
    assert "only answers are learnt" in reason(talk(asked, "So."))
    assert parse(talk({**asked, "train": False}, "So.")).turns[0].learnt
    for name in ("loss", "weight"):
        assert f"field '{name}' is not read" in reason(talk("Why?", "So.", **{name: 0}))
        assert parse(talk("Why?", "So.", **{name: 1})).turns[0].learnt


def test_messages_with_role_and_content_are_read():
    said = talk("<image>\nWhy?", "So.", keys=("role", "content"))["conversations"]
    raw = {"messages": [{"role": "system", "content": "Be brief."}, *said], "images": ["a.png"]}
    r = parse(raw)
    assert (r.system, r.images, r.turns) == ("Be brief.", ("a.png",), (Turn(1, "Why?", "So."),))
    raw["conversations"] = talk("<image>\nWhy?", "So.")["conversations"]
    raw["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    assert parse(raw) == r  # the same twice, in two styles
    raw["conversations"][2]["weight"] = 1
    assert parse(raw) == r  # what is read may say more
    raw["messages"][2]["weight"] = 0
    assert "'conversations' and 'messages' differ" in reason(raw)
    del raw["messages"][2]["weight"]
    raw["conversations"][1]["value"] = "<image>\nWhat?"
    assert "'conversations' and 'messages' differ" in reason(raw)
    assert "expected 'user' or 'assistant'" in reason(
        {"messages": [{"role": "tool", "content": "x"}]}
    )


def test_content_in_parts_is_text_and_pictures_in_their_order():
    def asked(*parts, **fields):
        reply = {"role": "assistant", "content": [{"type": "text", "text": "So."}]}
        return {"messages": [{"role": "user", "content": list(parts)}, reply], **fields}

    picture, text = {"type": "image"}, {"type": "text", "text": "Why?"}
    assert parse(asked(picture, text, images=["a"])).turns == (Turn(1, "Why?", "So."),)
    assert parse(asked(picture, picture, text, images=["a", "b"])).turns == (
        Turn(2, "Why?", "So."),
    )
    one, two = {"type": "text", "text": "One "}, {"type": "text", "text": ", two "}
    r = parse(asked(one, picture, two, picture, images=["a", "b"]))
    assert r.turns == (Turn(2, "One , two ", "So.", places=(4, 10)),)
    own = (
        {"type": "image", "image": "file:///x/a.png"},
        {"type": "image_url", "image_url": {"url": "b.png"}},
    )
    assert parse(asked(*own, text)).images == ("/x/a.png", "b.png")
    assert "named by 'images' and 'messages'" in reason(asked(*own, text, images=["c", "d"]))
    assert "part of type 'video'" in reason(asked({"type": "video", "video": "v.mp4"}, text))
    assert "the text of a part must be a string" in reason(asked({"type": "text", "text": None}))


HARMLESS = {
    "id": "7", "source": "coco", "dataset": "vqa", "metadata": {"image": "x.png", "role": "a"}, "width": 3, "height": 2,
    "split": "train", "question_id": 3, "image_id": "00042", "image_size": [640, 480], "height_list": [1, 2], "type": "caption",
    "url": "https://x.org/a.jpg", "question": "Why?", "answer": "So.", "tools": [], "video": None, "videos": "", "mask_history": False,
    "score": 0.5, "license": "CC-BY", "num_frames": 8, "bbox": [[0, 1, 2, 3]], "audio": float("nan"),
}  # fmt: skip


def test_fields_that_cannot_change_what_is_learnt_are_passed_over():
    assert parse(talk("Why?", "So.", **HARMLESS)).turns == (Turn(0, "Why?", "So."),)
    seen = {"image": "a.png", "image_path": "/data/a.png", "img_url": "https://x.org/a.png"}
    assert parse(talk("<image>Why?", "So.", **seen)).images == ("a.png",)


CHANGES = {
    "video": "v.mp4", "videos": ["v.mp4"], "video_path": "v.mp4", "audio": {"path": "a.wav"}, "audios": ["a.wav"],
    "image_path": "a.png", "imageFile": "a.JPG", "img": "a", "picture": {"bytes": "aGk="}, "depth": "d.png", "mask": "m.png",
    "frames": ["0.jpg", "1.jpg"], "tools": [{"name": "f"}], "functions": "[1]", "mask_history": True, "loss_mask": [0, 1],
    "sample_weight": 0.5, "weight": 2, "trainable": 1, "history": [["Hi", "Hello"]], "system_prompt": "Be brief.",
    "chosen": {"from": "gpt", "value": "b"}, "rejected_response": "c", "dialogue": [{"role": "user", "content": "x"}],
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_could_change_what_is_learnt_is_named(name):
    raw = talk("Why?", "So.", **{name: CHANGES[name]})
    assert f"field {name!r} is not read, but " in reason(raw)
    assert parse(raw, ignored=(name,)).turns == (Turn(0, "Why?", "So."),)


def test_a_field_of_a_message_is_named_too():
    for name, value in (("images", ["a.png"]), ("tool_calls", [{}]), ("reasoning_content", "Hm.")):
        said = {"from": "gpt", "value": "So.", name: value}
        assert f"message 1: field {name!r} is not read, but " in reason(talk("Why?", said))
    said = {"from": "gpt", "value": "So.", "markdown": None, "name": "Ann", "tool_calls": None}
    assert parse(talk("Why?", said)).turns[0].answer == "So."


def png(size=(2, 2)):
    file = io.BytesIO()
    Image.new("RGB", size, (250, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_an_image_is_a_path_or_encoded_bytes():
    encoded = base64.b64encode(png()).decode()
    raw = talk("<image>Why?", "So.", image=f"data:image/png;base64,{encoded}")
    assert parse(raw).images == (png(),)
    bad = {
        "data:image/png;base64,@@": "no valid base64", "data:image/svg+xml,<svg/>": "not in base64",
        "https://x.org/a.png": "is a URL; download the picture", "S3://b/a.png": "is a URL", " ": "is an empty path",
    }  # fmt: skip
    for image, message in bad.items():
        assert message in reason({**raw, "image": image})
    for image in (3, 0.5, True, {"path": "a.png"}, [["a.png"]]):
        assert "'image' must be a path or a list of paths" in reason({**raw, "image": image})
    absolute = {**raw, "image": "/elsewhere/a.png"}
    assert records.parse(absolute, "a.json", "", "0").images == ("/elsewhere/a.png",)


def test_pictures_inside_the_text_of_qwen_vl_are_named():
    assert "names a picture by <img>" in reason(talk("Picture 1: <img>a.png</img>\nWhy?", "So."))


def test_an_id_is_a_string_or_a_number():
    assert parse(talk("Why?", "So.", id=None)).id == "#3"
    assert (
        reason(talk("Why?", "So.", id={"a": 1}))
        == "'id' must be a string or a number, got {'a': 1}"
    )


# --- rows -------------------------------------------------------------------------------------------------------------


def words(row, directory):
    """The row's tokens as words; `[i]` for image i, a star behind what is learnt."""
    file = json.loads((directory / "tokenizer" / "tokenizer.json").read_text())
    names = {i: word for word, i in file["model"]["vocab"].items()}
    loss = row.get("loss_mask", np.zeros(len(row["tokens"]), bool))
    columns = zip(row["tokens"], row["visual_index"], loss, row["segments"], strict=True)
    return " ".join(
        (f"[{v}]" if v >= 0 else names[int(t)]) + "*" * bool(learnt)
        for t, v, learnt, s in columns
        if s >= 0
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("records") / "data")


def write(directory, name, *raws, lines=True):
    path = directory / name
    path.write_text("\n".join(map(json.dumps, raws)) if lines else json.dumps(raws))
    return path


def experiment_for(data, path, **fields):
    c = tiny.config(data)
    c.data.update({"annotations": (str(path),), "max_images": 3, "batch_size": 1} | fields)
    return experiment.resolve(c)


SEVERAL = talk(
    "What is <image> ? <image> is this", "red", "<image> this ?", "No",
    id="1", images=["images/red.png", "images/blue.png", "images/green.png"],
)  # fmt: skip


def test_pictures_stand_where_their_placeholders_stand_in_rows_and_in_prompts(data):
    path = write(data, "several.jsonl", SEVERAL)
    exp = experiment_for(data, path)
    with_rows = next(pipeline.train_iterator(exp.data, 1, exp.model.vit))
    row = {name: with_rows[name][0] for name in ("tokens", "visual_index", "loss_mask", "segments")}
    # One picture of a turn stands first wherever it is written, as in LLaVA; of several each stays.
    assert words(row, data) == (
        "<s> USER : What is [0] ? [1] is this ASSISTANT : red* </s>* USER : [2] this ? ASSISTANT : No* </s>*"
    )
    colours = with_rows["images"][0, :, 8, 8]
    assert [tuple(c) for c in colours] == [tiny.COLOURS[n] for n in ("red", "blue", "green")]

    asked = {**SEVERAL, "conversations": SEVERAL["conversations"][:1]}
    asked["images"] = SEVERAL["images"][:2]
    found = prompts.prepare([asked], str(data), exp.data, 1, exp.model.vit, 1)
    batch = next(found.batches)
    row = {name: batch[name][0] for name in ("tokens", "visual_index", "segments")}
    assert words(row, data) == "<s> USER : What is [0] ? [1] is this ASSISTANT :"
    colours = batch["images"][0, :2, 8, 8]
    assert [tuple(c) for c in colours] == [tiny.COLOURS[n] for n in ("red", "blue")]


@pytest.mark.parametrize("exif_rotation", [False, True])
def test_exif_rotation_holds_in_rows_and_in_prompts(data, exif_rotation):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture = Image.new("RGB", (16, 16), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 16, 8))
    picture.save(data / "turned.png", exif=exif)
    raw = talk("<image>\nWhat?", "red", image="turned.png")
    exp = experiment_for(data, write(data, "exif.jsonl", raw), exif_rotation=exif_rotation)
    row = next(pipeline.train_iterator(exp.data, 1, exp.model.vit))
    asked = {**raw, "conversations": raw["conversations"][:1]}
    batch = next(prompts.prepare([asked], str(data), exp.data, 1, exp.model.vit, 1).batches)
    for images in (row["images"], batch["images"]):
        assert tuple(images[0, 0, 0, 0]) == ((255, 0, 0) if exif_rotation else (0, 0, 255))


@pytest.mark.parametrize("turns", ["dialogue", "independent"])
def test_an_answer_that_is_not_learnt_is_still_read(data, turns):
    said = {"from": "gpt", "value": "hello", "loss": False}
    raw = talk("Say hello", said, "Say one", "one", system="Say .")
    exp = experiment_for(data, write(data, "loss.jsonl", raw), turns=turns)
    row = make_chat(exp.data, 1).encode(sources.open_source(exp.data)[0])._asdict()
    assert words(row, data) == (
        "<s> Say . USER : Say hello ASSISTANT : hello </s> "
        + ("USER : " if turns == "dialogue" else "")  # else it is shared
        + "Say one ASSISTANT : one* </s>*"
    )


def test_independent_turns_cannot_share_pictures_inside_a_question(data):
    raw = talk("<image> ? <image>", "red", "Why?", "one", images=["images/red.png"] * 2)
    exp = experiment_for(data, write(data, "shared.jsonl", raw), turns="independent")
    chat = make_chat(exp.data, 1)
    record = sources.open_source(exp.data)[0]
    with pytest.raises(BadRecord, match="an image stands inside the first question"):
        chat.encode(record)
    raw["conversations"] = raw["conversations"][:2]
    exp = experiment_for(data, write(data, "alone.jsonl", raw), turns="independent")
    row = chat.encode(sources.open_source(exp.data)[0])._asdict()
    assert words(row, data) == "<s> USER : [0] ? [1] ASSISTANT : red* </s>*"


def test_fields_that_are_not_read_are_listed_once(data, caplog):
    raws = [talk("Say one", "one", id=str(i), source="a", width=i) for i in range(3)]
    bad = talk("Say one", "one", video="v.mp4", split="x")
    path = write(data, "extra.jsonl", *raws, bad, talk("Say one", "one", licence="x"))
    exp = experiment_for(data, path, on_bad_record="skip")
    with caplog.at_level(logging.INFO, logger="vlm_jax.data.sources"):
        next(pipeline.train_iterator(exp.data, 1, exp.model.vit))
    assert [r.message for r in caplog.records] == [
        f"{path}: fields that are not read: source, width, licence"
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_file_in_another_encoding_is_named(tmp_path, encoding, name):
    path = tmp_path / name
    path.write_bytes(json.dumps([talk("Why?", "So.")]).encode(encoding))
    with pytest.raises(records.ConfigError, match=r"is UTF-16 or UTF-32; save it as UTF-8\.$"):
        sources.JsonSource(str(path), "")


HURT = [
    (b'{"id": 1, "conversations": "\xe9"}', "'utf-8' codec can't decode byte 0xe9"),
    (b"[" * 100_000, "cannot be parsed: maximum recursion depth"),
    (b'{"id": ' + b"9" * 5000 + b"}", "cannot be parsed: Exceeds the limit"),
    (b'{"id": 1, "conversations": NaN}', "has no list 'conversations': it is nan"),
    (b"3", "expected an object, got int"),
]


@pytest.mark.parametrize(("line", "message"), HURT, ids=[message for _, message in HURT])
def test_a_damaged_line_is_a_bad_record(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"conversations": []}\n' + line)
    source = sources.JsonSource(str(path), "")
    with pytest.raises(BadRecord, match="has no human turn"):
        source[0]
    with pytest.raises(BadRecord) as caught:
        source[1]
    assert message in caught.value.reason
    assert caught.value.record_id in ("1", "line 2")


# --- the same records as a benchmark ----------------------------------------------------------------------------------


def test_the_llava_benchmark_reads_the_same_fields(data):
    said = [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "<image> this ?"},
        {"role": "assistant", "content": "No"},
    ]  # fmt: skip
    raw = {
        "id": "1",
        "system": "Say .",
        "messages": said,
        "images": SEVERAL["images"],
        "source": "x",
    }
    single = talk(
        "Say one", "one", "<image>\nWhat is this ?", "blue", image="images/blue.png", id="2"
    )
    path = write(data, "asked.json", raw, single, lines=False)
    rows = benchmarks.get("llava").rows(path)
    assert [(row["id"], row["answer"]) for row in rows] == [
        ("1/0", "red"), ("1/1", "No"), ("2/0", "one"), ("2/1", "blue"),
    ]  # fmt: skip
    exp = experiment_for(data, path)
    told = []
    for row in rows:
        batch = next(prompts.prepare([row], str(data), exp.data, 1, exp.model.vit, 1).batches)
        told.append(words({name: batch[name][0] for name in batch if name != "ids"}, data))
    assert told == [
        "<s> Say . USER : What is [0] [1] ASSISTANT :",
        "<s> Say . USER : What is [0] [1] ASSISTANT : red </s> USER : [2] this ? ASSISTANT :",
        "<s> USER : Say one ASSISTANT :",
        "<s> USER : Say one ASSISTANT : one </s> USER : [0] What is this ? ASSISTANT :",
    ]


def test_the_llava_benchmark_names_a_field_that_could_change_the_answer(data):
    path = write(data, "video.json", talk("Say one", "one", id="v", video="v.mp4"), lines=False)
    (row,) = benchmarks.get("llava").rows(path)
    exp = experiment_for(data, path)
    with pytest.raises(BadRecord, match="record v/0: field 'video' is not read"):
        prompts.prepare([row], str(data), exp.data, 1, exp.model.vit, 1)


@pytest.mark.parametrize("name", ["id", "image", "video", "system", "conversations", "anything"])
def test_a_value_of_too_many_levels_is_a_bad_record_or_passed_over(name):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    raw = {**talk("Why?", "So."), name: deep}
    if name == "anything":
        assert parse(raw).turns == (Turn(0, "Why?", "So."),)
    else:
        assert reason(raw) == "a value in it has too many levels"
