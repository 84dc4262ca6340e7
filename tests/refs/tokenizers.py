"""Small tokenizers of the three kinds in use, trained in a moment and saved as Hugging Face directories."""

import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

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


def save(backend, directory, **specials):
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


def byte_level(directory, control=CONTROL["chatml"], bos=None):
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
    specials = ["<|endoftext|>", *control, *([bos] if bos else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, "\n\n", "a\n\nb"], trainer)
    names = {"bos_token": bos} if bos else {}
    return save(backend, directory, eos_token="<|endoftext|>", pad_token="<|endoftext|>", **names)


def llama_like(directory, control=(), strip_after=False, tokenizer_class=None):
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
    directory = save(backend, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if tokenizer_class:
        path = f"{directory}/tokenizer_config.json"
        with open(path) as file:
            config = json.load(file)
        with open(path, "w") as file:
            json.dump({**config, "tokenizer_class": tokenizer_class}, file)
    return directory
