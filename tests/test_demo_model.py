"""The demonstration model's scripts: scenes and their sentences, its scores, and the whole road with a tiny decoder."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import hf_models
import numpy as np
import pytest
import scenes
import score
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]
TWO = scenes.Scene(
    "a cat", (scenes.Shape("orange", "disc", "left", 16, 30, 10), scenes.Shape("blue", "ring", "right", 46, 30, 10))
)  # fmt: skip


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def test_the_same_seed_gives_the_same_bytes_and_new_pairs_are_new(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "HELD_OUT", 8)
    monkeypatch.setattr(scenes, "NEW", 8)
    for name in ("a", "b"):
        scenes.write(tmp_path / name, 24, seed=3)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    train, new = (
        [m["value"] for r in read(tmp_path / "a" / f"{f}.json") for m in r["conversations"]]
        for f in ("train", "new_pairs")
    )
    pairs = [" ".join(pair) for pair in scenes.NEW_PAIRS]
    told = [text for text in train if not text.startswith(("<image>\nIs there", "No, "))]
    assert not [text for text in told for pair in pairs if pair in text]
    assert any(pair in text for text in new for pair in pairs)
    assert len(read(tmp_path / "a" / "held_out.json")) == 2 * 8
    captions = read(tmp_path / "a" / "captions.json")
    assert len(captions) == 24 and {r["conversations"][0]["value"] for r in captions} == {"<image>\nDescribe the picture."}  # fmt: skip


def test_every_question_is_answered_as_the_scene_is():
    rng = np.random.default_rng(0)
    found = {turn for _ in range(40) for turn in scenes.turns(TWO, rng)}
    assert {
        ("count", "How many shapes are there?", "There are two shapes."),
        ("photo", "What is in the background?", "In the background is a cat."),
        ("colour", "What colour is the ring?", "The ring is blue."),
        ("shape", "Which shape is orange?", "The disc is orange."),
        ("where", "Where is the disc?", "The disc is on the left."),
        ("side", "What is on the right?", "On the right is a blue ring."),
        ("there", "Is there an orange disc?", "Yes, there is an orange disc."),
        ("describe", "Describe the picture.", "An orange disc on the left and a blue ring on the right, before a photograph of a cat."),
    } <= found  # fmt: skip
    denied = {question for kind, question, answer in found if answer.startswith("No,")}
    assert denied and not denied & {"Is there an orange disc?", "Is there a blue ring?"}
    empty = scenes.turns(scenes.Scene("coins", ()), rng)
    assert {answer for _, _, answer in empty} == {
        "There are no shapes.", "This is a photograph of coins.", "A photograph of coins.",
    }  # fmt: skip


def test_shapes_are_painted_where_and_as_they_are_said_to_be():
    picture = scenes.draw(TWO, Image.new("RGB", (80, 80)), np.random.default_rng(0))
    pixels = np.asarray(picture)
    assert tuple(pixels[30, 16]) == scenes.COLOURS["orange"]
    assert tuple(pixels[30, 46]) == (0, 0, 0) and tuple(pixels[30, 39]) == scenes.COLOURS["blue"]
    named = scenes.listing(TWO)[2].split()
    assert len(named) == 64 and named[3 * 8 + 1] == "orange_disc" and named[0] == "a_cat"


def test_the_wilson_interval_is_the_published_one():
    """8 of 10: 0.490 to 0.943 (Newcombe 1998's formula, worked by hand)."""
    assert score.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert score.wilson(0, 5)[0] == 0.0 and score.wilson(5, 5)[1] == 1.0


def test_scores_are_counted_by_kind_beside_those_of_a_blind_answerer(tmp_path):
    def write(name, turns):
        records = [scenes.record(f"{kind}-{i}", "x.png", [("", q, a)]) for i, (kind, q, a) in enumerate(turns)]  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(records))

    write("train", [("colour", "Which?", "Red."), ("colour", "Which?", "Red."), ("colour", "Which?", "Blue.")])  # fmt: skip
    write("held_out", [("colour", "Which?", "Red."), ("colour", "Which?", "Blue."), ("count", "How many?", "One.")])  # fmt: skip
    write("new_pairs", [("colour", "Which?", "Red.")])
    out = tmp_path / "eval" / "llava"
    out.mkdir(parents=True)
    texts = {"colour-0/0": "red. ", "colour-1/0": "Red.", "count-2/0": "One."}
    out.joinpath("predictions.jsonl").write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in texts.items()))  # fmt: skip
    lines = score.table(tmp_path, tmp_path / "eval").splitlines()
    assert lines[0].startswith("| eval, held_out |")
    assert [line.split(" | ")[:3] for line in lines[2:]] == [["| colour", "0.50", "2"], ["| count", "1.00", "1"], ["| all", "0.67", "3"]]  # fmt: skip
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["0.50 |", "0.00 |", "0.33 |"]


def tiny_decoder(folder: Path) -> Path:
    """A random decoder whose byte-level tokenizer has ChatML's tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")  # fmt: skip
    made.save_pretrained(folder)
    hf_models.text("Llama", vocab_size=len(made), max_position_embeddings=256).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.slow
def test_the_script_makes_a_model_from_nothing(tmp_path):
    out = tmp_path / "demo"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "LM": str(tiny_decoder(tmp_path / "lm")),
        "TOKENS": "4", "PICTURES": "24", "ENCODER_STEPS": "1", "ALIGN_STEPS": "1", "LORA_STEPS": "1", "LIMIT": "3",
    }  # fmt: skip
    command = ["scripts/demo_model.sh", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made = read(out / "instruct_v4" / "config.json")["model"]
    assert made["compressor"]["name"] == "quecc" and made["lm"]["lora_rank"] == 16
    assert done.stdout.endswith(f"--model={out}/instruct_v4 PICTURE\n")
    assert done.stdout.count("| all |") == 2 and (out / "scores.md").read_text() in done.stdout
    when = {p: p.stat().st_mtime_ns for p in out.rglob("final.json")}
    assert len(when) == 3
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("final.json")} == when


def test_wrong_arguments_are_one_line_and_the_usage():
    for words, message in ((["--wrong"], "unknown argument '--wrong'"), (["a", "b"], "one folder at most, got 2")):  # fmt: skip
        done = subprocess.run(["scripts/demo_model.sh", *words], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 2 and message in done.stderr and "usage:" in done.stderr
