"""Questions as batches: padding, few static shapes, the shared prefix, replies, the rows of one process."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from vlm_jax.data import eval_batches as prompts
from vlm_jax.data import rows
from vlm_jax.data.records import BadRecord
from vlm_jax.storage import run as experiment

M = 4  # visual tokens per image
SYSTEM = "Say hello . What colour is this image ? Say one ."  # 12 tokens
NAMES = list(tiny.COLOURS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("prompts") / "data")


def ask(i, words, image=None):
    text = ("<image>\n" if image else "") + "What " * words + "?"
    picture = {"image": f"images/{image}.png"} if image else {}
    return {"id": f"q{i}", "conversations": [{"from": "human", "value": text}], **picture}


def prepare(folder, questions, batch_size, *, replies=None, shard=0, num_shards=1, **fields):
    run = experiment.resolve(tiny.config(folder))
    cfg = dataclasses.replace(run.data, **{"max_tokens": 80} | fields)
    return prompts.prepare(
        questions, str(folder), cfg, M, run.model.vit, batch_size, replies=replies, shard=shard, num_shards=num_shards,
    )  # fmt: skip


def mixed(count):
    return [ask(i, 1 + i % 30, NAMES[i % 8] if i % 2 else None) for i in range(count)]


def shown(folder, row):
    """A row's slots as words: - hidden, v a visual token."""
    chat = rows.make_chat(experiment.resolve(tiny.config(folder)).data, M)
    words = []
    for token, visual, segment in zip(
        row["tokens"], row["visual_index"], row["segments"], strict=True
    ):
        word = "v" if visual >= 0 else chat.tokenizer.backend.id_to_token(int(token))
        words.append("-" if segment < 0 else word)
    return " ".join(words)


def rows_of(asked):
    for batch in asked.batches:
        for i, name in enumerate(batch["ids"]):
            if name:
                yield name, {k: v[i] for k, v in batch.items() if k != "ids"}


def test_prompts_are_left_padded_in_few_static_buckets(folder):
    asked = prepare(folder, mixed(61), 4)
    batches = list(asked.batches)
    assert 2 <= len(asked.buckets) <= 4 and all(b % 8 == 0 for b in asked.buckets)
    assert {b["tokens"].shape for b in batches} == {(4, width) for width in asked.buckets}
    answered = [name for b in batches for name in b["ids"] if name]
    assert sorted(answered) == sorted(f"q{i}" for i in range(61))
    tokens = 0
    for batch in batches:
        assert "loss_mask" not in batch and batch["images"].shape == (4, 1, 16, 16, 3)
        real = batch["segments"] >= 0
        tokens += real[[bool(name) for name in batch["ids"]]].sum()
        assert real[:, -1].all() and (np.diff(real.astype(int), axis=1) >= 0).all()
        assert (batch["positions"].max(axis=1) == real.sum(axis=1) - 1).all()
    assert tokens == asked.num_tokens and asked.prefix.size == asked.reply_slots == 0


def test_only_the_last_batch_is_completed_and_short_prompts_come_first(folder):
    batches = list(prepare(folder, mixed(61), 4).batches)
    assert len(batches) == 16
    assert all(all(batch["ids"]) for batch in batches[:-1])
    lengths = np.concatenate([batch["positions"].max(axis=1) for batch in batches])
    assert (np.diff(lengths) >= 0).all()


def test_a_filler_repeats_the_last_row_under_no_id(folder):
    batch = next(prepare(folder, [ask(1, 2, "green")], 2).batches)
    assert batch["ids"] == ["q1", ""]
    names = [key for key in batch if key not in ("ids", "seeds")]
    assert all(np.array_equal(batch[key][0], batch[key][1]) for key in names)
    row = {key: batch[key][0] for key in names}
    assert shown(folder, row).endswith("<s> USER : v v v v What What ? ASSISTANT :")
    assert batch["images"][0, 0, 8, 8].tolist() == [30, 200, 40]


def test_what_all_prompts_begin_with_is_left_out_of_every_row_but_not_of_its_positions(folder):
    questions = mixed(9)
    whole = {
        name: row
        for n in range(9)  # one question shares nothing
        for name, row in rows_of(prepare(folder, questions[n : n + 1], 1, system=SYSTEM))
    }
    asked = prepare(folder, questions, 3, system=SYSTEM)
    assert len(asked.prefix) == 15  # <s> and 12 of the system prompt, USER :
    for name, row in rows_of(asked):
        was = whole[name]["segments"] >= 0
        filled = row["segments"] >= 0
        assert whole[name]["tokens"][was][:15].tolist() == asked.prefix.tolist()
        for key in ("tokens", "visual_index", "positions"):
            assert row[key][filled].tolist() == whole[name][key][was][15:].tolist(), key
    assert set(whole) == {f"q{i}" for i in range(9)}


def test_a_prompt_keeps_the_token_its_answer_is_predicted_from(folder):
    """Equal questions without an image share all but their last token."""
    asked = prepare(folder, [ask(i, 9) for i in range(3)], 3)
    assert [shown(folder, row) for _, row in rows_of(asked)] == ["- - - - - - - :"] * 3


def test_a_short_common_prefix_is_not_worth_a_program_of_its_own(folder):
    assert prepare(folder, mixed(9), 3, system="Say hello").prefix.size == 0


def test_replies_stand_behind_the_prompt_each_in_its_own_segment(folder):
    said = [("red", "green"), ("Yes", "No", "bright red"), ("one",)]
    questions = [ask(0, 1, "red"), ask(1, 2), ask(2, 3)]
    asked = prepare(folder, questions, 3, replies=said)
    found = dict(rows_of(asked))
    assert asked.reply_slots == 7 and asked.buckets == (16,)
    assert shown(folder, found["q0"]).endswith(
        "v v v v What ? ASSISTANT : red </s> green </s> - - -"
    )
    assert shown(folder, found["q1"]).endswith("? ASSISTANT : Yes </s> No </s> bright red </s>")
    assert found["q1"]["segments"][-8:].tolist() == [0, 1, 1, 2, 2, 3, 3, 3]
    assert found["q2"]["segments"][-8:].tolist() == [0, 1, 1, -1, -1, -1, -1, -1]
    assert found["q1"]["positions"][-8:].tolist() == [7, 8, 9, 8, 9, 8, 9, 10]


def test_rows_of_all_shards_are_those_of_one(folder):
    one = list(prepare(folder, mixed(13), 4).batches)
    two = [list(prepare(folder, mixed(13), 4, shard=i, num_shards=2).batches) for i in range(2)]
    for whole, low, high in zip(one, *two, strict=True):
        assert whole["ids"] == low["ids"] == high["ids"]
        for key in whole.keys() - {"ids"}:
            assert np.array_equal(whole[key], np.concatenate([low[key], high[key]])), key


def test_evaluation_reads_cached_features(folder, tmp_path):
    features = tmp_path / "features"
    features.mkdir()
    last = np.random.default_rng(0).standard_normal((1, 4, 3)).astype(np.float32)
    np.save(features / "last.npy", last)
    (features / "index.json").write_text(json.dumps({"images/green.png": 0}))
    asked = prepare(folder, [ask(1, 2, "green"), ask(2, 2)], 2, features_dir=str(features))
    found = dict(rows_of(asked))
    assert np.array_equal(found["q1"]["feature_last"][0], last[0])
    assert not found["q2"]["feature_last"].any()


def test_a_bad_question_is_never_skipped(folder):
    told = ask(1, 2)
    told["conversations"].append({"from": "gpt", "value": "yes"})
    with pytest.raises(
        BadRecord, match="evaluation records: record q1: the last turn is from 'gpt'"
    ):
        prepare(folder, [told], 2, on_bad_record="skip", max_bad_records=9)
    asked = prepare(folder, [ask(1, 2, "lost")], 2, on_bad_record="skip", max_bad_records=9)
    with pytest.raises(BadRecord, match=r"record q1: image 'images/lost\.png'"):
        next(asked.batches)


def test_no_question_gives_no_batch(folder):
    asked = prepare(folder, [], 2)
    assert asked.buckets == () and list(asked.batches) == []


@pytest.mark.parametrize(
    "lengths, batch_size, most, expected",
    [
        ([3], 8, 4, (8,)),
        ([8, 9], 1, 4, (8, 16)),
        ([8, 9], 2, 4, (16,)),  # less than a batch shares a bucket
        ([10] * 50 + [100] * 50, 10, 4, (16, 104)),
        ([10] * 99 + [100], 10, 4, (104,)),
        (list(range(1, 101)), 10, 4, (32, 56, 80, 104)),
        (list(range(1, 101)), 10, 3, (40, 72, 104)),
    ],
)
def test_buckets_follow_the_lengths(lengths, batch_size, most, expected):
    assert prompts.choose_buckets(lengths, batch_size, most) == expected
