"""Models cut over meshes of 8 devices: every gradient and the prefill equal one device's numbers.

QueCC has its query pass, MQT and M3 show a part of their slots.

The numbers are made by this file run as a program in a process with 8 fake CPU devices.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from paths import PYTHONPATH, ROOT

MESHES = ((8, 1, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2))
CASES = [("quecc", mesh) for mesh in MESHES] + [("mqt", (2, 2, 2)), ("m3", (2, 2, 2))]
SHOWN = {"quecc": None, "mqt": 3, "m3": 1}  # of 4 slots
ROWS, LENGTH = 8, 10


def main(path: str) -> None:
    import jax

    from vlm_jax import sharding
    from vlm_jax.settings.run import MeshConfig

    jax.config.update("jax_default_matmul_precision", "highest")
    made = {}
    for name, sizes in [*((name, (1, 1, 1)) for name in SHOWN), *CASES]:
        devices = jax.devices()[: int(np.prod(sizes))]
        mesh = sharding.make_mesh(MeshConfig(*sizes), devices)
        made[f"{name} {sizes}"] = compute(mesh, name)
    arrays = {f"{mesh}/{k}": v for mesh, tree in made.items() for k, v in tree.items()}
    np.savez(path, **arrays)


def compute(mesh, name: str) -> dict[str, np.ndarray]:
    """Loss, gradient of every parameter and last logits of a prefill, from the same weights and batch."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from flax.traverse_util import flatten_dict

    from vlm_jax import sharding
    from vlm_jax.models.lm import empty_cache
    from vlm_jax.models.vlm import VLM, Inputs, init_params

    cfg = model_config(name)
    boxed = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda x: np.float32(0.2 * rng.standard_normal(x.shape)), nn.unbox(boxed)
    )
    params = jax.device_put(weights, sharding.shardings_of(boxed, mesh))
    inputs = Inputs.from_batch(sharding.put(batch(rng), mesh))
    if SHOWN[name]:
        inputs = inputs._replace(count=jnp.int32(SHOWN[name]))
    model = VLM(cfg)

    def loss(params):
        return jnp.square(model.apply({"params": params}, inputs)).mean()

    def prefill(params):
        cache = empty_cache(cfg.lm, ROWS, LENGTH + 2)
        return model.apply({"params": params}, inputs, cache, method="prefill")[0]

    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    with sharding.use(mesh):
        step = jax.jit(lambda p: (jax.value_and_grad(loss)(p), prefill(p)), compiler_options=quick)
        (value, grads), logits = step(params)
    spread = {"/".join(k): v for k, v in flatten_dict(params).items()}
    cut = sum(v.addressable_shards[0].data.size < v.size for v in spread.values())
    named = {"grad/" + "/".join(k): v for k, v in flatten_dict(grads).items()}
    made = named | {"loss": value, "logits": logits, "cut": cut}
    return {k: np.asarray(v) for k, v in made.items()}


def model_config(name: str):
    from vlm_jax.compressors import settings as compressor_settings
    from vlm_jax.settings import presets
    from vlm_jax.settings.model import VLMConfig

    if name == "quecc":
        compressor = compressor_settings("quecc", stride=2, num_heads=2, taps=(1, 2))
    else:
        fields = {"num_heads": 2, "query_grid": 2} if name == "mqt" else {}
        compressor = compressor_settings(name, visual_tokens=4, **fields)
    return VLMConfig(
        vit=presets.vit("mini", image_px=16, patch_px=4, width=8, num_layers=2, num_heads=4, mlp_width=16),
        compressor=compressor,
        lm=presets.lm(
            "qwen2.5-0.5b", vocab_size=32, width=16, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4, mlp_width=32
        ),
    )  # fmt: skip


def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Left-padded rows of several lengths; the last two show no image."""
    pad = np.arange(ROWS) % 3
    slots = np.tile(np.arange(LENGTH), (ROWS, 1))
    real = slots >= pad[:, None]
    index = np.where((slots >= 3) & (slots < 7), slots - 3, -1)
    index[-2:] = -1
    integers = lambda *shape: rng.integers(1, 32, shape).astype(np.int32)  # noqa: E731
    return {
        "tokens": integers(ROWS, LENGTH),
        "visual_index": index.astype(np.int32),
        "positions": np.where(real, slots - pad[:, None], 0).astype(np.int32),
        "segments": np.where(real, 0, -1).astype(np.int32),
        "images": rng.integers(0, 256, (ROWS, 1, 16, 16, 3)).astype(np.uint8),
        "query_tokens": integers(ROWS, 1, 3),
        "query_mask": np.arange(3) < integers(ROWS, 1, 1) % 3 + 1,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("meshes") / "results.npz"
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": PYTHONPATH,
    }
    subprocess.run([sys.executable, __file__, str(path)], env=env, check=True, cwd=ROOT)
    made: dict[str, dict] = {}
    with np.load(path) as file:
        for key in file.files:
            mesh, name = key.split("/", 1)
            made.setdefault(mesh, {})[name] = file[key]
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name, mesh", CASES)
def test_gradients_and_prefill_on_a_mesh_equal_one_device(results, name, mesh):
    alone, together = results[f"{name} (1, 1, 1)"], results[f"{name} {mesh}"]
    assert alone.keys() == together.keys()
    assert (together["cut"] > 5) == (mesh != (8, 1, 1))  # parameters really lie in pieces
    for key in alone.keys() - {"cut"}:
        scale = np.abs(alone[key]).max()
        assert scale > 0 or key.endswith("k/bias"), key
        np.testing.assert_allclose(
            together[key], alone[key], atol=1e-5 * scale + 1e-8, rtol=0, err_msg=key
        )


if __name__ == "__main__":
    main(sys.argv[1])
