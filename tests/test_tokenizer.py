"""The wrapper against transformers, and what it says when a directory is no tokenizer."""

import json

import pytest
from refs import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlm_jax.config import ConfigError
from vlm_jax.data import tokenizer

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
    assert (word.bos_id, word.eos_id, word.pad_id) == (1, 2, 0)
    assert {"<s>", "</s>", "<unk>", "<pad>"} <= set(word.specials)
    qwen = tokenizer.load(tokenizers.byte_level(tmp_path / "qwen"))
    assert qwen.bos_id is None and qwen.eos_id == qwen.pad_id == qwen.token_id("<|endoftext|>")
    llama = tokenizer.load(tokenizers.llama_like(tmp_path / "llama"))
    assert (llama.bos_id, llama.eos_id, llama.pad_id) == (1, 2, 0)  # no pad token: <unk>, as Vicuna
    assert llama.token_id("no such token") is None


def test_a_tokenizer_told_not_to_add_bos_has_none(tmp_path):
    directory = tokenizers.llama_like(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": False}))
    assert tokenizer.load(directory).bos_id is None


def test_decode_leaves_specials_out(tmp_path):
    t = tokenizer.load(tokenizers.word_level(tmp_path))
    ids, _ = t.encode("What is this ?")
    assert t.decode([t.bos_id, *ids, t.eos_id, t.pad_id]) == "What is this ?"


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
    with pytest.raises(ConfigError, match="holds no tokenizer; expected one of"):
        tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ConfigError, match="cannot be read"):
        tokenizer.load(str(tmp_path))
