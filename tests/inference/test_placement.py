"""Where a model that answers lies: fewer bytes and the same numbers, on as few chips as hold it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import stage2
from vlm_jax import aot, sharding
from vlm_jax.aot import programs
from vlm_jax.inference import placement
from vlm_jax.models import vlm
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment
from vlm_jax.storage import weights
from vlm_jax.storage.checkpoint import save_params


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that computes in bfloat16 from float32 parameters."""
    config = tiny.config(tmp_path_factory.mktemp("nowhere"))
    config.model.lm.dtype = config.model.vit.dtype = config.model.compressor.dtype = "bfloat16"
    config.model.lm.lora_rank = 2
    return experiment.resolve(config).model


def test_matrices_in_the_dtype_of_the_products_change_no_number(model, tmp_path):
    params = nn.unbox(vlm.init_params(model, jax.random.key(0)))
    params = jax.tree.map(
        lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape, x.dtype) / 8, params
    )
    save_params(tmp_path, params)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    stored = weights.load(str(tmp_path), model, weights.abstract(model, mesh))
    narrow = weights.load(str(tmp_path), model, weights.answering(model, mesh))
    layers = narrow["lm"]["layers"]
    assert layers["attn"]["q"]["kernel"].dtype == layers["mlp"]["up"]["lora_a"].dtype == "bfloat16"
    assert narrow["lm"]["embed"].dtype == narrow["vit"]["patch_embed"]["kernel"].dtype == "bfloat16"
    assert layers["attn_norm"]["scale"].dtype == narrow["vit"]["position"].dtype == "float32"
    px, rng = model.vit.image_px, np.random.default_rng(0)
    one = jnp.arange(7)[None]
    inputs = vlm.Inputs(
        tokens=jnp.asarray(rng.integers(4, 60, (1, 7))),
        visual_index=jnp.where(one == 2, 0, -1),
        positions=one,
        segments=jnp.zeros_like(one),
        images=jnp.asarray(rng.integers(0, 256, (1, 1, px, px, 3)), jnp.uint8),
    )
    logits = [vlm.VLM(model).apply({"params": p}, inputs) for p in (stored, narrow)]
    np.testing.assert_array_equal(*logits)
    kept = weights.answering_shapes(model, keep_vit=True)["vit"]
    assert {x.dtype.name for x in jax.tree.leaves(kept)} == {"float32"}


# chips, LM, prompts -> (data, fsdp, tensor, group). A 7B takes 13.5 GB: a v5e has 16 GiB, a v5p 95.
CHOICES = [
    ("v5e:2x4", "vicuna-7b", 8, (2, 1, 4, 1)),
    ("v5e:2x4", "vicuna-7b", 1, (1, 1, 8, 1)),
    ("v5p:2x2x1", "vicuna-7b", 8, (4, 1, 1, 1)),
    ("v5e:2x4", "qwen1.5-0.5b", 8, (8, 1, 1, 1)),
    ("v5e:2x4", "qwen2.5-0.5b", 4, (4, 1, 2, 1)),  # 14 heads: no 4 ways
    ("v5e:2x4", "llama3-8b", 1, (1, 1, 8, 1)),
]


@pytest.mark.parametrize(("topology", "lm", "prompts", "sizes"), CHOICES)
def test_a_tensor_of_0_takes_as_few_chips_as_hold_the_model(topology, lm, prompts, sizes):
    aot.quiet_environment(topology)
    config = stage2.get_config()
    config.model.lm.preset = lm
    exp = experiment.resolve(config)
    config = dataclasses.replace(exp.mesh, data=-1, fsdp=1)
    mesh = placement.mesh_for(exp.model, config, programs.devices(topology), prompts)
    assert tuple(mesh.shape.values()) == sizes


def test_a_configured_tensor_stays_and_copies_key_value_heads(model):
    lm = dataclasses.replace(model.lm, num_heads=8, num_kv_heads=2, head_dim=2)
    devices = programs.devices("v5e:2x4")
    given = MeshConfig(data=1, tensor=-1)
    mesh = placement.mesh_for(dataclasses.replace(model, lm=lm), given, devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 2, "group": 4}
