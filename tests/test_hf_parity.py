"""Imported models against transformers (torch, CPU, float32): logits, features and greedy answers.

`VLM_JAX_HF_DIRS=dir1:dir2 pytest tests/test_hf_parity.py -k outside -s` checks directories of your own and prints a table.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from compressor import compressor_config
from einops import rearrange

from vlm_jax import sharding
from vlm_jax.hf import named
from vlm_jax.hf.describe import describe
from vlm_jax.inference.generate import Decoding, make_generate
from vlm_jax.models.vlm import VLM, Inputs
from vlm_jax.settings.model import VLMConfig
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import weights

TOLERANCE = 2e-5
NEW_TOKENS = 32
OUTSIDE = [Path(p) for p in os.environ.get("VLM_JAX_HF_DIRS", "").split(":") if p]


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


class Compared(NamedTuple):
    """One row of the table."""

    what: str
    difference: float  # largest, relative to the largest value
    tokens: str  # greedy tokens that agree, of how many


def load(folder: Path, parts: tuple[str, ...], **fields) -> tuple[VLMConfig, dict]:
    """(the model, its parameters) with the given parts of a directory; what it lacks is a preset's."""
    found = describe(folder)
    vit = named.vit(str(folder) if "vit" in parts else "mini", **fields)
    lm = named.lm(str(folder) if "lm" in parts else "mini-38k")
    config = VLMConfig(vit, compressor_config("identity"), lm, found.projector_layers or 2)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    wanted = weights.abstract(config, mesh)
    return config, weights.load(str(folder), config, {part: wanted[part] for part in parts})


def relative(ours, theirs) -> float:
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def inputs_of(ids, valid, pixels=None, image_token: int = -1) -> Inputs:
    """Rows of ids with runs of image_token, as our pipeline would hand them over; pixels: uint8 [B I H W 3]."""
    is_image = (ids == image_token) & valid
    return Inputs(
        tokens=jnp.asarray(ids, jnp.int32),
        visual_index=jnp.asarray(
            np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1), jnp.int32
        ),
        positions=jnp.asarray(np.maximum(np.cumsum(valid, axis=1) - 1, 0), jnp.int32),
        segments=jnp.asarray(np.where(valid, 0, -1), jnp.int32),
        images=None if pixels is None else jnp.asarray(pixels),
    )


def compare_logits(config, params, inputs, model, ids, valid, **pixels) -> float:
    """Largest relative difference of one left-padded batch."""
    given = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(valid.astype(int)), **pixels)  # fmt: skip
    with torch.no_grad():
        positions = torch.tensor(np.array(inputs.positions, np.int64))
        theirs = model(**given, position_ids=positions).logits.numpy()
    ours = jax.jit(VLM(config).apply)({"params": params}, inputs)
    return relative(np.asarray(ours)[valid], theirs[valid])


def compare_answers(config, params, inputs, model, ids, valid, **pixels) -> str:
    """Greedy tokens that agree, of how many."""
    given = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(valid.astype(int)), **pixels)  # fmt: skip
    with torch.no_grad():
        settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        model.generation_config.eos_token_id = None
        said = model.generate(**given, **settings).numpy()[:, ids.shape[1] :]
    decoding = Decoding(NEW_TOKENS, (), 0)
    answers = np.asarray(
        make_generate(config, decoding)(params, inputs, jnp.zeros(len(ids), jnp.int32))
    )
    assert said.shape == answers.shape
    return f"{int((said == answers).sum())}/{said.size}"


def left_padded(rng, batch: int, length: int, high: int, low: int = 6):
    """Random ids and which of them are real: row i begins with 3 i pads."""
    ids = rng.integers(low, high, (batch, length))
    valid = np.arange(length)[None] >= 3 * np.arange(batch)[:, None]
    return np.where(valid, ids, 0), valid


def compare_decoder(folder: Path, answers: bool = True) -> Compared:
    config, params = load(folder, ("lm",))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids, valid = left_padded(np.random.default_rng(0), 3, 17, config.lm.vocab_size)
    batch = (config, params, inputs_of(ids, valid), model, ids, valid)
    return Compared("logits", compare_logits(*batch), compare_answers(*batch) if answers else "")


def compare_encoder(folder: Path) -> Compared:
    """The feature that a compressor gets, at the default layer and at the last."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model = model.vision_model if hasattr(model, "text_model") else model
    differences = []
    for fields in ({}, {"feature_layer": -1}):
        config, params = load(folder, ("vit",), **fields)
        vit = config.vit
        images = np.random.default_rng(1).integers(0, 256, (2, vit.image_px, vit.image_px, 3), dtype=np.uint8)  # fmt: skip
        encode = jax.jit(lambda p, x, c=config: VLM(c).apply(p, x, method=VLM.image_features).last)
        ours = encode({"params": params}, jnp.asarray(images))
        pixels = torch.tensor((images / 255 - np.array(vit.mean)) / np.array(vit.std)).float()
        with torch.no_grad():
            if hasattr(model.config, "num_patches"):  # SigLIP 2 is given patches
                flat = rearrange(pixels, "b (gy y) (gx x) c -> b (gy gx) (y x c)", y=vit.patch_px, x=vit.patch_px)  # fmt: skip
                mask = torch.ones(flat.shape[:2], dtype=torch.int64)
                shapes = torch.tensor([[vit.grid, vit.grid]] * len(flat))
                out = model(flat, mask, shapes, output_hidden_states=True)
            else:
                out = model(pixels.permute(0, 3, 1, 2), output_hidden_states=True)
        last = vit.feature_layer == -1
        theirs = out.last_hidden_state if last else out.hidden_states[vit.feature_state]
        differences.append(relative(ours, theirs[:, int(vit.cls_token) :]))
    return Compared("features", max(differences), "")


def compare_llava(folder: Path, answers: bool = True) -> Compared:
    """Images in the middle of the text: two in a row, one, none; rows of different lengths, padded on the left."""
    config, params = load(folder, ("vit", "projector", "lm"))
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rng, patches = np.random.default_rng(2), config.vit.num_patches
    image = model.config.image_token_id
    words = [i for i in range(6, config.lm.vocab_size) if i != image]
    length, count = 12 + 2 * patches, (2, 1, 0)
    ids, valid = np.zeros((3, length), int), np.zeros((3, length), bool)
    for row, images in enumerate(count):
        parts = [rng.choice(words, 3)]
        for _ in range(images):
            parts += [np.full(patches, image), rng.choice(words, 4)]
        row_ids = np.concatenate([*parts, rng.choice(words, 1 + row)])
        ids[row, -len(row_ids) :], valid[row, -len(row_ids) :] = row_ids, True
    vit = config.vit
    pictures = rng.integers(0, 256, (3, 2, vit.image_px, vit.image_px, 3), dtype=np.uint8)
    used = np.concatenate([pictures[row, :images] for row, images in enumerate(count)])
    pixels = torch.tensor((used / 255 - np.array(vit.mean)) / np.array(vit.std)).float()
    batch = (config, params, inputs_of(ids, valid, pictures, image), model, ids, valid)
    theirs = dict(pixel_values=pixels.permute(0, 3, 1, 2))
    said = compare_answers(*batch, **theirs) if answers else ""
    return Compared("logits", compare_logits(*batch, **theirs), said)


def read_reference(folder: Path) -> Compared:
    """The original LLaVA layout, which transformers does not know: every tensor must find its parameter."""
    found, raw = describe(folder), json.loads((folder / "config.json").read_text())
    vit = named.vit("clip-l-336", width=raw["mm_hidden_size"], num_heads=1)
    config = VLMConfig(vit, found.compressor, found.lm, found.projector_layers or 2)
    wanted = weights.abstract(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    weights.load(str(folder), config, {part: tree for part, tree in wanted.items() if part != "vit"})  # fmt: skip
    return Compared("read", 0.0, "")


def compare(folder: Path) -> Compared:
    found = describe(folder)
    if found.encoder:
        return read_reference(folder)
    if found.projector_layers:
        return compare_llava(folder)
    return compare_decoder(folder) if found.lm else compare_encoder(folder)


def check(row: Compared) -> None:
    assert row.difference <= TOLERANCE, row
    if row.tokens:
        agree, of = row.tokens.split("/")
        assert agree == of, row


@pytest.mark.slow
@pytest.mark.parametrize("name", hf_models.MODELS)
def test_an_imported_model_computes_what_transformers_computes(name, tmp_path):
    check(compare(hf_models.build(name, tmp_path)))


@pytest.mark.parametrize("name", ["clip tower", "siglip tower"])
def test_a_tower_named_as_on_the_hub_is_the_same(name, tmp_path):
    check(compare(hf_models.as_on_the_hub(hf_models.build(name, tmp_path))))


@pytest.mark.skipif(not OUTSIDE, reason="VLM_JAX_HF_DIRS names no directory")
def test_outside_directories_compute_what_transformers_computes(capsys):
    rows = [(folder, compare(folder)) for folder in OUTSIDE]
    with capsys.disabled():
        print(f"\n{'directory':<40} {'compared':<10} {'rel. difference':>15} {'greedy tokens':>14}")
        for folder, row in rows:
            print(f"{folder.name[-40:]:<40} {row.what:<10} {row.difference:15.1e} {row.tokens:>14}")
    for _, row in rows:
        check(row)
