"""Run by test_sharding.py in a process with 8 fake CPU devices: one training step and one prefill on each mesh.

Prints a JSON object: mesh sizes -> loss, gradient norm, a checksum of the new parameters, and the prefill's logits.
"""

import dataclasses
import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from vlm_jax import sharding
from vlm_jax.models.lm import empty_cache
from vlm_jax.models.vlm import VLM, Inputs
from vlm_jax.settings.run import Experiment, MeshConfig
from vlm_jax.storage import run as experiment
from vlm_jax.training import optim, step

# mesh sizes (data, fsdp, tensor, slices) -> settings that must change nothing. The decoder has 2 key/value heads.
MESHES: dict[tuple[int, ...], dict] = {
    (1, 1, 1, 1): {},
    (8, 1, 1, 1): {},
    (2, 4, 1, 1): {"loss_chunk": 5, "sharded": True},
    (1, 2, 4, 1): {"loss_chunk": 12},
    (2, 2, 2, 1): {"loss_chunk": 4, "micro_batches": 2},
    (1, 1, 4, 2): {"loss_chunk": 4},
}


def batch(rows: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    visual = np.full((rows, length), -1, np.int32)
    visual[:, 2] = 0
    return {
        "tokens": rng.integers(4, 60, (rows, length), np.int32),
        "visual_index": visual,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segments": np.zeros((rows, length), np.int32),
        "loss_mask": np.tile(np.arange(length) > 3, (rows, 1)) & (rng.random((rows, length)) < 0.7),
        "images": rng.integers(0, 255, (rows, 1, 16, 16, 3), np.uint8),
        "query_tokens": rng.integers(4, 60, (rows, 1, 4), np.int32),
        "query_mask": np.ones((rows, 1, 4), bool),
    }


def run(
    exp: Experiment, sizes: tuple[int, ...], sharded: bool = False, **train: int
) -> dict[str, list[float]]:
    vit = dataclasses.replace(exp.model.vit, sharded=sharded)
    exp = dataclasses.replace(
        exp,
        model=dataclasses.replace(exp.model, vit=vit),
        train=dataclasses.replace(exp.train, **train),
    )
    heads = exp.model.lm.num_kv_heads
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)], kv_heads=heads)
    plan = step.plan(exp, mesh, 4)
    state = step.fresh_state(plan)
    spread = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state)}
    update, data = step.make_step(plan), sharding.put(batch(8, 12), mesh)
    with sharding.use(mesh):
        for _ in range(2):
            state, scalars = update(state, data)
        params = optim.merge(state.trainable, state.frozen)
        model = VLM(exp.model)

        def prefill(params, inputs):
            return model.apply(
                {"params": params}, inputs, empty_cache(exp.model.lm, 8, 16), method="prefill"
            )[0]

        logits = jax.jit(prefill)(params, Inputs.from_batch(data))
    total = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(params))
    kernel = nn.unbox(params)["lm"]["head"]
    return {
        "loss": [float(scalars["loss"])], "grad_norm": [float(scalars["grad_norm"])], "params": [total],
        "logits": np.asarray(logits).ravel()[::7].tolist(), "specs": sorted(spread),
        "head_shard": list(kernel.addressable_shards[0].data.shape), "compilations": [update._cache_size()],
    }  # fmt: skip


def main(folder: str) -> None:
    config = tiny.config(Path(folder))
    config.model.lm.update({"num_heads": 4, "num_kv_heads": 2, "head_dim": 4})
    config.data.batch_size = 8
    config.model.vit.num_heads = 4
    config.optim.update({"optimizer": "muon", "warmup_ratio": 0.0})
    exp = experiment.resolve(config)
    sys.stdout.write(json.dumps({str(sizes): run(exp, sizes, **s) for sizes, s in MESHES.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
