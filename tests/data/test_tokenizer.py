"""The wrapper and whole rows against transformers, and what it says when a directory is no tokenizer."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from refs import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlm_jax.data import tokenizer
from vlm_jax.data.chat import Chat
from vlm_jax.data.records import Record, Turn
from vlm_jax.data.templates import TEMPLATES, chat_template
from vlm_jax.settings.checks import ConfigError

TEXTS = ["What is this?", " Red cat.\n\nyes", "ein Haus \u2603 \U0001f600", "a</s>b", ""]


@pytest.mark.parametrize(
    "kind", [tokenizers.word_level, tokenizers.byte_level, tokenizers.llama_like]
)
def test_ids_and_text_equal_transformers(kind, tmp_path):
    directory = kind(tmp_path)
    ours, theirs = tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids, offsets = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert len(offsets) == len(ids)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


def test_offsets_count_characters_not_bytes(tmp_path):
    t = tokenizer.load(tokenizers.byte_level(tmp_path))
    text = "\u2603 \U0001f600 cat"
    ids, offsets = t.encode(text)
    assert offsets[0] == (0, 1) and offsets[-1][1] == len(text) == 7
    assert len(ids) > len(text)  # several bytes, so several ids, share a character


def test_special_ids(tmp_path):
    word = tokenizer.load(tokenizers.word_level(tmp_path / "word"))
    assert (word.bos_ids, word.eos_id, word.pad_id) == ((1,), 2, 0)
    assert {"<s>", "</s>", "<unk>", "<pad>"} <= set(word.specials)
    qwen = tokenizer.load(tokenizers.byte_level(tmp_path / "qwen"))
    assert qwen.bos_ids == () and qwen.eos_id == qwen.pad_id == qwen.token_id("<|endoftext|>")
    llama = tokenizer.load(tokenizers.llama_like(tmp_path / "llama"))
    assert (llama.bos_ids, llama.eos_id, llama.pad_id) == (
        (1,),
        2,
        0,
    )  # no pad token: <unk>, as Vicuna
    assert llama.token_id("no such token") is None


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("real")
    return {name: make(root / f"{i}") for i, (name, make) in enumerate(tokenizers.REAL.items())}


FRONT = {
    "llama legacy": "<s>", "llama": "<s>", "llama without a class": "<s>", "llama that adds both": "<s>",
    "vicuna": "<s>", "vicuna legacy": "<s>", "vicuna saved again": "<s>", "phi3": None, "phi3 that adds bos": "<s>",
    "qwen": None, "llama3": "<|begin_of_text|>", "gpt2": None, "smollm": None, "add_bos_token false": None,
    "add_bos_token lost": None, "add_bos_token true": None, "vocab.json": None,
    "vocab.json that adds bos": "<|endoftext|>",
}  # fmt: skip


@pytest.mark.parametrize("name", tokenizers.REAL)
def test_bos_is_what_transformers_adds_and_not_what_the_tokenizer_names(real, name):
    ours, theirs = tokenizer.load(real[name]), AutoTokenizer.from_pretrained(real[name])
    front = [] if FRONT[name] is None else [ours.token_id(FRONT[name])]
    assert list(ours.bos_ids) == front
    assert theirs("What is this?")["input_ids"][: len(front) + 1] == [*front, ours.encode("What is this?")[0][0]]  # fmt: skip


def test_a_control_token_that_is_split_into_letters_is_lacking(real):
    """vocab.json lists it, nothing marks it as special."""
    t = tokenizer.load(real["vocab.json"])
    assert t.token_id("<|im_end|>") is not None and len(t.encode("<|im_end|>")[0]) > 5
    with pytest.raises(ConfigError, match=r"'chatml' needs the token '<\|im_start\|>', which the tokenizer lacks"):  # fmt: skip
        Chat(t, "chatml", None, "dialogue", 4, 400, 8, 3)


DIALOGUE = (
    Turn(0, "What is this?", "A red cat."),
    Turn(0, "Describe.\nBriefly:", "The mat, 12"),
    Turn(0, "And \u2603?", "ein Haus"),
)
PICTURES = (Turn(2, "What is this?", "A red cat."), Turn(1, "And this?", "yes"))


@pytest.mark.parametrize("name", tokenizers.REAL)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_ids_of_whole_rows_and_prompts_are_those_of_transformers(real, name, template):
    """The text comes from our Jinja template through transformers, its ids from transformers' own call."""
    ours, theirs = tokenizer.load(real[name]), AutoTokenizer.from_pretrained(real[name])
    control = TEMPLATES[template].control
    if not all(map(ours.holds, control)):
        with pytest.raises(ConfigError, match=f"template {template!r} needs the token"):
            Chat(ours, template, None, "dialogue", 4, 400, 8, 3)
        return
    chat = Chat(ours, template, "Be brief.", "dialogue", 4, 400, 8, 3)
    ends = (
        1 if name == "llama that adds both" else 0
    )  # transformers' call ends in EOS, a chat does not
    for turns in (DIALOGUE, PICTURES):
        turns = turns if TEMPLATES[template].keeps_question else turns[:1]
        asked = (*turns[:-1], Turn(turns[-1].images, turns[-1].question, None))
        for said in (turns, asked):
            first, *rest = rendered(theirs, template, said).split("<image>")
            whole = theirs(first)["input_ids"]
            expected = whole[: len(whole) - ends]
            for text in rest:
                expected = [*expected, *[-1] * 4]
                for part in parts(template, text):
                    expected += theirs(part, add_special_tokens=False)["input_ids"]
            record = Record("a.json", "r", "/i", ("i.png",) * (sum(t.images for t in said)), None, said)  # fmt: skip
            assert row_ids(chat, record) == expected


def rendered(theirs, template, turns):
    if not TEMPLATES[template].keeps_question:
        answer = turns[0].answer
        return "Be brief." + "<image>" * turns[0].images + ("" if answer is None else f"{answer}\n")
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in turns:
        content = [{"type": "image"}] * turn.images + [{"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": content})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": turn.answer})
    jinja = chat_template(TEMPLATES[template], None)
    open_end = turns[-1].answer is None
    return theirs.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=open_end)  # fmt: skip


def parts(template, text):
    """Text behind an image as it is tokenised: at once, but for what a template writes apart."""
    apart = TEMPLATES[template].after_image
    return [apart, text.removeprefix(apart)] if apart else [text]


def row_ids(chat, record):
    """The row's ids, -1 in the slots of visual tokens."""
    if record.turns[-1].answer is None:
        units = chat.prompt(record)
        row = chat.lay_out(record, units, chat.length(units))
    else:
        row = chat.encode(record)
    return np.where(row.visual_index >= 0, -1, row.tokens)[row.segments >= 0].tolist()


def test_decode_leaves_specials_out(tmp_path):
    t = tokenizer.load(tokenizers.word_level(tmp_path))
    ids, _ = t.encode("What is this ?")
    assert t.decode([*t.bos_ids, *ids, t.eos_id, t.pad_id]) == "What is this ?"


def test_a_saved_truncation_does_not_cut(tmp_path):
    directory = tokenizers.word_level(tmp_path)
    fast = PreTrainedTokenizerFast.from_pretrained(directory)
    fast.backend_tokenizer.enable_truncation(2)
    fast.backend_tokenizer.enable_padding(length=9)
    fast.backend_tokenizer.save(f"{directory}/tokenizer.json")
    assert len(tokenizer.load(directory).encode("What is this ?")[0]) == 4


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; save one there"):
        tokenizer.load(str(tmp_path / "no"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ConfigError, match=r"holds no tokenizer; expected one of tokenizer\.json, tokenizer\.model, vocab\.json with merges.txt"):  # fmt: skip
        tokenizer.load(str(tmp_path))


BROKEN = {  # file, what it is made, the message's end
    "cut": ("tokenizer.json", b'{"model": {"vo', r"tokenizer.json' cannot be read: .*; download or save the tokenizer again\."),
    "not utf-8": ("tokenizer.json", b'{"a": "\xe9"}', r"tokenizer.json' cannot be read: 'utf-8' codec can't decode byte 0xe9 .*"),
    "a list": ("tokenizer.json", b"[]", r"tokenizer.json' must hold a JSON object, not a list; .*"),
    "deep": ("tokenizer.json", b"[" * 10**5, r"tokenizer.json' cannot be read: maximum recursion depth exceeded.*"),
    "a pointer": ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", r"is a Git LFS pointer, .* run `git lfs pull` there\."),
    "empty object": ("tokenizer.json", b"{}", r"cannot be read: KeyError: 'added_tokens'"),
    "no vocabulary": ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}}, r"the vocabulary in .* is empty; .*"),
    "a model of another kind": ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, r"cannot be read: Exception: .*Token `b` out of vocabulary.*"),
    "tokens of a wrong type": ("tokenizer.json", {"added_tokens": [3]}, r"cannot be read: AttributeError: 'int' object.*"),
    "settings cut": ("tokenizer_config.json", b"{", r"tokenizer_config.json' cannot be read: Expecting property name .*"),
    "settings in a list": ("tokenizer_config.json", b"[]", r"must hold a JSON object, not a list; .*"),
    "another map": ("special_tokens_map.json", b"[]", r"special_tokens_map.json' must hold a JSON object, not a list; .*"),
    "a list of tokens": ("added_tokens.json", b'["a"]', r"added_tokens.json' must hold a JSON object, not a list; .*"),
    "a class of a wrong type": ("tokenizer_config.json", {"tokenizer_class": 3}, r"cannot be read: AttributeError: .*"),
    "a number": ("tokenizer_config.json", {"bos_token": 3}, r"bos_token holds 3, which is no token; remove it, or name .*"),
    "an unnamed token": ("special_tokens_map.json", b'{"pad_token": {"lstrip": true}}', r"pad_token holds {'lstrip': True}, which is no token; .*"),
    "an empty token in a list": ("tokenizer_config.json", {"additional_special_tokens": [""]}, r"additional_special_tokens holds the empty string, .*"),
    "an empty token in the map": ("special_tokens_map.json", b'{"pad_token": ""}', r"special_tokens_map.json': pad_token holds the empty string, .*"),
    "an empty added token": ("tokenizer_config.json", {"added_tokens_decoder": {"700": {"content": "", "special": True}}}, ""),
    **{
        f"empty {name}": ("tokenizer_config.json", {name: empty}, rf"{name} holds the empty string, which is no token; remove it, or name a token of the vocabulary\.")
        for name in ("bos_token", "eos_token", "unk_token", "pad_token") for empty in ("", {"__type": "AddedToken", "content": ""})
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return tokenizers.REAL["llama"](tmp_path_factory.mktemp("llama") / "whole")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line(llama, tmp_path, case):
    name, content, message = BROKEN[case]
    directory = Path(shutil.copytree(llama, tmp_path / "t"))
    if isinstance(content, dict):
        content = json.dumps(json.loads((directory / name).read_text()) | content).encode()
    (directory / name).write_bytes(content)
    if not message:  # transformers leaves it out
        assert "" not in tokenizer.load(str(directory)).specials
        return
    with pytest.raises(ConfigError) as error:
        tokenizer.load(str(directory))
    assert "\n" not in str(error.value) and str(directory) in str(error.value)
    assert re.search(f"{message}$", str(error.value)), str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n\x10hello", "cut"])
def test_a_broken_tokenizer_model_does_not_ask_for_another_library(tmp_path, content, capfd):
    directory = Path(tokenizers.sentencepiece(tmp_path / "t"))
    whole = (directory / "tokenizer.model").read_bytes()
    (directory / "tokenizer.model").write_bytes(whole[:999] if content == "cut" else content)
    with pytest.raises(ConfigError) as error:
        tokenizer.load(str(directory))
    assert re.search(r"tokenizer.model' is no SentencePiece model, or a part of one; download it again, or save tokenizer.json there\.$", str(error.value))  # fmt: skip
    assert capfd.readouterr() == ("", "")
