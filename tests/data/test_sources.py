"""Records of JSON, JSON lines and tfds, and every way one can be bad: named with file, record and reason."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tfds_builder
from refs import tokenizers

from vlm_jax.data import sources
from vlm_jax.data.records import BadRecord, Turn, parse
from vlm_jax.data.sources import JsonSource, TfdsSource
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import DataConfig


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def talk(*messages, **fields):
    return {"id": "r1", "conversations": list(messages), **fields}


def record(raw, **options):
    return parse(raw, "a.json", "/images", "#3", **options)


def test_several_images_stand_where_their_placeholders_stand():
    raw = talk(
        human("Look <image>\nand <image> here"),
        gpt("ok"),
        human(" Why? "),
        gpt(" yes "),
        image=["a.png", "b.png"],
    )
    r = record(raw)
    assert r.turns == (
        Turn(2, "Look \nand  here", "ok", places=(5, 10)),
        Turn(0, " Why? ", "yes "),
    )
    assert (r.id, r.images, r.system) == ("r1", ("a.png", "b.png"), None)


def test_one_image_may_be_a_string_and_no_image_may_be_null():
    assert record(talk(human("<image>"), gpt("ok"), image="a.png")).images == ("a.png",)
    assert record(talk(human("Why?"), gpt("ok"), image=None)).images == ()


def test_a_leading_answer_is_dropped_and_a_system_message_kept():
    r = record(talk({"from": "system", "value": "be kind"}, gpt("hello"), human("Why?"), gpt("ok")))
    assert r.system == "be kind" and r.turns == (Turn(0, "Why?", "ok"),)


def test_a_record_without_id_is_named_by_its_place():
    assert record({"conversations": [human("Why?"), gpt("ok")]}).id == "#3"
    assert record({"id": 7, "conversations": [human("Why?"), gpt("ok")]}).id == "7"


BAD = [
    (["no"], "expected an object, got list"),
    ({"id": "r1"}, "no list 'conversations'"),
    (talk(), "has no human turn"),
    (talk(gpt("hello")), "has no human turn"),
    (talk(human("a"), human("b"), gpt("c")), "two turns in a row are from 'human'"),
    (talk(human("a"), gpt("b"), gpt("c")), "two turns in a row are from 'gpt'"),
    (talk(human("a"), gpt("b"), human("c")), "the last turn is from 'human'; expected 'gpt'"),
    (talk({"from": "user", "value": "a"}, gpt("b")), "message 0 is from 'user'"),
    (talk(human("a"), gpt("b"), {"from": "system", "value": "x"}), "message 2 is from 'system'"),
    (talk(human("a"), {"from": "gpt"}), "message 1 needs 'from' and 'value'"),
    (talk(human("a"), {"from": "gpt", "value": None}), "message 1: 'value' must be a string"),
    (talk(human("a"), gpt(" \n")), "answer 0 is empty"),
    (talk(human("a"), gpt("b"), human("  "), gpt("c")), "question 1 is empty and has no image"),
    (talk(human("a"), gpt("see <image>"), image="a.png"), "answer 0 contains <image>"),
    (talk(human("a"), gpt("b"), image="a.png"), "0 <image> placeholders in human turns but 1 images"),
    (talk(human("<image>a"), gpt("b")), "1 <image> placeholders in human turns but 0 images"),
    (talk(gpt("<image>"), human("a"), gpt("b"), image="a.png"), "0 <image> placeholders"),
    (talk(human("<image>a"), gpt("b"), image=3), "'image' must be a path"),
]  # fmt: skip


@pytest.mark.parametrize("raw, reason", BAD, ids=[reason for _, reason in BAD])
def test_a_bad_record_is_named(raw, reason):
    with pytest.raises(BadRecord) as caught:
        record(raw)
    assert reason in caught.value.reason
    name = "r1" if isinstance(raw, dict) else "#3"
    assert str(caught.value) == f"data: a.json: record {name}: {caught.value.reason}"
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError)


def test_an_image_without_a_folder_is_bad():
    with pytest.raises(BadRecord, match=r"image_roots entry is empty"):
        parse(talk(human("<image>"), gpt("b"), image="a.png"), "a.json", "", "0")


def test_a_question_to_answer_ends_with_the_human():
    r = record(talk(human("<image>a"), gpt("b"), human("c"), image="a.png"), generate=True)
    assert r.turns == (Turn(1, "a", "b"), Turn(0, "c", None))
    with pytest.raises(BadRecord, match="the last turn is from 'gpt'; expected 'human'"):
        record(talk(human("a"), gpt("b")), generate=True)


def test_a_bad_record_survives_pickling():
    error = pickle.loads(pickle.dumps(BadRecord("a.json", "r1", "why")))
    assert (error.file, error.record_id, error.reason) == ("a.json", "r1", "why")


RECORDS = [
    {"id": "é", "conversations": [human("Wie heißt \u2603 \U0001f600?"), gpt("x\ny")]},
    {"id": 'q"]},[', "conversations": [human("b\\"), gpt("y")]},
    {"conversations": [human("c"), gpt("z")]},
]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_records_are_found_by_their_bytes(tmp_path, ascii_only, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    source = JsonSource(str(path), "")
    assert len(source) == 3
    assert [source[i].id for i in (2, 0, 1)] == ["#2", "é", 'q"]},[']
    assert source[0].turns[0] == Turn(0, "Wie heißt \u2603 \U0001f600?", "x\ny")


def test_json_lines_skip_blank_lines_and_name_the_bad_one(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps(RECORDS[0]),
        "",
        "{broken",
        json.dumps(RECORDS[2], ensure_ascii=False),
        "   ",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    source = JsonSource(str(path), "")
    assert len(source) == 3
    assert (source[0].id, source[2].id) == ("é", "line 4")
    with pytest.raises(BadRecord, match=r"a\.jsonl: record line 3: cannot be parsed"):
        source[1]


CORRUPT = [
    ('{"id": 1}', "#0 (line 1): expected a JSON list"),
    ('[{"a": 1},\n{"b": }]', "#1 (line 2): cannot be parsed: Expecting value"),
    ('[{"a": 1},\n{"b": 2}', "#2 (line 2): cannot be parsed: expected ',' or ']'"),
    ('[{"a": 1} {"b": 2}]', "#1 (line 1): cannot be parsed: expected ','"),
    ("", "#0 (line 1): expected a JSON list"),
]


@pytest.mark.parametrize("text, message", CORRUPT)
def test_a_damaged_json_file_is_refused_at_once(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BadRecord) as caught:
        JsonSource(str(path), "")
    assert message in str(caught.value)


def test_a_source_travels_and_is_read_by_many_threads_at_once(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS))
    source = JsonSource(str(path), "")
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: JsonSource(str(path), "")[2], range(40)))
        found += pool.map(lambda _: source[2], range(200))
    assert all(record == source[2] for record in found)


def test_a_file_cut_short_while_it_is_read_is_a_bad_record(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS))
    source = JsonSource(str(path), "")
    assert source[0].id == "é"
    path.write_text("[]")
    with pytest.raises(BadRecord, match="#2: cannot be parsed"):
        source[2]


def png():
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (9, 8, 7)).save(stream, "PNG")
    return stream.getvalue()


def test_tfds_dialogues_are_records_with_encoded_images(tmp_path):
    def features(f):
        turn = {"from": f.Text(), "value": f.Text()}
        return {"id": f.Text(), "image": f.Image(), "conversations": f.Sequence(turn)}

    rows = [
        {
            "id": "é",
            "image": png(),
            "conversations": [human("<image>Wie?"), gpt("\u2603"), human("Why?"), gpt("no")],
        }
    ]
    source = TfdsSource(str(tfds_builder.build(tmp_path, features, rows)), "")
    r = pickle.loads(pickle.dumps(source))[0]
    assert (len(source), r.id, r.images) == (1, "é", (png(),))
    assert r.turns == (Turn(1, "Wie?", "\u2603"), Turn(0, "Why?", "no"))


def test_tfds_questions_are_records(tmp_path):
    rows = [{"image": png(), "question": "Why?", "answer": a} for a in ("yes", " ")]
    path = tfds_builder.build(
        tmp_path, lambda f: {"image": f.Image(), "question": f.Text(), "answer": f.Text()}, rows
    )
    source = TfdsSource(str(path), "")
    records = {}
    for i in range(2):
        try:
            records[i] = source[i].turns
        except BadRecord as error:
            records[i] = error.reason
    assert sorted(map(str, records.values())) == sorted(
        ["answer 0 is empty", str((Turn(1, "Why?", "yes"),))]
    )


def test_tfds_without_questions_is_named(tmp_path):
    path = tfds_builder.build(tmp_path, lambda f: {"text": f.Text()}, [{"text": "x"}])
    with pytest.raises(ConfigError, match=r"features \['text'\] are neither"):
        TfdsSource(str(path), "")


def test_tfds_datasets_of_several_images_and_of_messages_are_records(tmp_path):
    def features(f):
        turn = {"role": f.Text(), "content": f.Text(), "weight": np.float32}
        return {"images": f.Sequence(f.Image()), "system": f.Text(), "messages": f.Sequence(turn)}

    said = [
        {"role": "user", "content": "<image> or <image>?", "weight": 0.0},
        {"role": "assistant", "content": "this", "weight": 1.0},
    ]
    row = {"images": [png(), png()], "system": "be kind", "messages": said}
    r = TfdsSource(str(tfds_builder.build(tmp_path, features, [row])), "")[0]
    assert (r.images, r.system) == ((png(), png()), "be kind")
    assert r.turns == (Turn(2, " or ?", "this", places=(0, 4)),)


def test_a_damaged_tfds_directory_is_named(tmp_path):
    rows = [{"question": question, "answer": "yes"} for question in (b"\xff", "Why?")]
    path = tfds_builder.build(tmp_path, lambda f: {"question": f.Text(), "answer": f.Text()}, rows)
    source, reasons = TfdsSource(str(path), ""), []
    for i in range(2):
        try:
            assert source[i].turns == (Turn(0, "Why?", "yes"),)
        except BadRecord as error:
            reasons.append(error.reason)
    assert [r[:34] for r in reasons] == ["cannot be read: UnicodeDecodeError"]
    (shard,) = Path(path).glob("*array_record*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        BadRecord, match=r"#0: (cannot be read|message 0: 'value' must be a string)"
    ):
        TfdsSource(str(path), "")[0]
    shard.unlink()
    with pytest.raises(BadRecord, match=r"#0: cannot be read: .*No such file"):
        TfdsSource(str(path), "")[0]
    (Path(path) / "features.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be read as a tfds dataset: .*; build it again"):
        TfdsSource(str(path), "")


def config(tmp_path, **fields):
    base = dict(
        annotations=(str(tmp_path / "a.json"),), image_roots=("",), tokenizer=str(tmp_path / "tokenizer"),
        template="vicuna_v1", system=None, turns="dialogue", max_tokens=32, max_query_tokens=4, max_images=0,
        image_mode="pad", max_image_pixels=1000, batch_size=2, seed=0, num_workers=0, on_bad_record="raise",
        max_bad_records=0, features_dir="",
    )  # fmt: skip
    return DataConfig(**base | fields)


def test_missing_paths_are_named_before_anything_is_read(tmp_path):
    tokenizers.word_level(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"annotations '.*a\.json' does not exist"):
        sources.check_paths(config(tmp_path))
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match="no record; give annotations with at least one"):
        sources.open_source(config(tmp_path))
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    sources.check_paths(config(tmp_path))
    missing = str(tmp_path / "no")
    with pytest.raises(ConfigError, match=r"image_roots '.*no' .*does not exist"):
        sources.check_paths(config(tmp_path, image_roots=(missing,)))
    with pytest.raises(ConfigError, match=r"tokenizer directory '.*no' does not exist"):
        sources.check_paths(config(tmp_path, tokenizer=missing))
    with pytest.raises(ConfigError, match=r"features_dir '.*no' holds no index\.json"):
        sources.check_paths(config(tmp_path, features_dir=missing))
    with pytest.raises(ConfigError, match="is no prepared tfds dataset"):
        sources.check_paths(config(tmp_path, annotations=(str(tmp_path),)))
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match=r"must end in \.json or \.jsonl"):
        sources.check_paths(config(tmp_path, annotations=(str(tmp_path / "a.txt"),)))


def test_annotations_are_concatenated_in_order(tmp_path):
    tokenizers.word_level(tmp_path / "tokenizer")
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    (tmp_path / "b.jsonl").write_text(json.dumps(RECORDS[0]) + "\n" + json.dumps(RECORDS[2]))
    paths = (str(tmp_path / "a.json"), str(tmp_path / "b.jsonl"))
    source = sources.open_source(config(tmp_path, annotations=paths, image_roots=("", "")))
    assert [source[i].id for i in range(len(source))] == ["é", 'q"]},[', "#2", "é", "line 2"]
    assert source[4].file == paths[1]
