#!/usr/bin/env python3
"""Questions per second of the harness, beside a plain transformers loop on the same model, questions and machine.

scripts/bench/evaluate.py [--questions 96] [--batch 16] [--rounds 3] [--new 16] [--lm WIDTH LAYERS] [--vit WIDTH LAYERS]

Writes a LLaVA of random weights (24 x 24 patches of 336 pixels) in both formats, questions of several lengths and 640 x 480
JPEG pictures. Then, each in a process of its own and in turns (turns.py), all questions are answered greedily by

    ours          answer.Answerer.ask, what `vlm_jax.evaluate` calls: pictures from the files, texts out
    ours, replies answer.Answerer.likelihoods of "Yes" and "No" instead of an answer
    plain         batches in file order: PIL, processor, generate, batch_decode
    one by one    the same with a batch of 1, as LLaVA's own evaluation scripts do

for V = 576 (no compressor) and V = 1 (the mean of all patches, in torch a projector that takes the mean first). Loading and
compiling are outside the times; the first pass, with compilation, is printed beside them. "equal" is the share of
questions whose texts are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import turns

ROOT = Path(__file__).resolve().parents[2]

WORDS = [
    "what",
    "is",
    "the",
    "colour",
    "of",
    "small",
    "large",
    "animal",
    "on",
    "table",
    "to",
    "left",
    "right",
    "behind",
    "in",
    "front",
    "person",
    "car",
    "dog",
    "cat",
    "red",
    "blue",
]
ENDING = "Answer the question using a single word or phrase."


def write_data(folder: Path, count: int) -> list[dict[str, Any]]:
    """Pictures, a tokenizer and LLaVA records with questions of 5 to 40 words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{i}.jpg", quality=90)
        question = " ".join(rng.choice(WORDS, rng.integers(5, 41)))
        said = {"from": "human", "value": f"<image>\n{question} ? {ENDING}"}
        rows.append({"id": str(i), "image": f"images/{i}.jpg", "conversations": [said], "replies": ("Yes", "No")})  # fmt: skip
    marks = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    frame = [
        "A",
        "chat",
        "between",
        "curious",
        "user",
        "and",
        "an",
        "artificial",
        "intelligence",
        "assistant",
        "gives",
        "helpful",
        "detailed",
        "polite",
        "answers",
    ]
    known = [
        *marks,
        *WORDS,
        *ENDING.replace(".", "").split(),
        *frame,
        *["USER", "ASSISTANT", ":", ".", ",", "?", "'", "s", "Yes", "No"],
    ]
    known += [f"w{i}" for i in range(1000 - len(dict.fromkeys(known)))]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(known))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(marks)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # words with spaces between them
    bos = ("<s>", vocabulary["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return rows


def write_run(
    folder: Path, data: Path, compressor: dict[str, Any], lm: tuple[int, int], vit: tuple[int, int]
) -> Path:
    """A workdir of ours with random weights, large enough that answers depend on the question."""
    import jax
    from flax import linen as nn

    from configs import default
    from vlm_jax import compressors
    from vlm_jax.models.vlm import init_params
    from vlm_jax.storage import run as experiment
    from vlm_jax.storage.checkpoint import save_params

    c = default.get_config()

    def tower(width: int, layers: int) -> dict[str, Any]:
        return {"width": width, "num_layers": layers, "num_heads": width // 32, "dtype": "float32"}

    c.model.vit.preset = "clip-l-336"
    c.model.vit.update(tower(*vit) | {"mlp_width": 4 * vit[0]})
    compressors.choose(c.model.compressor, dtype="float32", **compressor)
    c.model.lm.preset = "vicuna-7b"
    sizes = {
        "vocab_size": 1000,
        "num_kv_heads": lm[0] // 32,
        "head_dim": 32,
        "mlp_width": 3 * lm[0],
    }
    c.model.lm.update(tower(*lm) | sizes | {"remat": "none"})
    c.data.update({"tokenizer": str(data / "tokenizer"), "max_tokens": 1024})
    exp = experiment.resolve(c)
    folder.mkdir()
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(exp.model, jax.random.key(0)))
    save_params(folder, jax.tree.map(lambda x: 4.0 * x if x.ndim > 1 else x, params))
    experiment.write(exp, folder)
    return folder


Timed = tuple[float, dict[str, Any]]  # seconds, and the answers by id


def ours(
    run: Path, data: Path, rows: Sequence[dict], batch: int, new: int, replies: bool
) -> Callable[[], Timed]:
    from vlm_jax.inference.answer import Answerer
    from vlm_jax.inference.settings import EvalConfig
    from vlm_jax.settings.run import MeshConfig

    answerer = Answerer(EvalConfig(str(run), 1, new), MeshConfig())
    ask = answerer.likelihoods if replies else answerer.ask

    def go() -> Timed:
        start = time.perf_counter()
        found = {i: said for told in ask(rows, str(data), batch) for i, said in told}
        return time.perf_counter() - start, found

    return go


def plain(
    model_dir: Path, data: Path, rows: Sequence[dict], batch: int, new: int, pooled: bool
) -> Callable[[], Timed]:
    """The loop that one writes with transformers."""
    import jax
    import torch
    import transformers

    place = "cuda" if jax.default_backend() == "gpu" else "cpu"
    processor = transformers.AutoProcessor.from_pretrained(model_dir, backend="pil")
    processor.tokenizer.padding_side = "left"
    model = transformers.AutoModelForImageTextToText.from_pretrained(model_dir).to(place).eval()
    if pooled:
        projector = model.model.multi_modal_projector
        project = projector.forward
        projector.forward = lambda features: project(features.mean(dim=1, keepdim=True))
        processor.patch_size, processor.num_additional_image_tokens = 336, 0  # one place per image
        processor.vision_feature_select_strategy = "full"
    texts = {}
    for row in rows:
        words = row["conversations"][0]["value"].removeprefix("<image>\n")
        content = [{"type": "image"}, {"type": "text", "text": words}]
        said = [{"role": "user", "content": content}]
        texts[row["id"]] = processor.apply_chat_template(said, add_generation_prompt=True)

    def go() -> Timed:
        start, found = time.perf_counter(), {}
        for at in range(0, len(rows), batch):
            part = rows[at : at + batch]
            images = [Image.open(data / row["image"]).convert("RGB") for row in part]
            inputs = processor(images=images, text=[texts[row["id"]] for row in part], padding=True, return_tensors="pt").to(place)  # fmt: skip
            with torch.inference_mode():
                tokens = model.generate(**inputs, do_sample=False, max_new_tokens=new)
            said = tokens[:, inputs["input_ids"].shape[1] :]
            said = processor.batch_decode(said, skip_special_tokens=True)
            found |= {row["id"]: text.strip() for row, text in zip(part, said, strict=True)}
        return time.perf_counter() - start, found

    return go


def compare(sides: dict[str, turns.Side], rounds: int, count: int) -> None:
    found = turns.take(sides, 1 + rounds)
    seconds = {name: [turn[0] for turn in each[1:]] for name, each in found.items()}
    for name, times in seconds.items():
        ratios = [b / a for a, b in zip(seconds["ours"], times, strict=True)]
        print(
            f"  {name:14} {count / statistics.median(times):8.2f} questions/s ({min(times):.2f}-{max(times):.2f} s; first pass"
            f" {found[name][0][0]:.2f} s)   ours / this {statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        )
    mine, theirs = found["ours"][0][1], found["plain"][0][1]
    equal = np.mean([mine[i] == theirs[i] for i in mine])
    print(f"  equal texts of ours and plain: {equal:.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name, value in (
        ("questions", 96),
        ("batch", 16),
        ("rounds", 3),
        ("new", 16),
        ("width", 128),
        ("layers", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    # As in a real model most of the work is the decoder's: its layers have 70 times the encoder's parameters.
    for name, value in (("lm", (256, 8)), ("vit", (64, 2))):
        parser.add_argument(
            f"--{name}", type=int, nargs=2, default=value, metavar=("WIDTH", "LAYERS")
        )
    args = parser.parse_args()
    turns.begin()
    import jax
    import torch
    import transformers

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; jax {jax.__version__} on "
        f"{jax.default_backend()}; torch {torch.__version__}, {torch.get_num_threads()} threads; transformers "
        f"{transformers.__version__}; {args.questions} questions, batch {args.batch}, {args.new} new tokens, decoder of width "
        f"{args.lm[0]} with {args.lm[1]} layers, encoder of {args.vit[0]} with {args.vit[1]}", flush=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        rows = write_data(root / "data", args.questions)
        shape = (tuple(args.lm), tuple(args.vit))
        whole = write_run(root / "whole", root / "data", {"name": "identity"}, *shape)
        mean = write_run(root / "mean", root / "data", {"name": "pool", "stride": 24}, *shape)
        convert = [
            sys.executable,
            ROOT / "scripts" / "convert_hf.py",
            whole,
            root / "hf",
            "--standalone",
        ]
        subprocess.run(convert, check=True, capture_output=True)
        for tokens, run in ((1, mean), (576, whole)):
            mine = (run, root / "data", rows)
            theirs = (root / "hf", root / "data", rows)
            sides = {
                "ours": turns.Side(ours, (*mine, args.batch, args.new, False), True),
                "ours, replies": turns.Side(ours, (*mine, args.batch, args.new, True), True),
                "plain": turns.Side(plain, (*theirs, args.batch, args.new, tokens == 1), False),
                "one by one": turns.Side(plain, (*theirs, 1, args.new, tokens == 1), False),
            }
            print(f"V = {tokens}")
            compare(sides, args.rounds, args.questions)


if __name__ == "__main__":
    main()
