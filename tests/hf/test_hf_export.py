"""Our models as Hugging Face directories: import then export is the identity, and transformers computes the same."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from compressor import compressor_config
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from test_hf_parity import compare_decoder, inputs_of, load, relative

from configs import eval as eval_config
from vlm_jax import evaluate, sharding, train
from vlm_jax.data import templates, tokenizer
from vlm_jax.data.records import IMAGE, Turn
from vlm_jax.hf import directory, export, named, written
from vlm_jax.hf.describe import describe
from vlm_jax.models import adapters
from vlm_jax.models.vlm import VLM, Inputs, init_params
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import CompressorConfig, RopeScaling, VLMConfig
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import streamed, weights
from vlm_jax.storage.checkpoint import save_params

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "convert_hf.py"
BARE = export.Companions(None, None, None)
VIT = dict(width=16, num_layers=2, num_heads=2, mlp_width=24, image_px=24, patch_px=8)
LM = dict(
    vocab_size=40, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, rope_theta=1e4,
    norm_eps=1e-5, qkv_bias=False, qk_norm=False, tied_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def convert():
    """The script's `main`, through the wrapper that turns mistakes into exit codes."""
    spec = importlib.util.spec_from_file_location("convert_hf", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: cli.run(module.main, [str(word) for word in words])


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def random_model(vit: str = "clip-l-336", compressor: CompressorConfig | None = None, lm=None, **vit_fields):  # fmt: skip
    """(config, random parameters away from their initial values)."""
    config = VLMConfig(
        named.vit(vit, **VIT | vit_fields), compressor or compressor_config("identity"), named.lm("", **LM | (lm or {}))
    )  # fmt: skip
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    params = nn.unbox(params)
    rng = np.random.default_rng(0)
    return config, jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), params
    )


def assert_identical(given: Path, back: Path) -> None:
    """Same files, same tensors, same bits."""
    before, after = tensors(given), tensors(back)
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype
        assert before[tensor].tobytes() == after[tensor].tobytes(), tensor
    assert {path.name for path in given.iterdir()} == {path.name for path in back.iterdir()}
    assert (given / "config.json").read_text() == (back / "config.json").read_text()


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_import_then_export_is_the_identity(name, tmp_path):
    given = hf_models.build(name, tmp_path / "given")
    found = describe(given)
    held = [("vit", found.vit), ("projector", found.projector_layers), ("lm", found.lm)]
    config, params = load(given, tuple(part for part, there in held if there))
    export.onto_base(tmp_path / "back", given, params, config)
    assert_identical(given, tmp_path / "back")


@pytest.mark.parametrize("name", ["llava, counted from the front", "clip pair", "qwen2, tied, bf16 file"])  # fmt: skip
def test_a_converted_workdir_remembers_where_it_came_from(name, tmp_path, convert):
    given = hf_models.build(name, tmp_path / "given")
    assert convert(given, tmp_path / "ours") == 0
    assert convert(tmp_path / "ours", tmp_path / "back") == 0
    assert_identical(given, tmp_path / "back")
    given.rename(tmp_path / "moved")
    assert convert(tmp_path / "ours", tmp_path / "again") == 2
    assert convert(tmp_path / "ours", tmp_path / "again", "--base", tmp_path / "moved") == 0
    assert_identical(tmp_path / "moved", tmp_path / "again")


def test_a_changed_model_keeps_the_names_of_its_base_and_carries_its_own_numbers(tmp_path):
    given = hf_models.build("phi3, fused weights", tmp_path / "given")
    config = VLMConfig(named.vit("mini"), compressor_config("identity"), named.lm(str(given)))
    wanted = weights.abstract(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    params = weights.load(str(given), config, {"lm": wanted["lm"]})
    params["lm"]["layers"]["attn"]["k"]["kernel"] += 0.25
    export.onto_base(tmp_path / "out", given, params, config)
    before, after = tensors(given), tensors(tmp_path / "out")
    changed = sorted(name for name in before if not np.array_equal(before[name], after[name]))
    assert changed == [f"model.layers.{i}.self_attn.qkv_proj.weight" for i in (0, 1)]
    heads = 4 * 8  # rows of the queries; then two key heads
    moved = after[changed[0]] - before[changed[0]]
    np.testing.assert_allclose(moved[heads : heads + 16], np.full((16, 32), 0.25), rtol=1e-5)
    assert not moved[:heads].any() and not moved[heads + 16 :].any()


DECODERS = {
    "llama": ({}, "llama"),
    "llama 3": ({"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16)}, "llama"),
    "linear, all biases": (
        {"rope_scaling": RopeScaling("linear", 2.0), "tied_embeddings": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True}, "llama",
    ),
    "mistral": ({"sliding_window": 5}, "mistral"),
    "qwen2": ({"qkv_bias": True, "tied_embeddings": True}, "qwen2"),
    "qwen3": ({"qk_norm": True, "head_dim": 6, "sliding_window": 6}, "qwen3"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_of_ours_becomes_the_architecture_that_has_its_features(name, tmp_path):
    fields, model_type = DECODERS[name]
    config, params = random_model(lm=fields)
    export.standalone(tmp_path / "out", "lm", {"lm": params["lm"]}, config, BARE)
    assert directory.read_config(tmp_path / "out")["model_type"] == model_type
    assert named.lm(str(tmp_path / "out")) == config.lm
    with jax.default_matmul_precision("highest"):
        assert compare_decoder(tmp_path / "out", answers=False).difference < 2e-5


@pytest.mark.parametrize(("vit", "fields"), [("clip-l-336", {}), ("siglip-b16-224", {}), ("siglip-b16-224", {"feature_layer": -2})])  # fmt: skip
def test_an_encoder_of_ours_ends_at_its_feature_layer(vit, fields, tmp_path):
    config, params = random_model(vit, **fields)
    pixels = export.Companions(None, None, "crop")
    export.standalone(tmp_path / "out", "vit", {"vit": params["vit"]}, config, pixels)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    vit_config = config.vit
    given = torch.tensor((images / 255 - np.array(vit_config.mean)) / np.array(vit_config.std))
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        out = model(given.float().permute(0, 3, 1, 2), output_hidden_states=True)
        ours = VLM(config).apply({"params": params}, jnp.asarray(images), method=VLM.image_features)
    normed = vit_config.post_norm and vit_config.feature_layer == -1
    theirs = out.last_hidden_state if normed else out.hidden_states[-1]
    assert relative(ours.last, theirs[:, int(vit_config.cls_token) :]) < 2e-5


def ask_llava(folder: Path, words: str, image):
    """Logits of the last position, from nothing but the directory: transformers' processor and model."""
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    message = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": words}],
    }
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        return text, inputs, model(**inputs).logits[0, -1].numpy()


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_a_trained_model_answers_in_transformers_from_its_directory_alone(mode, tmp_path):
    """Tokenizer, chat template, image processing and weights together, against our own prompt, pixels and forward."""
    from PIL import Image

    from vlm_jax.data import images

    tiny.write(tmp_path / "data")
    config, params = random_model()
    words = templates.TEMPLATES["vicuna_v1"]
    companions = export.Companions(
        tmp_path / "data" / "tokenizer", templates.chat_template(words, ""), mode
    )
    parts = {part: params[part] for part in ("vit", "projector", "lm")}
    export.standalone(tmp_path / "out", "llava", parts, config, companions)
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 256, (30, 41, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    text, inputs, theirs = ask_llava(tmp_path / "out", "What colour is this ?", picture)
    assert text == "USER: <image>\nWhat colour is this ? ASSISTANT:"

    ids = inputs["input_ids"].numpy()
    image_id = json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"]
    assert (ids == image_id).sum() == 9
    pixels = images.load(str(tmp_path / "picture.png"), 24, mode, config.vit.mean, 10**6)
    mean, std = (np.array(x)[:, None, None] for x in (config.vit.mean, config.vit.std))
    seen = inputs["pixel_values"][0].numpy() * std + mean
    assert np.abs(seen - pixels.transpose(2, 0, 1) / 255).max() < 1 / 255 + 1e-6
    ours_inputs = inputs_of(ids, ids >= 0, pixels[None, None], image_id)
    with jax.default_matmul_precision("highest"):
        ours = VLM(config).apply({"params": params}, ours_inputs)[0, -1]
    assert relative(ours, theirs[: config.lm.vocab_size]) < (2e-5 if mode == "crop" else 2e-2)
    assert theirs.argmax() < config.lm.vocab_size  # the image token's row never wins


@pytest.mark.parametrize("name", [n for n, t in templates.TEMPLATES.items() if t.keeps_question])
def test_the_chat_template_renders_what_our_prompts_hold(name, tmp_path):
    tiny.write_tokenizer(tmp_path / "tokenizer")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    template = templates.TEMPLATES[name]
    turns = [Turn(2, "What is this ?", "red"), Turn(0, "Is it ?", "Yes"), Turn(0, 'Say "it"', None)]
    for system in (None, "", "Be brief ."):
        said = template.system_prompt if system is None else system
        ours = "".join(segment.text for segment in templates.render(template, said, turns))
        messages = []
        for turn in turns:
            content = [{"type": "image"}] * turn.images + [{"type": "text", "text": turn.question}]
            messages.append({"role": "user", "content": content if turn.images else turn.question})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        rendered = hf.apply_chat_template(
            messages, chat_template=templates.chat_template(template, system), tokenize=False, add_generation_prompt=True
        )  # fmt: skip
        assert rendered == ours
        asked = hf.apply_chat_template(
            [{"role": "system", "content": said}, *messages] if said else messages,
            chat_template=templates.chat_template(template, ""), tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        assert asked == ours
    assert IMAGE in ours


REFERENCE = {
    "quecc": (compressor_config("quecc", stride=3, num_heads=8, taps=(0, 1)), {"qkv_bias": True}),
    "tokenpacker": (compressor_config("tokenpacker", stride=3, num_heads=1, taps=(0, 1)), {}),
    "mqt": (compressor_config("mqt", num_heads=1, query_grid=2), {}),
    "identity": (compressor_config("identity"), {}),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_compressor_and_projector_go_out_and_come_back_in_the_reference_layout(name, tmp_path):
    compressor, lm = REFERENCE[name]
    config, params = random_model(compressor=compressor, lm=lm)
    own = {part: params[part] for part in ("compressor", "projector") if part in params}
    export.standalone(tmp_path / "out", "reference", own, config, BARE, encoder_name="clip-l-336")
    found = tensors(tmp_path / "out")
    assert all(
        tensor.startswith(("model.mm_projector.", "model.query_abstractor.")) for tensor in found
    )
    wanted = weights.abstract(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    back = weights.load(str(tmp_path / "out"), config, {part: wanted[part] for part in own})
    jax.tree.map(np.testing.assert_array_equal, back, own)
    described = describe(tmp_path / "out")
    stored = ("name", "stride", "query_grid")
    sizes = {k: v for k, v in dataclasses.asdict(compressor).items() if k in stored}
    assert (
        sizes["name"] == name and sizes.items() <= dataclasses.asdict(described.compressor).items()
    )
    assert (described.projector_layers == 2) == ("projector" in own)
    assert described.lm == config.lm


REFUSED = [
    (dict(compressor=compressor_config("tokenpacker", stride=3, num_heads=2)), "llava", "LLaVA has no tokenpacker"),
    (dict(vit="siglip-b16-224"), "llava", "before its last norm"),
    (dict(lm={"qkv_bias": True, "qk_norm": True}), "lm", "no known architecture"),
    (dict(position_grid=2), "vit", "position table of 2x2"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "what", "message"), REFUSED)
def test_what_a_layout_cannot_hold_is_refused_and_leaves_nothing(model, what, message, tmp_path):
    tiny.write_tokenizer(tmp_path / "tokenizer")
    config, params = random_model(**model)
    parts = {part: params[part] for part in export.WHAT[what]}
    with pytest.raises(ConfigError, match=message):
        export.standalone(
            tmp_path / "out",
            what,
            parts,
            config,
            export.Companions(tmp_path / "tokenizer", None, None),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize(
    "fields",
    [{"o_bias": True}, {"mlp_bias": True, "qkv_bias": True}, {"qkv_bias": True, "o_bias": True, "sliding_window": 4}, {"qk_norm": True, "mlp_bias": True}],
)  # fmt: skip
def test_features_that_no_architecture_has_together_are_listed(fields):
    with pytest.raises(ConfigError, match=r"export: no known architecture has .* together; llama") as error:  # fmt: skip
        written.decoder(named.lm("", **LM | fields))
    assert all(f"{name} {value}" in str(error.value) for name, value in fields.items())


def test_a_base_that_joins_its_parts_otherwise_is_refused(tmp_path):
    """Same shapes, but the projector learnt behind a compressor that the base does not have."""
    given = hf_models.build("llava 1.5", tmp_path / "given")
    config, params = load(given, ("vit", "projector", "lm"))
    pooled = dataclasses.replace(config, compressor=compressor_config("pool", stride=3))
    with pytest.raises(ConfigError, match=r"model\.compressor\.name is 'pool'.* it is 'identity'"):
        export.onto_base(tmp_path / "out", given, params, pooled)
    earlier = dataclasses.replace(config, vit=dataclasses.replace(config.vit, feature_layer=-1))
    with pytest.raises(ConfigError, match=r"model\.vit\.feature_layer is -1"):
        export.onto_base(tmp_path / "out", given, params, earlier)
    params["projector"]["norm"] = {"scale": jnp.ones(32)}
    with pytest.raises(ConfigError, match="no place for projector/norm/scale"):
        export.onto_base(tmp_path / "out", given, params, config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 2])
def test_an_export_reads_one_parameter_after_the_other(rank, tmp_path, monkeypatch):
    config, params = random_model(lm={"lora_rank": rank, "lora_targets": "attn/[qv]|down"})
    save_params(tmp_path / "run", params)
    read = []

    def load(source, config, wanted, of=weights.load):
        read.append(["/".join(path) for path in flatten_dict(wanted)])
        return of(source, config, wanted)

    monkeypatch.setattr(streamed.weights, "load", load)
    leaves = streamed.params(tmp_path / "run", config, ("lm",), "float32")
    assert not read
    export.standalone(tmp_path / "out", "lm", leaves, config, BARE)
    whole = {"lm": adapters.merged(params["lm"], config.lm, "float32")}
    export.standalone(tmp_path / "whole", "lm", whole, config, BARE)
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    every = ["/".join(path) for path in flatten_dict({"lm": params["lm"]})]
    assert sorted(path for paths in read for path in paths) == sorted(every)  # each once
    assert {len(paths) for paths in read} == ({1, 3} if rank else {1})  # a kernel with its adapter
    assert sum(any(path.endswith("lora_a") for path in paths) for paths in read) == (
        3 if rank else 0
    )


def test_an_export_never_overwrites(tmp_path):
    config, params = random_model()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export.standalone(tmp_path / "out", "lm", {"lm": params["lm"]}, config, BARE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_large_export_is_cut_into_shards_that_transformers_joins(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 4000)
    config, params = random_model()
    export.standalone(tmp_path / "out", "lm", {"lm": params["lm"]}, config, BARE, dtype="bfloat16")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert named.lm(str(tmp_path / "out")) == config.lm
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    ours = params["lm"]["layers"]["mlp"]["up"]["kernel"][1].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(theirs, np.asarray(ours, np.float32))


@pytest.mark.slow
def test_the_script_converts_a_directory_in_a_process_of_its_own(tmp_path):
    """And what it made answers a benchmark as any trained run does."""
    given = hf_models.build("llava 1.5", tmp_path / "given")
    tiny.write_tokenizer(given / "tok")
    for path in (given / "tok").iterdir():
        path.rename(given / path.name)
    (given / "tok").rmdir()
    command = [sys.executable, str(SCRIPT), str(given), str(tmp_path / "ours")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["data"]["template"] == "vicuna_v1"
    assert tokenizer.load(saved["data"]["tokenizer"]).vocab_size == 30
    data = tiny.write(tmp_path / "data")
    cfg = eval_config.get_config()
    cfg.eval.update(
        {"checkpoint": str(tmp_path / "ours"), "benchmarks": ("llava",), "annotations": (str(data),), "batch_size": 8, "max_new_tokens": 2}
    )  # fmt: skip
    (score,) = evaluate.evaluate(cfg, str(tmp_path / "eval"))
    assert score["n"] == 14
    with pytest.raises(ConfigError, match="holds an imported model, not a run"):
        train.train(tiny.config(data), str(tmp_path / "ours"))
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 2 and "holds checkpoints already" in again.stderr
    wrong = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), "x"], capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert wrong.returncode == 2 and "is neither a model directory" in wrong.stderr


def test_inputs_without_images_need_no_encoder():
    """The decoder of an imported directory works alone: nothing else has parameters then."""
    config, params = random_model()
    ids = jnp.arange(6, dtype=jnp.int32)[None]
    text = Inputs(ids, ids * 0 - 1, ids, ids * 0)
    alone = VLM(config).apply({"params": {"lm": params["lm"]}}, text)
    np.testing.assert_array_equal(alone, VLM(config).apply({"params": params}, text))
