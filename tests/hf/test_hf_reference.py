"""The original LLaVA layout and the compressors' releases: the same numbers as the same weights elsewhere."""

import dataclasses
import json
import os
from pathlib import Path

import flax.linen as nn
import hf_models
import jax
import numpy as np
import pytest
import torch
from compressor import compressor_config
from refs import reference_layout
from safetensors.numpy import load_file, save_file
from test_hf_export import convert  # noqa: F401 (a fixture)
from test_hf_parity import compare, load

from vlm_jax import sharding
from vlm_jax.hf import export, named, settings
from vlm_jax.hf.describe import describe
from vlm_jax.models.vlm import init_params
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment
from vlm_jax.storage import weights

GOLDEN = Path(os.environ.get("VLM_JAX_GOLDEN", Path(__file__).parents[2] / "../shared/golden"))
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
        assert named.vit(preset).width > 0
    assert presets.HUB["openai/clip-vit-large-patch14-336"] == "clip-l-336"


REFUSED = {
    "a resampler": ({"mm_projector_type": "resampler"}, "mm_projector_type 'resampler' is not computed here"),
    "start and end tokens": ({"mm_use_im_start_end": True}, "mm_use_im_start_end True is not computed here"),
    "class token kept": ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
    "tiles": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
    "an older compressor": ({"mm_vision_token_compression_type": "local-conv-self-attn-deep"}, "mm_vision_token_compression_type"),
    "another decoder": ({"model_type": "llava_mpt"}, "model_type 'llava_mpt' with mm_ fields"),
    "a compressor without its weights": ({"mm_projector_type": "tokenpacker"}, "mm_projector_type 'tokenpacker' is not computed here.*beside their weights"),
    "several layers at once": ({"mm_vision_select_layer": [12, 16, -2]}, r"mm_vision_select_layer \[12, 16, -2\] is not computed here; it must be one int"),
    "a scale in words": ({"scale_factor": "2x"}, "scale_factor '2x' is not computed here; it must be one int"),
    "a resampler behind the encoder": ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type 'spatial_pool' is not computed here"),
    "a quantised decoder": ({"quantization_config": {"bits": 4}}, "field 'quantization_config'.*quantised"),
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


DECODERS = {
    "llava": "llama", "llava_llama": "llama", "llama": "llama", "llava_mistral": "mistral", "mistral": "mistral",
    "llava_qwen": "qwen2", "llava_qwen2": "qwen2", "llava-qwen2": "qwen2", "qwen2": "qwen2", "llava_qwen3": "qwen3", "qwen3": "qwen3",
    "llava_phi3": "phi3", "llava_phi": "phi3", "phi3": "phi3",
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_the_decoder_is_known_by_every_name_that_training_code_leaves(name, folders, tmp_path, caplog):  # fmt: skip
    llava, _, encoder = folders
    folder = original(llava, tmp_path / "named", encoder, tower=False)
    path = folder / "config.json"
    own = {"model_type": name, "sliding_window": None, "pretraining_tp": None, "vision_tower_pretrained": "x", "mm_tunable_parts": "mm_mlp_adapter"}  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with caplog.at_level("INFO"):
        found = describe(folder).lm
    plain = settings.decoder(hf_models.TEXT, "here", DECODERS[name])
    assert (found.qkv_bias, found.qk_norm) == (plain.qkv_bias, plain.qk_norm)
    assert [r.message.split(": ")[-1] for r in caplog.records if "ignored" in r.message] == ["vision_tower_pretrained."]  # fmt: skip


@pytest.mark.parametrize(("ratio", "mode"), [("pad", "pad"), ("square", "crop"), (None, "crop")])
def test_images_are_padded_only_where_the_layout_says_so(ratio, mode, folders, tmp_path, convert):  # noqa: F811
    """Else LLaVA's code hands them to CLIP's processor as they are."""
    llava, _, encoder = folders
    folder = original(llava, tmp_path / "squared", encoder, tower=False)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_aspect_ratio": ratio}))
    assert convert(folder, tmp_path / "ours", "--vit", encoder) == 0
    assert experiment.read(tmp_path / "ours").data.image_mode == mode


def test_a_tokenpacker_as_its_scripts_save_it_is_imported(tmp_path, convert):  # noqa: F811
    """Pickled, with its own name as mm_projector_type, a projector file beside the model and the model_type of its decoder."""
    lm = dict(vocab_size=40, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=24, rope_theta=1e4, norm_eps=1e-5, qkv_bias=False, qk_norm=False, tied_embeddings=False)  # fmt: skip
    vit = dict(width=16, num_layers=24, num_heads=2, mlp_width=24, image_px=32, patch_px=8)
    compressor = compressor_config("tokenpacker", stride=2, num_heads=1, taps=(12, 16, 22, 23))
    config = VLMConfig(named.vit("clip-l-336", **vit), compressor, named.lm("", **lm))
    whole = dataclasses.replace(config, vit=dataclasses.replace(config.vit, feature_layer=-1))
    shapes, rng = nn.unbox(jax.eval_shape(lambda: init_params(whole, jax.random.key(0)))), np.random.default_rng(0)  # fmt: skip
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes)
    bare = export.Companions(None, None, None)
    export.standalone(tmp_path / "clip", "vit", {"vit": params["vit"]}, whole, bare)  # fmt: skip
    own = {part: params[part] for part in ("compressor", "projector")}
    export.standalone(tmp_path / "packer", "reference", own, config, bare, encoder_name="./clip")
    export.standalone(tmp_path / "lm", "lm", {"lm": params["lm"]}, config, bare)
    given = tmp_path / "given"
    given.mkdir()
    weights_of = {
        file: load_file(tmp_path / file / "model.safetensors") for file in ("lm", "packer")
    }
    for file, tensors in weights_of.items():
        torch.save({name: torch.tensor(value) for name, value in tensors.items()}, given / f"{file}.bin")  # fmt: skip
    weight_map = {name: f"{file}.bin" for file, tensors in weights_of.items() for name in tensors}
    (given / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"model.mm_projector.mlp.0.bias": torch.zeros(16)}, given / "mm_projector.bin")
    saved = json.loads((tmp_path / "packer" / "config.json").read_text())
    saved |= {"mm_projector_type": "tokenpacker", "image_grid_pinpoints": None, "tune_mm_mlp_adapter": True}  # fmt: skip
    (given / "config.json").write_text(json.dumps(saved))

    assert convert("--from-bin", given, tmp_path / "safe") == 0
    assert convert(tmp_path / "safe", tmp_path / "ours", "--vit", tmp_path / "clip") == 0
    model = experiment.read(tmp_path / "ours").model
    assert model.compressor == dataclasses.replace(compressor, dtype=model.compressor.dtype)
    assert model.projector_layers == 2 and model.vit.feature_layer == -2
    wanted = weights.abstract(model, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    back = weights.load(str(tmp_path / "ours"), model, wanted)
    params["vit"]["layers"] = jax.tree.map(lambda leaf: leaf[:23], params["vit"]["layers"])
    jax.tree.map(np.testing.assert_array_equal, back, {part: params[part] for part in back})


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
    compressor = compressor_config(kind, stride, sizes["num_heads"], (1, 2, 3, 4))
    vit = named.vit("clip-l-336", width=width, num_layers=5, num_heads=2, mlp_width=8)
    config = VLMConfig(vit, compressor, named.lm("mini-38k", width=out))
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
