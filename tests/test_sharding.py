"""The rules table, its errors, and the same numbers on every mesh."""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from paths import HELPERS, PYTHONPATH

from vlm_jax import sharding
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import MeshConfig


def boxed(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def abstract_mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)


def specs(tree, mesh):
    return jax.tree.map(lambda s: s.spec, sharding.shardings_of(tree, mesh))


def test_rules_split_widths_over_fsdp_and_heads_mlp_and_vocabulary_over_tensor():
    tree = {
        "q": boxed((2, 8, 4, 3), "layers", "embed", "heads", None),
        "down": boxed((2, 16, 8), "layers", "mlp", "embed"),
        "embed": boxed((16, 8), "vocab", "embed"),
        "vit": boxed((6, 6), None, "vision"),
        "norm": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    assert specs(tree, abstract_mesh(1, 2, 4)) == {
        "q": PartitionSpec(None, "fsdp", ("tensor", "group"), None),
        "down": PartitionSpec(None, ("tensor", "group"), "fsdp"),
        "embed": PartitionSpec(("tensor", "group"), "fsdp"),
        "vit": PartitionSpec(None, None),
        "norm": PartitionSpec(),
    }


def test_an_axis_that_does_not_divide_is_named_with_the_parameter():
    tree = {"lm": {"embed": boxed((151936, 1024), "vocab", "embed")}}
    with pytest.raises(
        ConfigError,
        match=r"lm/embed has shape \(151936, 1024\), whose axis 0 \(151936\) is not divisible by mesh axis tensor \(256\)",
    ):
        sharding.shardings_of(tree, abstract_mesh(1, 1, 256))
    sharding.shardings_of(tree, abstract_mesh(1, 1, 128))


def test_a_mesh_must_use_every_device():
    assert dict(sharding.make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {
        "data": 1,
        "fsdp": 1,
        "tensor": 1,
        "group": 1,
    }
    with pytest.raises(ConfigError, match="mesh: data 1, fsdp 2, tensor 1 does not make 1 devices"):
        sharding.make_mesh(MeshConfig(1, 2, 1), jax.devices()[:1])
    with pytest.raises(ConfigError, match="choose sizes whose product is 1"):
        sharding.make_mesh(MeshConfig(-1, 2, 1), jax.devices()[:1])


@pytest.mark.parametrize(
    ("config", "count", "rows", "sizes"),
    [
        (MeshConfig(1, -1, 0), 1, 128, (1, 1, 1, 1)),
        (MeshConfig(1, -1, 0), 8, 128, (1, 8, 1, 1)),
        (MeshConfig(1, -1, 0), 256, 128, (1, 128, 2, 1)),
        (MeshConfig(1, -1, 0), 1024, 128, (1, 128, 8, 1)),
        (MeshConfig(1, -1, 0), 256, 96, (1, 32, 8, 1)),
        (MeshConfig(8, -1, 0), 256, 128, (8, 16, 2, 1)),
        (MeshConfig(-1, 4, 0), 64, 32, (8, 4, 2, 1)),
        (MeshConfig(1, -1, 0, slices=2), 512, 128, (2, 64, 4, 1)),  # 64 rows for the 256 devices of a slice
        (MeshConfig(-1, 4, 1, slices=4), 64, 0, (16, 4, 1, 1)),
        (MeshConfig(2, 4, 0), 8, 5, (2, 4, 1, 1)),  # nothing is left for tensor: check_batch says why
        (MeshConfig(1, -1, 0), 256, 0, (1, 256, 1, 1)),
        (MeshConfig(1, -1, 1), 256, 128, (1, 256, 1, 1)),
    ],
)  # fmt: skip
def test_a_tensor_of_0_is_as_small_as_the_batch_allows(config, count, rows, sizes):
    assert sharding.mesh_sizes(config, count, rows) == sizes


def test_only_tensor_may_be_0():
    with pytest.raises(
        ConfigError, match=r"must be positive, .* \(tensor may be 0.*got \(0, 1, 1\)"
    ):
        MeshConfig(data=0)


def test_a_batch_must_deal_out_evenly_over_data_and_fsdp():
    sharding.check_batch(12, abstract_mesh(2, 3, 5))
    with pytest.raises(ConfigError, match=r"batch_size 8 is not divisible by mesh data\*fsdp = 6"):
        sharding.check_batch(8, abstract_mesh(2, 3, 5))


def test_optimiser_state_is_sharded_as_its_parameter():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    split = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    where = {"embed": split, "norm": NamedSharding(mesh, PartitionSpec(None))}
    shape = {"lm": {"embed": jnp.zeros((4, 2)), "norm": jnp.zeros(2)}}
    params = {"lm": {k: jax.device_put(shape["lm"][k], where[k]) for k in where}}
    state = {"count": jnp.int32(0), "mu": shape, "inner": [{"nu": shape}], "embed": jnp.zeros(())}
    state["row"] = {"lm": {"embed": jnp.zeros(4)}}  # a factored moment
    found = jax.tree.map(lambda s: s.spec, sharding.shardings_like(state, params, mesh))
    assert (
        found["mu"]["lm"]["embed"]
        == found["inner"][0]["nu"]["lm"]["embed"]
        == PartitionSpec("tensor", "fsdp")
    )
    assert found["mu"]["lm"]["norm"] == PartitionSpec(None)
    assert found["count"] == found["embed"] == found["row"]["lm"]["embed"] == PartitionSpec()


def test_put_leaves_record_ids_on_the_host():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    put = sharding.put(
        {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3), "ids": ["a", "b"]}, mesh
    )
    assert set(put) == {"tokens"} and put["tokens"].sharding.spec == PartitionSpec(("data", "fsdp"))
    np.testing.assert_array_equal(put["tokens"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.slow
def test_a_step_and_a_prefill_on_8_devices_equal_one_device(tmp_path):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": PYTHONPATH,
    }
    script = [sys.executable, str(HELPERS / "meshes.py"), str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    one = found.pop("(1, 1, 1, 1)")
    for name, mesh in found.items():
        for key in ("loss", "grad_norm", "params", "logits"):
            np.testing.assert_allclose(
                mesh[key], one[key], rtol=2e-4, atol=2e-5, err_msg=f"{name} {key}"
            )
        assert mesh["compilations"] == [1], name
    # born sharded: head [embed 16, vocab 64] on the first device
    shards = {name: tuple(mesh["head_shard"]) for name, mesh in found.items()}
    assert shards == {
        "(8, 1, 1, 1)": (16, 64),
        "(2, 4, 1, 1)": (4, 64),
        "(1, 2, 4, 1)": (8, 16),
        "(2, 2, 2, 1)": (8, 32),
        "(1, 1, 4, 2)": (16, 16),
    }


@pytest.mark.parametrize("chosen", [False, True])
def test_a_process_alone_keeps_its_programs_where_the_user_says_or_in_the_home(tmp_path, chosen):
    code = "import jax; from vlm_jax import sharding; sharding.start_processes(); print(jax.config.jax_compilation_cache_dir)"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    folder = tmp_path / "cache" / "vlm_jax" / "programs"
    if chosen:
        folder = tmp_path / "own"
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == str(folder), done.stderr
