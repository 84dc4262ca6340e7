"""Small tokenizers of the kinds in use, trained in a moment and saved as Hugging Face directories.

`word_level`, `byte_level` and `llama_like` are three algorithms; `REAL` holds the shapes in which models are published.
"""

import functools
import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
    " and polite answers to the user's questions. USER: What is this? ASSISTANT: A red cat. system user assistant",
    "You are a helpful assistant. What colour is the big shape? Red. Why? Because it is. Describe.\nBriefly. yes no 1 2 3",
    "image Is there a cat? The cat is on the mat. Answer the question using a single word or phrase. blue green floor",
] * 3
CONTROL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}


def save(backend, directory, adds=("bos_token",), **specials):
    """adds: what the post-processor puts before a text (and an eos_token after it), as Llama's tokenizer.json does."""
    ids = {name: (specials[name], backend.token_to_id(specials[name])) for name in adds}
    parts = {"bos_token": "", "eos_token": ""} | {name: token for name, (token, _) in ids.items()}
    single = f"{parts['bos_token']} $A {parts['eos_token']}".strip()
    if ids:
        backend.post_processor = processors.TemplateProcessing(single, special_tokens=[*ids.values()])  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **specials)
    fast.save_pretrained(directory)
    return str(directory)


def word_level(directory):
    """Words and marks; <s> </s> <unk> <pad>; the miniature's kind."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = split
    trainer = trainers.WordLevelTrainer(
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return save(
        backend, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def byte_level(directory, control=CONTROL["chatml"], bos=None, adds=("bos_token",), **names):
    """GPT-2-like byte-level BPE as in Qwen and Llama 3."""
    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(
        Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        behavior="isolated",
    )
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte])
    backend.decoder = decoders.ByteLevel()
    specials = [*dict.fromkeys(["<|endoftext|>", *control, *([bos] if bos else [])])]
    trainer = trainers.BpeTrainer(
        vocab_size=550 + len(specials),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, "\n\n", "a\n\nb"], trainer)
    named = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"} | names
    if bos:
        return save(backend, directory, adds, bos_token=bos, **named)
    return save(backend, directory, (), **named)


def llama_like(directory, control=(), strip_after=False, adds=("bos_token",), **settings):
    """BPE over "▁" with byte fallback, a dummy prefix and <s> </s> <unk>: SentencePiece's kind (Vicuna, Phi-3)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    # Merges across words do not occur in Llama's vocabulary: train on words, then drop the splitter.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), behavior="merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=pieces, show_progress=False)
    backend.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    state = json.loads(backend.to_str())
    state["added_tokens"] = [
        t for t in state["added_tokens"] if t["id"] < 3
    ]  # byte pieces are ordinary
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens(
        [AddedToken(c, rstrip=strip_after, special=True, normalized=False) for c in control]
    )
    save(backend, directory, adds, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return with_settings(directory, **settings)


def with_settings(directory, **settings):
    """The directory, after these fields of its tokenizer_config.json were set."""
    path = Path(directory) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(directory)


def sentencepiece(directory, **settings):
    """tokenizer.model alone, as Vicuna and LLaVA are published, with Llama's options of SentencePiece."""
    from sentencepiece import SentencePieceTrainer

    Path(directory).mkdir(parents=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter([text.replace("\n", " ") for text in CORPUS]), model_prefix=f"{directory}/tokenizer",
        vocab_size=480, model_type="bpe", byte_fallback=True, normalization_rule_name="identity", character_coverage=1.0,
        split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (Path(directory) / "tokenizer.vocab").unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    fields = {"tokenizer_class": "LlamaTokenizer", **names, "sp_model_kwargs": {}, **settings}
    (Path(directory) / "tokenizer_config.json").write_text(json.dumps(fields))
    return str(directory)


def saved_again(make, directory):
    """What `make` writes, read and saved by transformers, which leaves settings out."""
    published = make(Path(directory) / "published")
    AutoTokenizer.from_pretrained(published).save_pretrained(directory)
    return str(directory)


_LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
_RESERVED = tuple(f"<|reserved_special_token_{i}|>" for i in range(251))
_GPT2 = {"tokenizer_class": "GPT2Tokenizer"}


def gpt2_like(directory, bos, eos, **settings):
    """A BOS is named and nothing adds it (GPT-2, Pythia, SmolLM)."""
    byte_level(directory, bos=bos, adds=(), eos_token=eos)
    return with_settings(directory, **(_GPT2 | settings))


def vocabulary_files(directory, **settings):
    """vocab.json and merges.txt without tokenizer.json, as GPT-2 was first published."""
    gpt2_like(directory, bos="<|endoftext|>", eos="<|endoftext|>", **settings)
    path = Path(directory) / "tokenizer.json"
    state = json.loads(path.read_text())
    path.unlink()
    vocabulary = state["model"]["vocab"] | {t["content"]: t["id"] for t in state["added_tokens"]}
    (path.parent / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(merge) for merge in state["model"]["merges"])
    (path.parent / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return str(directory)


# name -> builder of a directory in the shape of a published one
REAL = {
    "llama legacy": functools.partial(llama_like, legacy=True, **_LLAMA),
    "llama": functools.partial(llama_like, legacy=False, **_LLAMA),
    "llama without a class": llama_like,
    "llama that adds both": functools.partial(llama_like, adds=("bos_token", "eos_token")),
    "vicuna": functools.partial(sentencepiece, legacy=False, add_bos_token=True),
    "vicuna legacy": functools.partial(sentencepiece, legacy=True, add_bos_token=True),
    "vicuna saved again": functools.partial(
        saved_again, functools.partial(sentencepiece, legacy=False, add_bos_token=True)
    ),
    "phi3": functools.partial(
        llama_like, control=CONTROL["phi3"], strip_after=True, adds=(), legacy=False,
        tokenizer_class="LlamaTokenizer", add_bos_token=False,
    ),
    "phi3 that adds bos": functools.partial(
        llama_like, control=CONTROL["phi3"], strip_after=True, legacy=False, **_LLAMA
    ),
    "qwen": lambda directory: with_settings(
        byte_level(directory), tokenizer_class="Qwen2Tokenizer", add_bos_token=False, bos_token=None
    ),
    "llama3": functools.partial(
        byte_level, control=(*CONTROL["llama3"], *_RESERVED), bos="<|begin_of_text|>", eos_token="<|eot_id|>"
    ),
    "gpt2": functools.partial(gpt2_like, bos="<|endoftext|>", eos="<|endoftext|>"),
    "smollm": functools.partial(gpt2_like, bos="<|im_start|>", eos="<|im_end|>"),
    "add_bos_token false": functools.partial(gpt2_like, bos="<|bos|>", eos="<|im_end|>", add_bos_token=False),
    "add_bos_token lost": functools.partial(
        saved_again, functools.partial(gpt2_like, bos="<|bos|>", eos="<|im_end|>", add_bos_token=False)
    ),
    "add_bos_token true": functools.partial(gpt2_like, bos="<|bos|>", eos="<|im_end|>", add_bos_token=True),
    "vocab.json": vocabulary_files,
    "vocab.json that adds bos": functools.partial(vocabulary_files, add_bos_token=True),
}  # fmt: skip
