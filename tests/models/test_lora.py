"""Adapters: nothing at the start, alone in learning, the same numbers merged, and never mixed up with others."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import flax.linen as nn
import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec
from paths import PYTHONPATH
from test_hf_export import LM, convert, tensors  # noqa: F401 (a fixture)
from test_hf_parity import compare_logits, inputs_of, left_padded, relative

from configs import stage2_lora
from vlm_jax import sharding, train
from vlm_jax.hf import named
from vlm_jax.inference import generate
from vlm_jax.models import adapters
from vlm_jax.models.attention import AttentionMask
from vlm_jax.models.lm import LM as Decoder
from vlm_jax.models.lm import causal_mask
from vlm_jax.models.vlm import VLM, Inputs, init_params, shapes
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LM_LINEARS, LORA
from vlm_jax.storage import run as experiment
from vlm_jax.storage import weights
from vlm_jax.storage.checkpoint import save_params
from vlm_jax.training import loop, step
from vlm_jax.training.inputs import check_inputs
from vlm_jax.training.optim import make_optimizer, muon_axes, partition
from vlm_jax.training.telemetry import read_lines

TRAINABLE = "lora_|^(compressor|projector)/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny") / "data")


def config(folder, rank=4, **train):
    c = tiny.config(folder, **train)
    c.model.lm.update({"lora_rank": rank, "lora_alpha": 8.0})
    c.optim.trainable = TRAINABLE if rank else "^(compressor|projector)/"
    c.optim.warmup_ratio = 0.0
    return c


def decoder(seed=0, **fields):
    """(settings, parameters with adapters that are not zero)."""
    cfg = presets.lm("", **LM | fields)
    x = jnp.zeros((1, 1, cfg.width))
    model = Decoder(cfg)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32), x, method=forward))
    params = nn.unbox(init(jax.random.key(seed)))["params"]
    rng = np.random.default_rng(seed)
    flat = flatten_dict(params, sep="/")
    for path in flat:
        if path.endswith("lora_b"):
            flat[path] = jnp.asarray(0.1 * rng.standard_normal(flat[path].shape), jnp.float32)
    return cfg, params | adapters.unflatten_dict(flat, sep="/")


def forward(model, tokens, extra):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = AttentionMask(causal_mask(positions * 0, positions * 0))
    return model.logits(model.hidden(model.embed(tokens) + extra, positions, mask))


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params, tokens):
    extra = jnp.zeros((1, 1, cfg.width))
    return Decoder(cfg).apply({"params": params}, tokens, extra, method=forward)


def batch(folder, exp, mesh):
    from vlm_jax.data import pipeline

    iterator = pipeline.train_iterator(exp.data, 1, exp.model.vit)
    rows = next(iterator)
    iterator.close()
    return sharding.put(rows, mesh)


def planned(c):
    exp = experiment.resolve(c)
    return step.plan(exp, sharding.make_mesh(exp.mesh, jax.devices()[:1]), 6)


def whole(state):
    return flatten_dict(step.to_saved(state)["params"], sep="/")


def paths(tree):
    return set(flatten_dict(tree, sep="/"))


def test_adapters_may_stand_beside_every_linear_map_of_the_decoder():
    _, params = decoder(lora_rank=2)
    kernels = {path.removesuffix("/kernel") for path in paths(params) if path.endswith("kernel")}
    assert kernels == set(LM_LINEARS)
    assert {path.rpartition("/")[0] for path in paths(params) if path.endswith(LORA)} == kernels
    q, o = params["layers"]["attn"]["q"], params["layers"]["attn"]["o"]
    assert q["lora_a"].shape == (2, 16, 2) and q["lora_b"].shape == (2, 2, 4, 4)
    assert o["lora_a"].shape == (2, 4, 4, 2) and o["lora_b"].shape == (2, 2, 16)
    _, few = decoder(lora_rank=2, lora_targets="attn/[qv]$")
    assert {path.rpartition("/")[0] for path in paths(few) if path.endswith(LORA)} == {
        "layers/attn/q",
        "layers/attn/v",
    }


def test_step_zero_is_the_decoder_without_adapters_bit_for_bit(folder):
    with_them, without = planned(config(folder)), planned(config(folder, rank=0))
    params = step.to_saved(loop.begin(with_them))["params"]
    added = {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if path.endswith(LORA)}  # fmt: skip
    assert len(added) == 2 * len(LM_LINEARS)
    for path, leaf in added.items():
        # A: U(-1/sqrt(in), 1/sqrt(in)), in = 16 or, of down, 32; B: zero.
        bound = 0.0 if path.endswith("lora_b") else 32**-0.5 if "down" in path else 16**-0.5
        assert 0.9 * bound <= np.abs(leaf).max() <= bound, path
    assert paths(adapters.without(params)) == paths(everything(without))
    inputs = Inputs.from_batch(batch(folder, with_them.experiment, with_them.mesh))
    ours, base = (jax.jit(VLM(p.experiment.model).apply)({"params": own}, inputs) for p, own in (
        (with_them, params), (without, adapters.without(params))
    ))  # fmt: skip
    np.testing.assert_array_equal(ours, base)


@pytest.mark.parametrize("targets", [".", "mlp/|attn/o"])
def test_merged_kernels_compute_the_same(targets):
    cfg, params = decoder(lora_rank=3, lora_alpha=5.0, lora_targets=targets, qkv_bias=True)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 7)))
    merged = adapters.merged(params, cfg, "float32")
    assert paths(merged) == paths(adapters.without(params))
    with jax.default_matmul_precision("highest"):
        base = logits(dataclasses.replace(cfg, lora_rank=0), adapters.without(params), tokens)
        ours, theirs = logits(cfg, params, tokens), logits(dataclasses.replace(cfg, lora_rank=0), merged, tokens)  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))
    assert np.abs(np.asarray(ours - base)).max() > 1e-2  # and the adapters do something


def test_adapters_receive_the_gradient_of_the_merged_kernel_through_the_product_rule():
    """dA = scale dW B^T and dB = scale A^T dW, for every map."""
    cfg, params = decoder(lora_rank=3, lora_alpha=5.0)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 7)))
    plain, scale = dataclasses.replace(cfg, lora_rank=0), 5 / 3

    def loss(cfg, params):
        return jnp.square(logits(cfg, params, tokens)).mean()

    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
    with jax.default_matmul_precision("highest"):
        got = flatten_dict(gradient(cfg, params), sep="/")
        dense = gradient(plain, adapters.merged(params, cfg, "float32"))
    dense, flat = flatten_dict(dense, sep="/"), flatten_dict(params, sep="/")
    for path in LM_LINEARS:
        a, b = np.asarray(flat[f"{path}/lora_a"]), np.asarray(flat[f"{path}/lora_b"])
        rows = np.prod(a.shape[1:-1])
        a, b = a.reshape(2, rows, 3), b.reshape(2, 3, -1)
        dw = np.asarray(dense[f"{path}/kernel"]).reshape(2, rows, -1)
        for name, want in (("lora_a", scale * dw @ b.mT), ("lora_b", scale * a.mT @ dw)):
            found = np.asarray(got[f"{path}/{name}"]).reshape(want.shape)
            assert np.abs(want).max() > 1e-6
            np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max(), err_msg=path)


def test_training_beside_a_bfloat16_decoder_moves_adapters_and_projector_alone(folder):
    c = config(folder)
    c.model.lm.update({"param_dtype": "bfloat16", "dtype": "bfloat16"})
    plan = planned(c)
    state = loop.begin(plan)
    before = {path: np.asarray(leaf) for path, leaf in whole(state).items()}
    dtypes = {path: str(leaf.dtype) for path, leaf in before.items() if path.startswith("lm/")}
    assert {path for path, dtype in dtypes.items() if dtype == "float32"} == {path for path in dtypes if path.endswith(LORA)}  # fmt: skip
    data, update, losses = batch(folder, plan.experiment, plan.mesh), step.make_step(plan), []
    with sharding.use(plan.mesh):
        for _ in range(4):
            state, scalars = update(state, data)
            losses.append(float(scalars["loss"]))
    assert losses[-1] < losses[0] - 0.05
    moved = {path for path, leaf in whole(state).items() if not np.array_equal(before[path], leaf)}
    assert moved == {p for p in before if p.endswith(LORA) or p.startswith(("compressor/", "projector/"))}  # fmt: skip
    held = {sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}  # fmt: skip
    assert not any("lm/" in path and not path.endswith(LORA) for path in held)


def test_adapters_go_to_adamw_and_decay_as_kernels_do(folder):
    boxed, _ = partition(shapes(experiment.resolve(config(folder)).model), TRAINABLE)
    flat = flatten_dict(muon_axes(boxed), sep="/")
    assert all(spec is None for path, spec in flat.items() if path.endswith(LORA))
    assert any(spec is not None for spec in flat.values())
    c = config(folder)
    c.optim.weight_decay = 0.5
    trainable = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), nn.unbox(boxed))
    optimizer = make_optimizer(experiment.resolve(c).optim, 4, boxed)
    zeros = jax.tree.map(np.zeros_like, trainable)
    update = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params))
    updates, _ = update(zeros, trainable)
    for path, leaf in flatten_dict(updates, sep="/").items():
        decays = path.endswith(("kernel", *LORA))
        np.testing.assert_allclose(leaf, -0.5 * 1e-2 * decays, rtol=1e-5, err_msg=path)


@pytest.mark.slow
def test_a_query_cut_after_some_layers_and_generation_work_with_adapters(folder):
    """QueCC reads the question with the first layers of the decoder, adapters included; a cache changes no logit."""
    c = config(folder)
    c.model.compressor.update({"name": "quecc", "query_layers": 1})
    model = experiment.resolve(c).model
    params = nn.unbox(jax.jit(lambda: init_params(model, jax.random.key(0)))())
    cfg = dataclasses.replace(model, lm=dataclasses.replace(model.lm, lora_rank=0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), params)
    merged = params | {"lm": adapters.merged(params["lm"], model.lm, "float32")}
    data = batch(folder, experiment.resolve(c), planned(c).mesh)
    inputs = Inputs.from_batch(data)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(VLM(model).apply)({"params": params}, inputs)
        theirs = jax.jit(VLM(cfg).apply)({"params": merged}, inputs)
        decoding = generate.Decoding(3, (), 0)
        rows = jnp.arange(len(inputs.tokens), dtype=jnp.int32)
        said = generate.make_generate(model, decoding)(params, inputs, rows)
        wanted = generate.make_generate(cfg, decoding)(merged, inputs, rows)
    np.testing.assert_allclose(ours, theirs, atol=5e-5 * float(jnp.abs(theirs).max()))
    np.testing.assert_array_equal(said, wanted)


def test_the_rank_is_never_split_and_the_other_axes_are_split_as_the_kernel_s(folder):
    from test_sharding import abstract_mesh

    c = config(folder)
    boxed = shapes(experiment.resolve(c).model)
    specs = jax.tree.map(lambda s: s.spec, sharding.shardings_of(boxed, abstract_mesh(2, 2, 2)))
    attn, mlp = specs["lm"]["layers"]["attn"], specs["lm"]["layers"]["mlp"]
    assert attn["q"]["lora_a"] == PartitionSpec(None, "fsdp", None)
    assert attn["q"]["lora_b"] == PartitionSpec(None, None, sharding.TENSOR_AXES, None)
    assert attn["o"]["lora_a"] == PartitionSpec(None, sharding.TENSOR_AXES, None, None)
    assert attn["o"]["lora_b"] == PartitionSpec(None, None, "fsdp")
    assert mlp["down"]["lora_a"] == PartitionSpec(None, sharding.TENSOR_AXES, None)
    assert mlp["up"]["lora_b"] == PartitionSpec(None, None, sharding.TENSOR_AXES)


MESH_SCRIPT = """
import json, sys
from pathlib import Path
import test_lora, meshes
from vlm_jax.storage import run as experiment
c = test_lora.config(Path(sys.argv[1]))
c.model.lm.update({"num_heads": 4, "num_kv_heads": 4, "head_dim": 4})
c.data.batch_size = 8
exp = experiment.resolve(c)
print(json.dumps([meshes.run(exp, sizes) for sizes in ((1, 1, 1), (2, 2, 2))]))
"""


@pytest.mark.slow
def test_steps_with_adapters_on_8_devices_equal_one_device(folder):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": PYTHONPATH,
    }
    command = [sys.executable, "-c", MESH_SCRIPT, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, eight = json.loads(done.stdout)
    for key in ("loss", "grad_norm", "params", "logits"):
        np.testing.assert_allclose(eight[key], one[key], rtol=2e-4, atol=2e-5, err_msg=key)


@pytest.mark.slow
def test_a_run_with_adapters_resumes_hands_them_on_and_leaves_merged(folder, tmp_path, convert):  # noqa: F811
    """The base run, adapters on it, a resume, the next stage, the export, and what is refused."""
    base = planned(config(folder, rank=0))
    began, saved = tmp_path / "base", step.to_saved(loop.begin(base))["params"]
    save_params(began, saved)
    experiment.write(base.experiment, began)

    c, run = config(folder, num_steps=4, save_every=2), tmp_path / "run"
    c.init.update(dict.fromkeys(("vit", "compressor", "projector", "lm"), str(began)))
    given = whole(loop.begin(planned(c)))
    for path, leaf in flatten_dict(saved, sep="/").items():
        np.testing.assert_array_equal(given[path], leaf, err_msg=path)
    assert not any(given[path].any() for path in given if path.endswith("lora_b"))

    train.train(c, str(run))
    want = read_lines(run / "metrics.jsonl")
    os.remove(run / "final.json")
    shutil.rmtree(run / "checkpoints" / "4")
    train.train(c, str(run))
    assert len(want) == 4 and read_lines(run / "metrics.jsonl") == want

    next_stage = config(folder, num_steps=4)
    next_stage.init.lm = str(run)
    plan = planned(next_stage)
    here, there = whole(loop.begin(plan)), whole_of(run, plan)
    for path in there:
        if path.startswith("lm/"):
            np.testing.assert_array_equal(here[path], there[path], err_msg=path)
    assert np.asarray(there["lm/layers/mlp/up/lora_b"]).any()

    for change in ({"lora_rank": 0}, {"lora_rank": 8}, {"lora_alpha": 4.0}, {"lora_targets": "mlp"}):  # fmt: skip
        other = config(folder)
        other.model.lm.update(change)
        other.optim.trainable, other.init.lm = TRAINABLE, str(run)
        exp = experiment.resolve(other)
        with pytest.raises(ConfigError, match=r"has adapters \(lora_rank 4, lora_alpha 8\.0.*merge them: scripts/convert_hf\.py"):  # fmt: skip
            check_inputs(exp)
        with pytest.raises(ConfigError, match="other ones or none"):
            weights.load_by_part({"lm": str(run)}, exp.model, everything(plan))
    with pytest.raises(ConfigError, match=r"holds a run with model\.lm\.lora_alpha = 8\.0, now 4\.0"):  # fmt: skip
        c.model.lm.lora_alpha = 4.0
        train.train(c, str(run))

    assert convert(run, tmp_path / "hf", "--what=lm") == 0
    plain = config(folder, rank=0)
    plain.model.lm.preset = plain.init.lm = str(tmp_path / "hf")
    alone = whole(loop.begin(planned(plain)))
    merged = adapters.merged(partition(to_tree(there), "^lm/")[0]["lm"], plan.experiment.model.lm, "float32")  # fmt: skip
    for path, leaf in flatten_dict(merged, sep="/").items():
        np.testing.assert_array_equal(alone[f"lm/{path}"], leaf, err_msg=path)


def hf_models_logits(given, model, ids, valid):
    """How far the exported model is from the one it started from."""
    base = transformers.AutoModelForCausalLM.from_pretrained(given, dtype=torch.float32).eval()
    asked = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(valid.astype(int)))
    with torch.no_grad():
        return relative(model(**asked).logits.numpy()[valid], base(**asked).logits.numpy()[valid])


def everything(plan):
    return step.to_saved(plan.state)["params"]


def whole_of(run, plan):
    return flatten_dict(weights.load(str(run), plan.experiment.model, everything(plan)), sep="/")


def to_tree(flat):
    return adapters.unflatten_dict(flat, sep="/")


@pytest.mark.parametrize(("name", "held"), [("llama, grouped queries", "float32"), ("qwen2, tied, bf16 file", "bfloat16")])  # fmt: skip
def test_an_exported_run_says_in_transformers_what_it_says_with_its_adapters(
    name, held, folder, tmp_path, convert  # noqa: F811
):  # fmt: skip
    """A Hugging Face decoder, random adapters on it, and the directory that the script makes of both."""
    given = hf_models.build(name, tmp_path / "given")
    c = config(folder)
    c.model.lm.update(dict.fromkeys(set(c.model.lm) - {"rope_scaling", "lora_targets"}))
    c.model.lm.update(
        {"preset": str(given), "param_dtype": held, "dtype": "float32", "remat": "none", "lora_rank": 4, "lora_alpha": 8.0}
    )  # fmt: skip
    c.init.lm = str(given)
    plan = planned(c)
    check_inputs(plan.experiment)
    rng, flat = np.random.default_rng(0), whole(loop.begin(plan))
    for path in flat:
        if path.endswith(LORA):
            flat[path] = jnp.asarray(0.1 * rng.standard_normal(flat[path].shape), jnp.float32)
    params, run = to_tree(flat), tmp_path / "run"
    save_params(run, params)
    experiment.write(plan.experiment, run)

    assert convert(run, tmp_path / "out", "--what=lm", "--dtype=float32") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids, valid = left_padded(rng, 3, 17, plan.experiment.model.lm.vocab_size)
    inputs = inputs_of(ids, valid)
    with jax.default_matmul_precision("highest"):
        exact = compare_logits(plan.experiment.model, params, inputs, model, ids, valid)
        bare = hf_models_logits(given, model, ids, valid)
    assert exact < 2e-5 and bare > 1e-2

    assert convert(run, tmp_path / "as_held", "--what=lm") == 0
    assert convert(run, tmp_path / "onto", "--base", given) == 0
    full = tensors(tmp_path / "out")
    for found in (tensors(tmp_path / "as_held"), tensors(tmp_path / "onto")):
        assert found.keys() == full.keys()
        for tensor, values in found.items():
            assert str(values.dtype) == held
            np.testing.assert_array_equal(values, full[tensor].astype(values.dtype), tensor)


def test_mistakes_name_what_is_allowed(folder):
    with pytest.raises(
        ConfigError, match="lora_targets 'attention' matches none of layers/attn/q, "
    ):
        presets.lm("mini-38k", lora_rank=2, lora_targets="attention")
    with pytest.raises(ConfigError, match=r"'\(attn' is not a regular expression"):
        presets.lm("mini-38k", lora_targets="(attn")
    with pytest.raises(ConfigError, match="lora_rank must be 0"):
        presets.lm("mini-38k", lora_rank=-1)
    with pytest.raises(ConfigError, match="lora_alpha must be positive"):
        presets.lm("mini-38k", lora_alpha=0.0)
    c = config(folder)
    c.optim.trainable = "^(compressor|projector|lm)/"
    with pytest.raises(ConfigError, match=r"trainable takes lm/layers/.*/kernel, which has an adapter"):  # fmt: skip
        planned(c)
    c.optim.trainable = "lora_|lm/layers/attn_norm"  # other parameters of the decoder may learn
    assert "lm/layers/attn_norm/scale" in paths(planned(c).state.trainable)


def test_the_recipe_with_adapters_trains_them_and_nothing_else_of_the_decoder():
    c = stage2_lora.get_config()
    c.model.lm.preset = "mini-38k"
    c.model.vit.preset, c.model.compressor.taps, c.model.compressor.stride = "mini", (), 2
    model = named.vlm(c.model.to_dict())
    assert model.lm.adapter("layers/attn/q") == (128, 2.0)
    trainable, _ = partition(shapes(model), c.optim.trainable)
    assert {p for p in paths(trainable) if p.startswith("lm/") and not p.endswith(LORA)} == set()
