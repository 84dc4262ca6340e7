"""A made-up LLaVA folder and a model that trains in a second: for tests of the machinery, not of the learning.

`write(directory)` makes eight 24 x 16 pictures of one colour each, `data.json` (one or two turns each; the last two records
have no picture) and `tokenizer/`, one token per word. `config(directory)` is an experiment config for it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from configs import default

COLOURS = {
    "red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40), "white": (250, 250, 250),
    "black": (5, 5, 5), "purple": (150, 40, 190), "orange": (240, 140, 20),
}  # fmt: skip
WORDS = [
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "USER",
    "ASSISTANT",
    ":",
    "?",
    ".",
    "What",
    "colour",
    "is",
    "this",
    "Is",
    "it",
    "bright",
    "Yes",
    "No",
    "Say",
    "hello",
    "one",
    "image",
]


def write(directory: Path, words: Sequence[str] = ()) -> Path:
    """Writes the folder and returns its path; with `words` the data also say each of them."""
    (directory / "images").mkdir(parents=True)
    records = []
    for i, (name, rgb) in enumerate(COLOURS.items()):
        Image.new("RGB", (24, 16), rgb).save(directory / "images" / f"{name}.png")
        turns = ["<image>\nWhat colour is this ?", name]
        if i % 2:
            turns += ["Is it bright ?", "Yes" if sum(rgb) > 300 else "No"]
        records.append(record(name, turns, f"images/{name}.png"))
    records += [record(word, [f"Say {word}", word]) for word in ("hello", "one", *words)]
    (directory / "data.json").write_text(json.dumps(records))
    write_tokenizer(directory / "tokenizer", words)
    return directory


def record(name: str, turns: list[str], image: str = "") -> dict:
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": name, **({"image": image} if image else {}), "conversations": said}


def write_tokenizer(directory: Path, words: Sequence[str] = ()) -> None:
    directory.mkdir()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*WORDS, *COLOURS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<pad>", "<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    bos = ("<s>", vocabulary["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>",
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def config(directory: Path, **train: int) -> ConfigDict:
    """A 16-pixel encoder (grid 2), TokenPacker, a 2-layer decoder of width 16; `train` replaces fields of that block."""
    c = default.get_config()
    c.model.vit.preset = "mini"
    c.model.vit.update(
        {
            "image_px": 16,
            "patch_px": 8,
            "width": 8,
            "num_heads": 2,
            "mlp_width": 16,
            "dtype": "float32",
        }
    )
    c.model.compressor.update(
        {"name": "tokenpacker", "stride": 2, "num_heads": 2, "taps": (), "dtype": "float32"}
    )
    c.model.projector_norm = (
        "rms"  # without it the colours of such a small encoder take long to learn
    )
    c.model.lm.update(
        {
            "preset": "", "vocab_size": 64, "width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8,
            "mlp_width": 32, "rope_theta": 1e4, "norm_eps": 1e-6, "qkv_bias": False, "qk_norm": False,
            "tied_embeddings": False, "dtype": "float32", "remat": "none",
        }
    )  # fmt: skip
    c.data.update(
        {
            "annotations": (str(directory / "data.json"),), "image_roots": (str(directory),),
            "tokenizer": str(directory / "tokenizer"), "system": "", "max_tokens": 32, "max_query_tokens": 8,
            "batch_size": 4,
        }
    )  # fmt: skip
    c.optim.update({"learning_rate": 1e-2, "trainable": "^(compressor|projector|lm)/"})
    c.train.update({"num_steps": 6, "log_every": 2, "save_every": 3, "random_frozen": True} | train)
    return c


def with_models(directory: Path, place: Path | str, **train_fields) -> ConfigDict:
    """`config` with the encoder and the decoder of hf_models in `place`; the encoder stays as it is."""
    cfg, fresh = config(directory, **train_fields), default.get_config()
    for part, name in (("vit", "clip tower"), ("lm", "llama, many shards")):
        cfg.model[part].update(
            fresh.model[part].to_dict() | {"preset": f"{place}/{name}", "dtype": "float32"}
        )
        cfg.init[part] = f"{place}/{name}"
    cfg.model.lm.remat = "none"
    cfg.model.compressor.stride = 3
    return cfg
