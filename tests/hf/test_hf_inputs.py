"""Tokenizer and images of a model directory: the same ids and pixels as transformers makes, without torch."""

import json
import shutil
import subprocess
import sys

import hf_models
import numpy as np
import pytest
import transformers
from PIL import Image
from refs import tokenizers

from vlm_jax.data import images, sources, tokenizer
from vlm_jax.data.chat import Chat
from vlm_jax.hf import settings
from vlm_jax.settings.checks import ConfigError

PX = 24
CLIP = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])  # fmt: skip
HALF = dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
EDGE = dict(size={"shortest_edge": PX}, crop_size={"height": PX, "width": PX}, do_center_crop=True)
# name -> (processor, preprocessor_config.json, our image_mode and resample)
PROCESSORS = {
    "clip": ("CLIPImageProcessorPil", {"image_processor_type": "CLIPImageProcessor", "resample": 3, **EDGE, **CLIP}, ("crop", "bicubic")),
    "clip, numbers": ("CLIPImageProcessorPil", {"size": PX, "crop_size": PX, "do_center_crop": True, "resample": 3, **CLIP}, ("crop", "bicubic")),
    "siglip": (
        "SiglipImageProcessorPil", {"size": {"height": PX, "width": PX}, "resample": 3, "rescale_factor": 0.00392156862745098, **HALF},
        ("stretch", "bicubic"),
    ),
    "siglip 2": ("SiglipImageProcessorPil", {"size": {"height": PX, "width": PX}, "resample": 2, **HALF}, ("stretch", "bilinear")),
    "llava, padded": ("LlavaImageProcessorPil", {"do_pad": True, "resample": 3, **EDGE, **CLIP}, ("pad", "bicubic")),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(31, 57), (90, 40), (24, 24), (13, 20)])
def test_pixels_are_those_of_the_directory_s_own_processor(name, shape, tmp_path):
    cls, content, (mode, resample) = PROCESSORS[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    found = settings.preprocessing(tmp_path, PX)
    assert (found["image_mode"], found["resample"]) == (mode, resample)
    picture = Image.fromarray(np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8))  # fmt: skip
    picture.save(tmp_path / "picture.png")
    pixels = images.load(str(tmp_path / "picture.png"), PX, mode, found["mean"], 10**6, resample)
    ours = (pixels / 255 - np.array(found["mean"])) / np.array(found["std"])
    theirs = getattr(transformers, cls).from_pretrained(tmp_path)(picture, return_tensors="np")
    difference = (ours.transpose(2, 0, 1) - theirs["pixel_values"][0]) * np.array(found["std"])[:, None, None]  # fmt: skip
    assert np.abs(difference).max() <= 1 / 255 + 1e-6
    if mode != "pad":
        assert np.abs(difference).max() < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"resample": 1}, r"resample 1 is not 2 \(bilinear\) or 3"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor .* is not 1/255"),
        ({"size": {"height": 32, "width": 32}}, "images of 32 px, but the encoder takes 24 px"),
        ({"size": {"height": 24, "width": 48}}, "24x48 px is no square"),
        ({"size": {"shortest_edge": 30}, "crop_size": 24, "do_center_crop": True}, "resized to 30 px and cropped to 24"),
    ],
)  # fmt: skip
def test_a_step_that_is_not_taken_here_is_named(change, message, tmp_path):
    content = PROCESSORS["siglip"][1] | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        settings.preprocessing(tmp_path, PX)


def llava_tokenizer(folder):
    """One that knows <image> as a token of its own, as LLaVA's do."""
    hf = transformers.AutoTokenizer.from_pretrained(tokenizers.llama_like(folder))
    hf.add_tokens(["<image>"], special_tokens=True)
    hf.save_pretrained(folder / "llava")
    return tokenizer.load(str(folder / "llava"))


def talk(question: str, answer: str = "yes", image: str = "") -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "r", "conversations": turns} | ({"image": image} if image else {})


def test_the_image_token_of_a_user_never_becomes_an_id(tmp_path):
    known = llava_tokenizer(tmp_path)
    image_id = known.token_id("<image>")
    assert image_id is not None and known.encode("a <image> b")[0].count(image_id) == 1
    chat = Chat(known, "vicuna_v1", None, "dialogue", 4, 200, 16, 1)

    row = chat.encode(
        sources.parse(talk("<image>\nWhat is it?", image="a.png"), "file", "here", "0")
    )
    assert (row.visual_index >= 0).sum() == 4 and image_id not in row.tokens

    refused = [
        talk("What does <image> mean?"),  # no image at all
        talk("<image>\nWhat does <image> mean?", image="a.png"),  # one too many
        talk("<image>\nWhat is it?", "It says <image>.", image="a.png"),
    ]
    for raw in refused:
        with pytest.raises(sources.BadRecord, match="<image>"):
            chat.encode(sources.parse(raw, "file", "here", "0"))
    system = {"from": "system", "value": "Look at <image>."}
    raw = talk("Why?") | {"conversations": [system, *talk("Why?")["conversations"]]}
    with pytest.raises(sources.BadRecord, match="control token '<image>'"):
        chat.encode(sources.parse(raw, "file", "here", "0"))


WITHOUT_TORCH = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
hidden = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
importlib.machinery.PathFinder.find_spec = hidden
from vlm_jax import sharding
from vlm_jax.hf import named
from vlm_jax.storage import weights
from vlm_jax.compressors import settings as compressor_settings
from vlm_jax.settings.model import VLMConfig
from vlm_jax.settings.run import MeshConfig
from vlm_jax.data import tokenizer
folder = sys.argv[1]
known = tokenizer.load(folder)
config = VLMConfig(named.vit("mini"), compressor_settings("identity"), named.lm(folder))
wanted = weights.abstract(config, sharding.make_mesh(MeshConfig()))
embed = weights.load(folder, config, {"lm": wanted["lm"]})["lm"]["embed"]
print(known.encode("What colour is this ?")[0], embed.shape, float(embed[3, 4]))
"""


@pytest.mark.slow
def test_a_directory_is_read_without_torch(tmp_path):
    folder = hf_models.build("qwen2, biases", tmp_path / "qwen")
    shutil.copytree(tokenizers.byte_level(tmp_path / "tokenizer"), folder, dirs_exist_ok=True)
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(folder)], capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr
    from safetensors.numpy import load_file

    value = load_file(folder / "model.safetensors")["model.embed_tokens.weight"][3, 4]
    ids = transformers.AutoTokenizer.from_pretrained(folder)("What colour is this ?")["input_ids"]
    assert len(ids) > 4 and run.stdout == f"{ids} (67, 32) {float(value)}\n"
