"""The paper's experiment in a minute: model directories that transformers writes, real photographs, native benchmark files.

`write(folder)` makes what `get_config` names: models/{clip,small,middle,large}, train.json about twelve photographs, and
benchmarks/{gqa,pope,docvqa}. The file is also the config: --config=tests/helpers/tiny_paper.py --config.sweep.inputs=FOLDER.
"""

import json
import shutil
from pathlib import Path

from configs import default

# name -> width, MLP width, layers, key/value heads of 4 heads
LMS = {"small": (32, 48, 1, 4), "middle": (32, 96, 2, 2), "large": (64, 128, 2, 4)}
SIDE, PATCH = 56, 14  # of the images: 4 x 4 patches


def get_config():
    c = default.get_config()
    with c.unlocked():
        c.sweep = sweep()
    c.model.compressor.unlock()
    c.model.vit.preset = "models/clip"
    c.model.vit.dtype = "float32"
    c.model.compressor.update({"name": "tokenpacker", "num_heads": 2, "taps": (1, 2), "dtype": "float32"})  # fmt: skip
    c.model.lm.dtype, c.model.lm.remat = "float32", "none"
    c.data.system = ""
    c.train.save_every = 1
    c.eval.batch_size, c.eval.max_new_tokens = 12, 3
    return c


def sweep():
    s = default.sweep()
    s.title = "A tiny paper"
    s.lms = tuple(f"models/{name}" for name in LMS)
    s.visual_tokens = (1, 4, 16)
    s.benchmarks = ("gqa", "pope", "docvqa")
    s.annotations = tuple(f"benchmarks/{name}" for name in s.benchmarks)
    s.plan_budget_gflops = 0.01
    s.stages.align = default.stage(
        annotations=("train.json",), trainable="^(compressor|projector)/", steps=2, batch_size=8, text_tokens=112,
        learning_rate=1e-3,
    )  # fmt: skip
    s.stages.tune = default.stage(
        annotations=("train.json",), trainable="^(compressor|projector|lm)/", epochs=0.4, batch_size=8,
        text_tokens=112, learning_rate=1e-3, init={"compressor": "align", "projector": "align"},
    )  # fmt: skip
    return s


def write(folder: Path) -> None:
    import photos  # a helper of the tests; a config file is read without them

    photos.write(folder)
    names = list(photos.PHOTOS)
    records = []
    for i, (name, (_, _, caption)) in enumerate(photos.PHOTOS.items()):
        other = names[(i + 5) % len(names)]
        for j, (question, answer) in enumerate(
            (
                ("Describe the photo.", caption),
                (f"Is there a {name} in the image?", "yes"),
                (f"Is there a {other} in the image?", "no"),
                ("What is this?", name),
                ("Which of the photos is it?", f"number {i}"),
            )
        ):
            records.append(photos.record(f"{name}-{j}", [name], f"<image>\n{question}", answer))
    (folder / "train.json").write_text(json.dumps(records))
    write_benchmarks(folder, names)
    write_models(folder)


def write_benchmarks(folder: Path, names: list[str]) -> None:
    def place(benchmark: str, images: str) -> Path:
        shutil.copytree(folder / "images", folder / "benchmarks" / benchmark / images)
        return folder / "benchmarks" / benchmark

    gqa = {name: {"imageId": name, "question": "What is this?", "answer": name} for name in names}
    path = place("gqa", "images") / "testdev_balanced_questions.json"
    path.write_text(json.dumps(gqa))
    path = place("pope", "val2014")
    for split in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": i, "image": f"{name}.jpg", "text": f"Is there a {asked} in the image?", "label": label}
            for i, (name, asked, label) in enumerate(
                (name, asked, label)
                for j, name in enumerate(names[:6])
                for asked, label in ((name, "yes"), (names[(j + 3) % 12], "no"))
            )
        ]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / f"coco_pope_{split}.json").write_text(text)
    data = [
        {"questionId": i, "question": "What is this?", "image": f"documents/{name}.jpg", "answers": [name]}
        for i, name in enumerate(names)
    ]  # fmt: skip
    path = place("docvqa", "documents") / "val_v1.0.json"
    path.write_text(json.dumps({"data": data}))


def write_models(folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
    )  # fmt: skip
    transformers.CLIPVisionModel(vision).save_pretrained(folder / "models" / "clip")
    for name, (width, mlp, layers, kv) in LMS.items():
        config = transformers.LlamaConfig(
            vocab_size=512, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=kv, max_position_embeddings=256, bos_token_id=2, eos_token_id=3, pad_token_id=0,
        )  # fmt: skip
        place = folder / "models" / name
        transformers.LlamaForCausalLM(config).save_pretrained(place)
        for file in (folder / "tokenizer").iterdir():
            shutil.copy(file, place)
