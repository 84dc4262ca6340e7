"""The original LLaVA layout and the compressors' releases: the same numbers as the same weights elsewhere."""

import json
import os
from pathlib import Path

import hf_models
import jax
import numpy as np
import pytest
from refs import reference_layout
from safetensors.numpy import load_file, save_file
from test_hf_export import convert  # noqa: F401 (a fixture)
from test_hf_parity import compare, load

from vlm_jax import experiment, presets, sharding, weights
from vlm_jax.config import CompressorConfig, ConfigError, VLMConfig
from vlm_jax.hf.describe import describe
from vlm_jax.run_config import MeshConfig

GOLDEN = Path(os.environ.get("VLM_JAX_GOLDEN", Path(__file__).parents[1] / "../shared/golden"))
ORIGINAL = {
    "language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.", "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
}  # fmt: skip
SETTINGS = {
    "model_type": "llava_llama", "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "image_aspect_ratio": "pad", "freeze_mm_mlp_adapter": False, "tune_mm_mlp_adapter": False, "mm_projector_lr": None,
    "unfreeze_mm_vision_tower": True, "tokenizer_padding_side": "right", "tokenizer_model_max_length": 2048, "use_mm_proj": True,
}  # fmt: skip


def renamed(name: str) -> str:
    for theirs, original in ORIGINAL.items():
        if name.startswith(theirs):
            return original + name.removeprefix(theirs)
    raise AssertionError(name)


def original(llava: Path, folder: Path, encoder: Path, tower: bool) -> Path:
    """The weights of a transformers LLaVA directory as the original code stores them."""
    folder.mkdir()
    tensors = {renamed(name): value for name, value in load_file(llava / "model.safetensors").items()}  # fmt: skip
    if not tower:
        tensors = {name: value for name, value in tensors.items() if "vision_tower" not in name}
    save_file(tensors, folder / "model.safetensors")
    text = json.loads((llava / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(text | SETTINGS | {"mm_vision_tower": str(encoder)}))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(LLaVA as transformers stores it, the same in the original layout, its encoder alone)."""
    root = tmp_path_factory.mktemp("hf")
    llava = hf_models.build("llava 1.5", root / "llava")
    encoder = root / "encoder"
    encoder.mkdir()
    tensors = load_file(llava / "model.safetensors")
    tower = {n.removeprefix("vision_tower."): t for n, t in tensors.items() if n.startswith("vision_tower.")}  # fmt: skip
    save_file(tower, encoder / "model.safetensors")
    vision = json.loads((llava / "config.json").read_text())["vision_config"]
    (encoder / "config.json").write_text(json.dumps(vision))
    return llava, original(llava, root / "original", encoder, tower=True), encoder


def test_the_original_layout_holds_the_same_model(folders):
    llava, other, _ = folders
    parts = ("vit", "projector", "lm")
    (ours, here), (theirs, there) = load(llava, parts), load(other, parts)
    assert ours == theirs
    jax.tree.map(np.testing.assert_array_equal, here, there)


def test_a_layout_without_its_encoder_takes_it_from_elsewhere(folders, tmp_path, convert):  # noqa: F811
    llava, _, encoder = folders
    bare = original(llava, tmp_path / "bare", Path("openai/some-clip"), tower=False)
    assert convert(bare, tmp_path / "refused") == 2
    assert convert(bare, tmp_path / "ours", "--vit", encoder) == 0
    model = experiment.read(tmp_path / "ours").model
    assert (model.vit.feature_layer, model.compressor.name, model.projector_layers) == (-2, "identity", 2)  # fmt: skip
    wanted = weights.abstract(model, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    params = weights.load(str(tmp_path / "ours"), model, wanted)
    _, direct = load(llava, ("vit", "projector", "lm"))
    jax.tree.map(np.testing.assert_array_equal, params, direct)


def test_an_outside_directory_of_this_layout_is_read_whole(folders):
    assert compare(folders[1]).what == "read"


def test_hub_names_of_encoders_are_known():
    for preset in presets.HUB.values():
        assert presets.vit(preset).width > 0
    assert presets.HUB["openai/clip-vit-large-patch14-336"] == "clip-l-336"


REFUSED = {
    "a resampler": ({"mm_projector_type": "resampler"}, "mm_projector_type 'resampler' is not computed here"),
    "start and end tokens": ({"mm_use_im_start_end": True}, "mm_use_im_start_end True is not computed here"),
    "class token kept": ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
    "tiles": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
    "an older compressor": ({"mm_vision_token_compression_type": "local-conv-self-attn-deep"}, "mm_vision_token_compression_type"),
    "another decoder": ({"model_type": "llava_mpt"}, "model_type 'llava_mpt' with mm_ fields"),
    "a field of tomorrow": ({"mm_spatial_pool": 2}, "field 'mm_spatial_pool' = 2 is not known here"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_variant_that_is_not_computed_is_named(name, folders, tmp_path):
    fields, message = REFUSED[name]
    llava, _, encoder = folders
    folder = original(llava, tmp_path / "variant", encoder, tower=False)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        describe(folder)


RELEASES = {
    "quecc_s4_36tok": lambda state, c: reference_layout.quecc(state, c.num_heads, c.stride),
    "tokenpacker_s2_144tok": lambda state, c: reference_layout.tokenpacker(state, c.num_heads),
    "mqt_q16_m256_36_1": lambda state, c: (reference_layout.mqt(state, c.num_heads),),
}


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no reference vectors at {GOLDEN}")
@pytest.mark.parametrize("name", RELEASES)
def test_a_release_s_compressor_and_projector_are_read_by_name(name, tmp_path):
    """The reference implementations' own parameters, against the mapping that the golden tests use."""
    golden = np.load(GOLDEN / f"{name}.npz")
    state = {key.removeprefix("param/"): golden[key] for key in golden.files if key.startswith("param/")}  # fmt: skip
    sizes = json.loads(str(golden["config_json"]))
    kind = sizes["compressor"]
    width = {"quecc": "0.clip_attn", "tokenpacker": "clip_attn", "mqt": "attn"}[kind]
    width = state[f"{width}.out_proj.weight"].shape[0]
    out = {"quecc": "3.weight", "tokenpacker": "mlp.2.weight", "mqt": "proj"}[kind]
    out = state[out].shape[1 if kind == "mqt" else 0]
    stride = {"quecc": 4, "tokenpacker": 2, "mqt": 1}[kind]
    compressor = CompressorConfig(kind, stride, sizes["num_heads"], (1, 2, 3, 4))
    vit = presets.vit("clip-l-336", width=width, num_layers=5, num_heads=2, mlp_width=8)
    config = VLMConfig(vit, compressor, presets.lm("mini-38k", width=out))
    module = "query_abstractor" if kind == "mqt" else "mm_projector"
    save_file({f"model.{module}.{key}": value for key, value in state.items()}, tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    wanted = weights.abstract(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    parts = ("compressor",) if kind == "mqt" else ("compressor", "projector")
    if kind == "quecc":  # the vectors' questions are narrower than their decoder
        text = wanted["compressor"]["text"]
        text["kernel"] = text["kernel"].update(shape=(sizes["text_dim"], width))
    found = weights.load(str(tmp_path), config, {part: wanted[part] for part in parts})
    expected = dict(zip(parts, RELEASES[name](state, compressor), strict=True))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
