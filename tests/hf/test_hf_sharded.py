"""A model directory loaded onto meshes of 8 devices: every device gets its shard, and the numbers are one device's.

The arrays are loaded by this file run as a program in a process with 8 fake CPU devices.
"""

import json
import os
import subprocess
import sys

import pytest
from paths import PYTHONPATH

MESHES = ((1, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 4))
PARTS = ("vit", "projector", "lm")


def main(folder: str) -> None:
    import jax
    import numpy as np

    from vlm_jax import sharding
    from vlm_jax.compressors import settings as compressor_settings
    from vlm_jax.hf import named
    from vlm_jax.settings.model import VLMConfig
    from vlm_jax.settings.run import MeshConfig
    from vlm_jax.storage import weights

    config = VLMConfig(named.vit(folder), compressor_settings("identity"), named.lm(folder))
    report = {}
    alone = None
    for sizes in MESHES:
        mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        wanted = weights.abstract(config, mesh)
        params = weights.load(folder, config, {part: wanted[part] for part in PARTS})
        alone = alone or params
        equal = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), params, alone)
        placed = jax.tree.map(lambda a, w: a.sharding == w.sharding, params, {p: wanted[p] for p in PARTS})  # fmt: skip
        kernel = params["lm"]["layers"]["attn"]["q"]["kernel"]
        report[str(sizes)] = {
            "equal": all(jax.tree.leaves(equal)), "placed": all(jax.tree.leaves(placed)),
            "query shard": list(kernel.addressable_shards[0].data.shape),
            "output shard": list(params["lm"]["layers"]["attn"]["o"]["kernel"].addressable_shards[0].data.shape),
        }  # fmt: skip
    sys.stdout.write(json.dumps(report))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    import hf_models

    folder = tmp_path_factory.mktemp("hf") / "llava"
    hf_models.MODELS["sharded"] = (
        lambda: hf_models.llava(num_key_value_heads=4, vocab_size=68),
        {},
    )
    hf_models.build("sharded", folder)
    hf_models.MODELS.pop("sharded")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = PYTHONPATH
    run = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, env=environment)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_holds_the_same_numbers_where_the_rules_put_them(sizes, report):
    found = report[str(sizes)]
    _, fsdp, tensor = sizes
    assert found["equal"] and found["placed"]
    assert found["query shard"] == [2, 32 // fsdp, 4 // tensor, 8]
    assert found["output shard"] == [2, 4 // tensor, 8, 32 // fsdp]


if __name__ == "__main__":
    main(sys.argv[1])
