"""Ids, loss masks, independent turns, prompts and queries, against the published rules and literal strings."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from refs import llava_labels, tokenizers

from vlm_jax.data import sources, templates, tokenizer
from vlm_jax.data.chat import TEMPLATES, Chat
from vlm_jax.data.records import BadRecord, Record, Turn
from vlm_jax.settings.checks import ConfigError

KIND = {
    "vicuna_v1": "llama",
    "plain": "llama",
    "chatml": "byte_chatml",
    "chatml_llava_next": "byte_chatml",
    "llama3": "byte_llama3",
    "phi3": "llama_phi3",
}


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> dict[str, tokenizer.Tokenizer]:
    root: Path = tmp_path_factory.mktemp("tokenizers")
    control = tokenizers.CONTROL
    made = {
        "word": tokenizers.word_level(root / "word"),
        "llama": tokenizers.llama_like(root / "llama"),
        "llama_class": tokenizers.llama_like(root / "class", tokenizer_class="LlamaTokenizer"),
        "llama_phi3": tokenizers.llama_like(root / "phi3", control["phi3"], strip_after=True),
        "byte_chatml": tokenizers.byte_level(root / "chatml"),
        "byte_llama3": tokenizers.byte_level(
            root / "llama3", control["llama3"], "<|begin_of_text|>"
        ),
    }
    return {name: tokenizer.load(directory) for name, directory in made.items()}


def make(tokens, template="vicuna_v1", kind=None, system=None, turns="dialogue", **sizes):
    sizes = {"visual_tokens": 3, "max_tokens": 400, "max_query_tokens": 16, "max_images": 2} | sizes
    return Chat(tokens[kind or KIND[template]], template, system, turns, **sizes)


def record(*turns, images=None, system=None):
    parsed = tuple(Turn(q.count("<image>"), q.replace("<image>", "").strip(), a) for q, a in turns)
    count = sum(t.images for t in parsed) if images is None else images
    return Record(
        "a.json", "r7", "/images", tuple(f"{i}.png" for i in range(count)), system, parsed
    )


def reference_form(row):
    """Ids and labels as the reference writes them, for rows with one visual token per image."""
    length = int((row.segments >= 0).sum())
    ids = np.where(row.visual_index >= 0, -200, row.tokens)[:length]
    return ids.tolist(), np.where(row.loss_mask[:length], ids, -100).tolist()


DIALOGUES = [
    [("<image>\nWhat is this?", "A red cat.")],
    [("<image>\nWhat is this?", "A red cat."), ("Why?", "Because it is."), ("yes no?", "1 2 3")],
    [
        ("What colour is the big shape?", "Red.\nblue"),
        ("Describe.\nBriefly.", "ein Haus \u2603 \U0001f600"),
    ],
    [("<image>\nIs there a cat?", "\u2603\u2603")],
    [("Why?", "Yes "), ("Why?", "yes")],
]


@pytest.mark.parametrize("kind", ["llama", "llama_class"])
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_vicuna_equals_the_published_rule(tokens, kind, dialogue):
    t = tokens[kind]
    row = make(tokens, kind=kind, visual_tokens=1).encode(record(*dialogue))
    expected = llava_labels.vicuna(lambda s: t.encode(s)[0], t.bos_ids[0], dialogue)
    assert reference_form(row) == expected
    assert sum(label != -100 for label in expected[1]) >= 2 * len(dialogue)


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_chatml_llava_next_equals_the_published_rule(tokens, dialogue):
    t = tokens["byte_chatml"]
    row = make(tokens, "chatml_llava_next", visual_tokens=1).encode(record(*dialogue))
    start, end = t.token_id("<|im_start|>"), t.token_id("<|im_end|>")
    ids, labels = llava_labels.chatml_next(lambda s: t.encode(s)[0], start, end, dialogue)
    labels[0] = -100  # nothing predicts the first token
    assert reference_form(row) == (ids, labels)


SUPERVISED = {
    "vicuna_v1": ["A red cat.</s>", "Because it is.</s>"],
    "chatml": ["A red cat.<|im_end|>", "Because it is.<|im_end|>"],
    "llama3": ["A red cat.<|eot_id|>", "Because it is.<|eot_id|>"],
    "phi3": ["A red cat.<|end|>", "Because it is.<|end|>"],
}


@pytest.mark.parametrize("template", SUPERVISED)
@pytest.mark.parametrize("turns", ["dialogue", "independent"])
def test_exactly_the_answers_and_their_closing_token_are_supervised(tokens, template, turns):
    c = make(tokens, template, turns=turns)
    row = c.encode(record(("<image>What is this?", "A red cat."), ("Why?", "Because it is.")))
    edges = np.flatnonzero(np.diff(row.loss_mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    backend = c.tokenizer.backend
    texts = [backend.decode(row.tokens[a:b].tolist(), skip_special_tokens=False) for a, b in edges]
    assert [t.strip().replace(". <", ".<") for t in texts] == SUPERVISED[template]


LITERAL = {
    "vicuna_v1": "S USER: <image>\nq ASSISTANT: a</s>USER: r ASSISTANT: b</s>",
    "plain": "S<image>a\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<image>\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    "chatml_llava_next": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<image>\n\nq<|im_end|>\n<|im_start|>assistant\na"
    "<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nq"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nr"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\n<image>\nq<|end|>\n<|assistant|>\na<|end|>\n<|user|>\nr<|end|>\n<|assistant|>\nb"
    "<|end|>\n",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_rendered_text_is_the_published_format(template):
    turns = [Turn(1, "q", "a"), Turn(0, "r", "b")][: 1 if template == "plain" else 2]
    text = "".join(s.text for s in templates.render(TEMPLATES[template], "S", turns))
    assert text == LITERAL[template]
    assert (
        templates.render(TEMPLATES[template], "", turns)[0].turn == 1
    )  # an empty system prompt leaves no trace


def test_plain_supervises_caption_and_newline_and_discards_the_question(tokens):
    c = make(tokens, "plain", visual_tokens=2)
    row = c.encode(record(("<image>Describe.", "A red cat.")))
    caption, _ = c.tokenizer.encode("A red cat.\n")
    n = 3 + len(caption)
    assert row.tokens[:n].tolist() == [*c.tokenizer.bos_ids, 0, 0, *caption]
    assert row.visual_index[:n].tolist() == [-1, 0, 1] + [-1] * len(caption)
    assert row.loss_mask.tolist() == [False] * 3 + [True] * len(caption) + [False] * (400 - n)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", ["A red cat.", "\n\nThe cat", "  yes", "1", "\u2603 snow"])
def test_the_inference_prompt_is_a_prefix_of_the_training_row(tokens, template, answer):
    c = make(tokens, template)
    asked = sources.parse(
        {"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nWhat is this?\n"}]},
        "f", "/i", "0", generate=True,
    )  # fmt: skip
    told = sources.parse(
        {"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nWhat is this?\n"}, {"from": "gpt", "value": answer}]},
        "f", "/i", "0",
    )  # fmt: skip
    units = c.prompt(asked)
    n = c.length(units)
    prompt, row = c.lay_out(asked, units, n), c.encode(told)
    for key in ("tokens", "visual_index", "positions", "segments"):
        assert np.array_equal(getattr(prompt, key), getattr(row, key)[:n]), key
    assert row.loss_mask[n]  # the first answer token comes right after the prompt
    (reply,) = c.replies(
        asked, [told.turns[0].answer]
    )  # what follows, up to the token that ends generation
    assert reply.tolist() == row.tokens[n : n + len(reply)].tolist()
    assert reply[-1] in c.closing_ids and not np.isin(reply[:-1], c.closing_ids).any()


def test_the_vicuna_prompt_ends_in_the_header_without_a_space(tokens):
    c = make(tokens)
    units = c.prompt(record(("Why?", None)))
    text = c.tokenizer.decode(np.concatenate([u.ids for u in units]).tolist())
    assert text.endswith("USER: Why? ASSISTANT:")


TEMPLATES_AND_KINDS = [
    *((t, KIND[t]) for t in TEMPLATES if t != "plain"),
    ("vicuna_v1", "word"),
    ("vicuna_v1", "llama_class"),
]


@pytest.mark.parametrize("template, kind", TEMPLATES_AND_KINDS)
@pytest.mark.parametrize("image", ["", "<image>", "<image><image>"])
@pytest.mark.parametrize("system", [None, "", "yes no"])
def test_an_independent_turn_looks_exactly_as_if_it_were_asked_alone(
    tokens, template, kind, image, system
):
    turns = [
        (image + "What is this?", "A red cat."),
        ("Why?", "Because it is."),
        ("What colour?", "Red"),
    ]
    c = make(tokens, template, kind, turns="independent", system=system)
    row = c.encode(record(*turns))
    assert set(row.segments.tolist()) >= {1, 2, 3}
    alone = make(tokens, template, kind, turns="dialogue", system=system)
    for n, (question, answer) in enumerate(turns, start=1):
        one = alone.encode(record((question if n == 1 else image + question, answer)))
        length = int((one.segments >= 0).sum())
        see = (row.segments == 0) | (row.segments == n)
        for key in ("tokens", "visual_index", "positions"):
            assert np.array_equal(getattr(row, key)[see], getattr(one, key)[:length]), (n, key)
        own = row.segments[see] == n
        assert np.array_equal(row.loss_mask[see][own], one.loss_mask[:length][own])


def test_independent_captions_do_not_supervise_a_token_predicted_from_another_turn(tokens):
    c = make(tokens, "plain", turns="independent")
    row = c.encode(record(("<image>", "A red cat."), ("x", "The mat"), ("y", "floor")))
    first = [int(np.flatnonzero(row.segments == n)[0]) for n in (1, 2, 3)]
    assert row.loss_mask[first].tolist() == [True, False, False]
    assert row.positions[first].tolist() == [4, 4, 4]  # BOS and three visual tokens before


def test_two_images_in_one_turn_keep_their_places(tokens):
    row = make(tokens, visual_tokens=3).encode(record(("<image><image>What is this?", "yes")))
    assert row.visual_index[row.visual_index >= 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert (row.tokens[row.visual_index >= 0] == 0).all()
    assert row.positions[: int((row.segments >= 0).sum())].tolist() == list(
        range(int((row.segments >= 0).sum()))
    )


def test_a_question_may_hold_the_role_marker(tokens):
    c = make(tokens)
    plain = c.encode(record(("Why?", "yes")))
    row = c.encode(record(("Why? ASSISTANT:", "yes")))
    supervised = row.tokens[row.loss_mask].tolist()
    assert supervised == plain.tokens[plain.loss_mask].tolist()
    assert c.tokenizer.decode(supervised).strip() == "yes"


@pytest.mark.parametrize("place", ["question", "answer", "system"])
def test_control_tokens_in_the_text_are_refused(tokens, place):
    text = {"question": "Why?", "answer": "yes", "system": "be kind", place: "a</s>b"}
    bad = record((text["question"], text["answer"]), system=text["system"])
    with pytest.raises(BadRecord, match=r"a\.json: record r7: .*'</s>'"):
        make(tokens).encode(bad)


def test_a_cut_answer_trains_on_what_is_left_and_no_answer_is_an_error(tokens):
    dialogue = record(("<image>What is this?", "A red cat."), ("Why?", "Because it is."))
    full = make(tokens).encode(dialogue)
    first = int(np.flatnonzero(full.loss_mask)[0])
    row = make(tokens, max_tokens=first + 2).encode(dialogue)
    assert row.loss_mask.sum() == 2
    assert np.array_equal(row.tokens, full.tokens[: first + 2])
    with pytest.raises(BadRecord, match=f"no answer fits into max_tokens {first}"):
        make(tokens, max_tokens=first).encode(dialogue)


def test_an_image_is_never_cut(tokens):
    dialogue = record(("<image>What is this?", "yes"))
    row = make(tokens, visual_tokens=8).encode(dialogue)
    last = int(np.flatnonzero(row.visual_index == 7)[0])
    for width in (last - 3, last):
        with pytest.raises(BadRecord, match=f"image 0 does not fit into max_tokens {width}"):
            make(tokens, visual_tokens=8, max_tokens=width).encode(dialogue)
    with pytest.raises(BadRecord, match=f"no answer fits into max_tokens {last + 1}"):
        make(tokens, visual_tokens=8, max_tokens=last + 1).encode(dialogue)


def test_a_prompt_longer_than_max_tokens_is_an_error(tokens):
    with pytest.raises(BadRecord, match="more than max_tokens 8"):
        make(tokens, max_tokens=8).prompt(record(("What is this?", None)))


def test_more_images_than_slots_are_an_error(tokens):
    with pytest.raises(BadRecord, match="has 2 images, but max_images is 1"):
        make(tokens, max_images=1).encode(record(("<image><image>Why?", "yes")))


def test_later_images_are_an_error_when_turns_are_independent(tokens):
    later = record(("Why?", "yes"), ("<image>Why?", "yes"))
    with pytest.raises(BadRecord, match="later turn has an image"):
        make(tokens, turns="independent").encode(later)
    assert make(tokens).encode(later).loss_mask.any()


def test_the_system_prompt_comes_from_the_record_then_the_config_then_the_template(tokens):
    def text(system, own):
        c = make(tokens, "chatml", system=system)
        row = c.encode(record(("Why?", "yes"), system=own))
        return c.tokenizer.decode(row.tokens[row.segments == 0].tolist())

    assert text(None, None).startswith("system\nYou are a helpful assistant.\nuser")
    assert text("be kind", None).startswith("system\nbe kind\nuser")
    assert text("be kind", "yes").startswith("system\nyes\nuser")
    assert text("", None).startswith("user\nWhy?")


def test_padding_and_the_first_token_are_never_supervised(tokens):
    c = make(tokens, "chatml_llava_next")
    row = c.encode(record(("Why?", "yes")))
    assert not row.loss_mask[0] and not row.loss_mask[row.segments < 0].any()
    assert (row.tokens[row.segments < 0] == c.tokenizer.pad_id).all()
    assert (row.positions[row.segments < 0] == 0).all()


def test_left_padding_only_moves_the_prompt(tokens):
    c = make(tokens)
    asked = record(("<image>Why?", None))
    units = c.prompt(asked)
    n = c.length(units)
    tight, left = c.lay_out(asked, units, n), c.lay_out(asked, units, n + 5, left=True)
    for key in ("tokens", "visual_index", "positions", "segments"):
        assert np.array_equal(getattr(left, key)[5:], getattr(tight, key)), key
    assert left.segments[:5].tolist() == [-1] * 5


GOLDEN = [  # decoded rows after the image, and the query the reference finds
    ("\nWhat is this? ASSISTANT:", "What is this?"),
    ("\nWhat is this? ASSISTANT: A cat. USER: Why? ASSISTANT: Because.", "What is this?"),
    ("\nDescribe.\nBriefly. ASSISTANT: ok", "Describe.\nBriefly."),
    (None, "image"),
    (" no newline ASSISTANT: x", "no newline"),
    ("\nNo assistant marker here", "No assistant marker her"),
    ("a caption\n", ""),
]


@pytest.mark.parametrize("decoded, expected", GOLDEN)
def test_the_reference_query_rule_is_understood(decoded, expected):
    assert llava_labels.query(decoded) == expected


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_the_query_equals_the_reference_on_regular_rows(tokens, dialogue):
    c = make(tokens, visual_tokens=1)
    row = c.encode(record(*dialogue))
    after = np.flatnonzero(row.visual_index >= 0)
    decoded = None
    if len(after):
        decoded = c.tokenizer.decode(
            row.tokens[after[-1] + 1 :][row.segments[after[-1] + 1 :] >= 0].tolist()
        )
    found = templates.first_turn(record(*dialogue)) or ["image"]
    assert found == [llava_labels.query(decoded)]


def test_the_query_is_the_whole_question_where_the_reference_cuts_it():
    assert templates.first_turn(record(("<image>Is ASSISTANT: a word?", "yes"))) == [
        "Is ASSISTANT: a word?"
    ]
    assert templates.first_turn(record(("<image>", "a caption"))) == ["image"]
    two = record(("<image><image>Which?", "yes"), ("<image>And this?", "no"))
    assert templates.first_turn(two) == ["Which?", "Which?", "And this?"]


def test_the_query_of_the_last_turn_is_the_last_question_for_every_image(tokens):
    two = record(("<image><image>Which?", "yes"), ("<image>And this?", "no"), ("Now?", None))
    assert templates.last_turn(two) == ["Now?"] * 3
    assert templates.last_turn(record(("<image>Which?", "yes"), ("", "no"))) == ["image"]
    row = record(("<image>Which?", "yes"), ("Now?", None))
    ids, mask = make(tokens, "chatml", query="last_turn").query_arrays(row)
    asked = make(tokens, "chatml").query_arrays(record(("<image>Now?", None)))
    np.testing.assert_array_equal(ids, asked[0])
    np.testing.assert_array_equal(mask, asked[1])


def test_without_a_query_its_arrays_have_no_length(tokens):
    ids, mask = make(tokens, query="none").query_arrays(record(("<image>Which?", "yes")))
    assert ids.shape == mask.shape == (2, 0)


def test_queries_are_right_padded_truncated_and_complete(tokens):
    c = make(tokens, "vicuna_v1", max_query_tokens=4, max_images=2)
    ids, mask = c.query_arrays(record(("<image>What colour is the big shape?", "Red")))
    whole = [*c.tokenizer.bos_ids, *c.tokenizer.encode("What colour is the big shape?")[0]]
    assert ids[0].tolist() == whole[:4] and mask[0].all()
    default = [*c.tokenizer.bos_ids, *c.tokenizer.encode("image")[0]]
    assert ids[1, mask[1]].tolist() == default[:4]
    no_bos = make(tokens, "chatml", max_query_tokens=12)
    ids, mask = no_bos.query_arrays(record(("<image>Why?", "Red")))
    assert ids[0, mask[0]].tolist() == no_bos.tokenizer.encode("Why?")[0]
    assert mask[0].tolist() == sorted(mask[0].tolist(), reverse=True)


def test_a_template_the_tokenizer_cannot_write_is_an_error(tokens):
    with pytest.raises(ConfigError, match=r"'chatml' needs the token '<\|im_start\|>'"):
        make(tokens, "chatml", kind="word")
    with pytest.raises(ConfigError, match=r"lacks; use one that it can write \(chatml, chatml_llava_next\) or add the token\."):  # fmt: skip
        make(tokens, "vicuna_v1", kind="byte_chatml")
    with pytest.raises(ConfigError, match="template 'alpaca' is not one of"):
        Chat(tokens["word"], "alpaca", None, "dialogue", 1, 8, 4, 1)


def test_a_tokenizer_that_merges_prompt_and_answer_is_an_error(tokens):
    class Merging:
        """As `word`, but "ASSISTANT:" and the answer's first letter are one token."""

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def encode(self, text):
            at = text.index(": yes")
            return [5, 6, 7], [(0, at), (at, at + 3), (at + 3, len(text))]

    c = make(tokens, kind="word")
    c.tokenizer = Merging(c.tokenizer)
    with pytest.raises(BadRecord, match="merges prompt and answer into the token ': y'"):
        c.encode(record(("Why?", "yes")))


def test_the_encoder_survives_pickling(tokens):
    c = make(tokens, "chatml")
    again = pickle.loads(pickle.dumps(c))
    r = record(("<image>Why?", "yes"))
    assert all(np.array_equal(a, b) for a, b in zip(c.encode(r), again.encode(r), strict=True))


def test_answers_end_with_the_templates_closing_token_or_eos(tokens):
    c = make(tokens, "chatml")
    t = c.tokenizer
    assert c.closing_ids == tuple(sorted({t.token_id("<|im_end|>"), t.token_id("<|endoftext|>")}))
    assert make(tokens).closing_ids == (tokens["llama"].eos_id,)
