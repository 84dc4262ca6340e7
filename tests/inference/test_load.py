"""`vlm_jax.load` of releases in the original layouts, from files on disk: they answer as the parameters they were written from."""

import dataclasses
import json
import shutil
from pathlib import Path

import flax.linen as nn
import hf_models
import jax
import numpy as np
import pytest
from askable import QUESTION, asked, picture
from compressor import compressor_config
from safetensors.numpy import load_file, save_file
from test_hf_reference import folders  # noqa: F401 (a fixture)

import vlm_jax
from vlm_jax.hf import export, named
from vlm_jax.inference.model import Model
from vlm_jax.models.vlm import init_params
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig

LM = dict(vocab_size=64, width=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=32, rope_theta=1e4, norm_eps=1e-5, qkv_bias=False, qk_norm=False, tied_embeddings=False)  # fmt: skip
VIT = dict(width=16, num_layers=24, num_heads=2, mlp_width=24, image_px=32, patch_px=8)
TAPS = (12, 16, 22, 23)  # fixed in QueCC's and TokenPacker's code
# As the release's code has them; MQT's heads are 64 wide, or as wide as the encoder.
RELEASES = {
    "quecc": compressor_config("quecc", stride=2, num_heads=8, taps=TAPS),
    "tokenpacker": compressor_config("tokenpacker", stride=2, num_heads=1, taps=TAPS),
    "mqt": compressor_config("mqt", num_heads=1, query_grid=2),
}
OPTIONS = {"max_new_tokens": 8, "system": ""}


def release(root: Path, world: Path, name: str) -> tuple[Path, Path, dict, VLMConfig]:
    """(the release's directory, its encoder's, the parameters in both, their settings): random weights as its code stores them."""
    config = VLMConfig(named.vit("clip-l-336", **VIT), RELEASES[name], named.lm("", **LM))
    whole = dataclasses.replace(config, vit=dataclasses.replace(config.vit, feature_layer=-1))
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(whole, jax.random.key(1)))
    params = jax.tree.map(lambda x: np.asarray(6.0 * x if x.ndim > 1 else x), params)
    bare, clip, given = export.Companions(None, None, None), root / "clip", root / name
    export.standalone(clip, "vit", {"vit": params["vit"]}, whole, bare._replace(image_mode="pad"))
    own = {part: params[part] for part in ("compressor", "projector") if part in params}
    export.standalone(given, "reference", own, config, bare, encoder_name="openai/clip")
    export.standalone(root / "lm", "lm", {"lm": params["lm"]}, config, bare)
    tensors = load_file(given / "model.safetensors") | load_file(root / "lm" / "model.safetensors")
    save_file(tensors, given / "model.safetensors")
    shutil.copytree(world / "tokenizer", given, dirs_exist_ok=True)
    params["vit"]["layers"] = jax.tree.map(lambda leaf: leaf[:23], params["vit"]["layers"])
    params["vit"].pop("post_norm", None)  # behind the last layer, which is not read
    return given, clip, params, config


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_answers_as_the_parameters_that_it_holds(name, world, tmp_path):
    given, clip, params, config = release(tmp_path, world, name)
    model = vlm_jax.load(given, vit=clip)
    expected = dataclasses.replace(config.compressor, dtype="float32")
    assert model.config.compressor == expected and model.visual_tokens == 4
    assert model.config.vit.feature_layer == -2 and model.opened.data.template == "vicuna_v1"
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    twin = Model(dataclasses.replace(model.opened, load=lambda wanted: params))
    texts = [twin.ask(*pair, **OPTIONS) for pair in asked(world)]
    assert model.ask_many(asked(world), **OPTIONS) == texts and len(set(texts)) >= 3, texts
    with pytest.raises(ConfigError, match="names its encoder 'openai/clip' but does not hold it; give its directory as vit"):  # fmt: skip
        vlm_jax.load(given)


def test_parts_from_three_directories_are_the_release(world, tmp_path):
    """The decoder alone, the encoder alone, and the directory that holds compressor and projector."""
    given, clip, _, _ = release(tmp_path, world, "quecc")
    shutil.copytree(world / "tokenizer", tmp_path / "lm", dirs_exist_ok=True)
    pair = (picture(world, "red"), QUESTION)
    whole = vlm_jax.load(given, vit=clip).ask(*pair, **OPTIONS)
    assert vlm_jax.load(lm=tmp_path / "lm", vit=clip, compressor=given).ask(*pair, **OPTIONS) == whole  # fmt: skip
    with pytest.raises(ConfigError, match="give lm and vit too"):
        vlm_jax.load(compressor=given)


def test_a_llava_in_the_original_layout_answers_as_in_transformers_own(world, folders):  # noqa: F811
    llava, other, _ = folders
    for folder in (llava, other):
        shutil.copytree(world / "tokenizer", folder, dirs_exist_ok=True)
    path = other / "config.json"  # both crop their pictures
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_aspect_ratio": None}))
    ours, theirs = vlm_jax.load(other), vlm_jax.load(llava)
    assert ours.visual_tokens == theirs.visual_tokens == hf_models.PATCHES
    texts = [theirs.ask(*pair, **OPTIONS) for pair in asked(world)]
    assert [ours.ask(*pair, **OPTIONS) for pair in asked(world)] == texts and len(set(texts)) >= 3
