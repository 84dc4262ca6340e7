"""Records of many lengths, with and without pictures, for the tests of batches; the tokenizer knows every word."""

import json
from pathlib import Path

import tiny
from PIL import Image

from vlm_jax.settings import presets
from vlm_jax.settings.run import DataConfig

M = 4  # visual tokens per image
PX = 8
VIT = presets.vit("mini", image_px=PX, mean=(0.5, 0.25, 0.75))
NUM = 26


def write(directory: Path, num: int = NUM) -> Path:
    """`num` records, one or two turns each; two of three have a picture of their own colour (i, 100 + i, 200)."""
    (directory / "images").mkdir(parents=True)
    records = []
    for i in range(num):
        turns = ["What colour is this " * (1 + i % 4) + "?", "red"]
        if i % 2:
            turns += ["Is it bright ?", "Yes . " * (1 + i % 5)]
        if i % 3:
            turns[0] = "<image>\n" + turns[0]
            Image.new("RGB", (16, 16), (i, 100 + i, 200)).save(directory / "images" / f"{i}.png")
        records.append(tiny.record(f"r{i}", turns, f"{i}.png" if i % 3 else ""))
    (directory / "a.json").write_text(json.dumps(records))
    tiny.write_tokenizer(directory / "tokenizer")
    return directory


def has_image(name: str) -> bool:
    return int(name[1:]) % 3 > 0


def config(directory: Path, **fields) -> DataConfig:
    base = tiny.config(directory).data.to_dict() | {
        "annotations": (str(directory / "a.json"),), "image_roots": (str(directory / "images"),), "max_tokens": 64,
        "max_query_tokens": 6, "batch_size": 4, "seed": 3,
    }  # fmt: skip
    return DataConfig(**base | fields)
